"""2D navigation (paper section 5.3): a point moves to a goal that it cannot see.

The observation is the position; the goal is the task. As in the original code, the point starts at
the origin, an action is a velocity of at most 0.1 per coordinate and time step (the policy's
[-1, 1], clipped), the reward is minus the distance to the goal, and an episode ends where both
coordinates are within 0.01 of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.base import at_least
from tasks.control.mdp import MDPs, Trajectories, Transition
from tasks.random import UInt64, uniform

_GOAL = 0  # random stream
_FASTEST, _NEAR = 0.1, 0.01  # way per coordinate and time step, distance that ends an episode


@dataclass(frozen=True, kw_only=True)
class Navigation(MDPs):
    """Goals uniform on the square [-goal_range, goal_range]²."""

    trajectories: int = 20
    horizon: int = 100
    goal_range: float = 0.5

    input_shape = (2,)
    num_actions = 2
    has_expert = True

    def __post_init__(self) -> None:
        self.check_sizes()
        at_least("goal_range", self.goal_range, 0.0)

    def parameters(self, keys: UInt64) -> npt.NDArray[np.float64]:
        """The goals, [B, 2]."""
        return uniform(keys, _GOAL, 2, -self.goal_range, self.goal_range)

    def environment(
        self, parameters: Tensor, keys: UInt64, trajectories: int, like: Tensor
    ) -> Plane:
        return Plane(parameters.to(like), trajectories)

    def positions(self, past: Trajectories) -> Tensor:
        reached = _moved(past.observations, past.actions)
        return torch.cat([past.observations[..., :1, :], reached], -2)

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "goal_range": self.goal_range}


def _moved(position: Tensor, action: Tensor) -> Tensor:
    """The position after an action, both [..., 2]."""
    return position + _FASTEST * action.clamp(-1, 1)


class Plane:
    """The environment: the points of B tasks x n trajectories move at once; `goals` [B, 2]."""

    def __init__(self, goals: Tensor, trajectories: int):
        self._goals = goals[:, None]
        self._position = goals.new_zeros(len(goals), trajectories, 2)

    def reset(self, episode: int) -> Tensor:
        self._position = torch.zeros_like(self._position)
        return self._position

    def step(self, action: Tensor) -> Transition:
        self._position = _moved(self._position, action)
        left = self._position - self._goals
        ended = (left.abs() < _NEAR).all(-1)
        return Transition(self._position, -torch.linalg.vector_norm(left, dim=-1), ended)

    def expert_action(self) -> Tensor:
        """Towards the goal, at the highest speed in each coordinate."""
        return ((self._goals - self._position) / _FASTEST).clamp(-1, 1)

    def close(self) -> None:
        pass
