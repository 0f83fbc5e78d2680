"""A decision process so small that everything about it can be enumerated.

Two states, two actions, three time steps: 32 trajectories from state 0. The observation is the
state in unary, so that a linear policy without bias is a table of scores.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tasks.base import as_tensor
from tasks.control.mdp import MDPs, Transition
from tasks.random import UInt64, uniform

HORIZON = 3
TO_ONE = torch.tensor([[0.2, 0.7], [0.6, 0.1]], dtype=torch.float64)
"""Probability of state 1 next, by state and action."""
REWARD = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class TwoStates(MDPs):
    """The reward is multiplied by the task's number, between 0.5 and 1.5."""

    trajectories: int = 10
    horizon: int = HORIZON

    input_shape = (2,)
    actions = "discrete"
    num_actions = 2

    def __post_init__(self) -> None:
        self.check_sizes()

    def parameters(self, keys: UInt64) -> npt.NDArray[np.float64]:
        return uniform(keys, 0, 1, 0.5, 1.5)

    def environment(
        self, parameters: Tensor, keys: UInt64, trajectories: int, like: Tensor
    ) -> Chain:
        return Chain(parameters, keys, trajectories, self.horizon, like)


class Chain:
    def __init__(
        self, scale: Tensor, keys: UInt64, trajectories: int, horizon: int, like: Tensor
    ) -> None:
        self._scale, self._keys, self._like = scale, keys, like
        self._shape = (len(keys), trajectories, horizon)
        self._state = torch.zeros(0, dtype=torch.int64)

    def reset(self, episode: int) -> Tensor:
        b, n, horizon = self._shape
        self._chance = as_tensor(uniform(self._keys, 100 + episode, n * horizon).reshape(b, n, -1))
        self._state, self._time = torch.zeros(b, n, dtype=torch.int64), 0
        return self._observation()

    def step(self, action: Tensor) -> Transition:
        reward = self._scale * REWARD[self._state, action].to(self._like)
        self._state = (self._chance[:, :, self._time] < TO_ONE[self._state, action]).long()
        self._time += 1
        return Transition(self._observation(), reward, torch.zeros_like(action, dtype=torch.bool))

    def close(self) -> None:
        pass

    def _observation(self) -> Tensor:
        return torch.nn.functional.one_hot(self._state, 2).to(self._like)


def table(input_shape: tuple[int, ...], output_size: int) -> nn.Module:
    """A policy with a score per state and action."""
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


@dataclass(frozen=True)
class Paths:
    """All 32 trajectories."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    """All [32, H]."""
    chance: Tensor
    """Of the states, given the actions, [32]."""

    @property
    def to_come(self) -> Tensor:
        """Sum of the rewards from a time step on, [32, H]."""
        return self.rewards.flip(-1).cumsum(-1).flip(-1)

    def log_pi(self, scores: Tensor) -> Tensor:
        """log π(a_t | s_t), [32, H], for a table [states, actions]."""
        logs = torch.log_softmax(scores, -1)
        return logs[self.states, self.actions]

    def probability(self, scores: Tensor) -> Tensor:
        """Of each trajectory, [32]."""
        return self.chance * self.log_pi(scores).sum(-1).exp()

    def value(self, scores: Tensor) -> Tensor:
        """J(θ), the expected return."""
        return (self.probability(scores) * self.rewards.sum(-1)).sum()


def all_paths() -> Paths:
    states, actions, chance = [], [], []
    for acts in itertools.product((0, 1), repeat=HORIZON):
        for later in itertools.product((0, 1), repeat=HORIZON - 1):
            path = (0, *later)
            probability = 1.0
            for s, a, after in zip(path, acts, later, strict=False):
                to_one = float(TO_ONE[s, a])
                probability *= to_one if after else 1 - to_one
            states.append(path)
            actions.append(acts)
            chance.append(probability)
    s, a = torch.tensor(states), torch.tensor(actions)
    return Paths(s, a, REWARD[s, a], torch.tensor(chance, dtype=torch.float64))
