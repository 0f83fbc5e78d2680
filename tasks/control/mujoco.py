"""Locomotion in MuJoCo (paper section 5.3): a cheetah or an ant runs in a direction or at a speed.

Rewards, starts and ends are those of the original code (maml_rl), the models gymnasium's, which
come from the same source. The reward per time step, v being the forward velocity, a the action
in [-1, 1] and c the contact forces on all bodies, clipped to [-1, 1]:

    cheetah   ±v          − 0.05 |a|²           or  −|v − goal|      − 0.05 |a|²
    ant       ±v  + 0.05  − 0.005 |a|² − 0.0005 |c|²
                                               or  1 − |v − goal|  + 0.05 − 0.005 |a|² − 0.0005 |c|²

An ant's episode ends where its torso is not between 0.2 and 1 above the ground. Two things differ
from the original: v is the mean velocity of the torso during the time step (there, the velocity of
the centre of mass at its end), and observations are coordinates, x included, and velocities (there
with the centre of mass, and for the ant rotation matrix and contact forces). By default an action
lasts as long as there, 0.01 s (cheetah) or 0.02 s (ant); in gymnasium it lasts 0.05 s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.base import ascending, at_least
from tasks.control.gym import Vectorised
from tasks.control.mdp import MDPs, Trajectories
from tasks.random import UInt64, integers, uniform

_GOAL = 0  # random stream
_SIZES = {"cheetah": (18, 6), "ant": (29, 8)}  # observed numbers, dimensions of an action
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Locomotion(MDPs):
    """A robot that runs; its task is one number, the goal.

    An action is held for `frame_skip` steps of `time_step` seconds.
    """

    trajectories: int = 20
    horizon: int = 200
    time_step: float = 0.01
    frame_skip: int = 1

    robot: ClassVar[Literal["cheetah", "ant"]]
    over_time = "forward position"

    def __post_init__(self) -> None:
        self.check_sizes()
        at_least("time_step", self.time_step, 1e-4)
        at_least("frame_skip", self.frame_skip, 1)

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]  # depends on the robot
        return (_SIZES[self.robot][0],)

    @property
    def num_actions(self) -> int:  # type: ignore[override]  # depends on the robot
        return _SIZES[self.robot][1]

    def check(self, split: str) -> None:
        _robots()

    @staticmethod
    @abstractmethod
    def gain(velocity: Numbers, goal: Numbers) -> Numbers:
        """The reward for running at these velocities [N], given the goals [N]."""

    def environment(
        self, parameters: Tensor, keys: UInt64, trajectories: int, like: Tensor
    ) -> Vectorised:
        robots = _robots()
        running = robots.Robots(
            robots.ROBOTS[self.robot],
            self.gain,
            np.repeat(parameters[:, 0].double().cpu().numpy(), trajectories),
            time_step=self.time_step,
            frame_skip=self.frame_skip,
            threads=torch.get_num_threads(),
        )
        return Vectorised(running, keys, trajectories, self.horizon, like, running.close)

    def course(self, past: Trajectories) -> Tensor:
        return past.observations[..., 0]

    def protocol(self) -> dict[str, Any]:
        steps = {"time_step": self.time_step, "frame_skip": self.frame_skip}
        return {**super().protocol(), **steps}


@dataclass(frozen=True, kw_only=True)
class Direction(Locomotion):
    """Tasks: run forwards or backwards, as fast as possible."""

    def parameters(self, keys: UInt64) -> Numbers:
        """The directions, 1 or -1, [B, 1]."""
        return np.where(integers(keys, _GOAL, 1, 2) == 1, 1.0, -1.0)

    def describe(self, parameters: Sequence[float]) -> str:
        return "forwards" if parameters[0] > 0 else "backwards"

    @staticmethod
    def gain(velocity: Numbers, goal: Numbers) -> Numbers:
        return goal * velocity


@dataclass(frozen=True, kw_only=True)
class Velocity(Locomotion):
    """Tasks: run at a velocity from `velocity_range`."""

    velocity_range: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending("velocity_range", self.velocity_range)

    def parameters(self, keys: UInt64) -> Numbers:
        """The velocities, [B, 1]."""
        return uniform(keys, _GOAL, 1, *self.velocity_range)

    def describe(self, parameters: Sequence[float]) -> str:
        return f"at velocity {parameters[0]:.2g}"

    @staticmethod
    def gain(velocity: Numbers, goal: Numbers) -> Numbers:
        return -np.abs(velocity - goal)

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "velocity_range": list(self.velocity_range)}


@dataclass(frozen=True, kw_only=True)
class CheetahDirection(Direction):
    robot = "cheetah"


@dataclass(frozen=True, kw_only=True)
class CheetahVelocity(Velocity):
    robot = "cheetah"


@dataclass(frozen=True, kw_only=True)
class AntDirection(Direction):
    trajectories: int = 40
    time_step: float = 0.02

    robot = "ant"


@dataclass(frozen=True, kw_only=True)
class AntVelocity(Velocity):
    time_step: float = 0.02
    velocity_range: tuple[float, float] = (0.0, 3.0)

    robot = "ant"

    @staticmethod
    def gain(velocity: Numbers, goal: Numbers) -> Numbers:
        return 1.0 - np.abs(velocity - goal)  # positive, or falling early would pay


def _robots() -> ModuleType:
    """The module `robots`, imported late because it needs MuJoCo. Raises ValueError without it."""
    try:
        from tasks.control import robots
    except ImportError as error:
        raise ValueError("task.kind: needs MuJoCo: pip install -e '.[mujoco]'") from error
    return robots
