"""Reinforcement learning in a user's own gymnasium environment with task parameters.

The user names a function or class that makes environments; these have a method
`set_task({"goal": 0.3})`. Gymnasium is imported only when such tasks are built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.base import as_tensor, ascending
from tasks.control.mdp import Actions, MDPs, Transition
from tasks.random import UInt64, bits, uniform

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

Numbers = npt.NDArray[Any]
RESETTING = 2**13
"""First of the random streams that seed a task's environments; one stream per rollout."""

_idle: dict[str, list[gymnasium.Env[Any, Any]]] = {}
"""Environments of this process that are not in use, by `make`. Many take long to make."""


@dataclass(frozen=True, kw_only=True)
class Gymnasium(MDPs):
    """Environments that `make` (`my_module:MyEnv`) returns, with parameters uniform on `ranges`."""

    make: str
    ranges: dict[str, tuple[float, float]]
    trajectories: int = 20
    horizon: int = 100

    def __post_init__(self) -> None:
        self.check_sizes()
        if not self.ranges:
            raise ValueError("ranges: name at least one parameter, as {goal: [-1.0, 1.0]}")
        for name, bounds in self.ranges.items():
            ascending(f"ranges.{name}", bounds)
        self._spaces  # noqa: B018  # raises for an environment that does not fit

    @property
    def actions(self) -> Actions:  # type: ignore[override]
        return "continuous" if self._spaces.action.shape else "discrete"

    @property
    def num_actions(self) -> int:  # type: ignore[override]
        action = self._spaces.action
        return int(action.shape[0] if action.shape else action.n)

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (int(np.prod(self._spaces.observation.shape)),)

    def parameters(self, keys: UInt64) -> npt.NDArray[np.float64]:
        """The parameters of the tasks, [B, P], in the order of `ranges`."""
        drawn = [
            uniform(keys, stream, 1, *bounds) for stream, bounds in enumerate(self.ranges.values())
        ]
        return np.concatenate(drawn, axis=1)

    def describe(self, parameters: Sequence[float]) -> str:
        values = zip(self.ranges, parameters, strict=True)
        return ", ".join(f"{name} {value:.2g}" for name, value in values)

    def environment(
        self, parameters: Tensor, keys: UInt64, trajectories: int, like: Tensor
    ) -> Vectorised:
        from gymnasium.vector import SyncVectorEnv

        taken = _take(self.make, len(keys) * trajectories)
        numbers = np.repeat(parameters.cpu().numpy(), trajectories, axis=0)
        for one, values in zip(taken, numbers.tolist(), strict=True):
            _set_task(one, dict(zip(self.ranges, values, strict=True)))
        vector = SyncVectorEnv([lambda one=one: one for one in taken])  # type: ignore[misc]

        def give_back() -> None:
            # Gymnasium 1.1 closes the environments of a vector that is garbage-collected.
            vector.closed = True
            _give_back(self.make, taken)

        return Vectorised(vector, keys, trajectories, self.horizon, like, give_back)

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "make": self.make, "ranges": self.ranges}

    @cached_property
    def _spaces(self) -> _Spaces:
        """The spaces of an environment. Raises ValueError for one that does not fit."""
        (one,) = _take(self.make, 1)
        spaces = _checked(one)
        _try_task(one, {name: low for name, (low, _) in self.ranges.items()})
        _give_back(self.make, [one])
        return spaces


@dataclass(frozen=True)
class _Spaces:
    """Observation and action space of an environment."""

    observation: Any
    action: Any


class Vectorised:
    """Adapts gymnasium's vector API to `Environment`: one environment per task and trajectory.

    Where an action is bounded, the policy's [-1, 1] is stretched to its range and clipped, as in
    the original code; an action without bounds is passed on as it is.
    """

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        keys: UInt64,
        trajectories: int,
        horizon: int,
        like: Tensor,
        give_back: Callable[[], None],
    ):
        self._vector, self._keys, self._like = vector, keys, like
        self._shape, self._horizon = (len(keys), trajectories), horizon
        self._played = _played(vector.single_action_space)
        self.close = give_back
        self._ended, self._time = np.zeros(vector.num_envs, dtype=bool), 0

    def reset(self, episode: int) -> Tensor:
        # 32 bits, because environments with numpy's older generator accept no more.
        seeds = bits(self._keys, RESETTING + episode, self._shape[1]) >> np.uint64(32)
        observation, _ = self._vector.reset(seed=seeds.reshape(-1).tolist())  # type: ignore[arg-type]
        self._ended, self._time = np.zeros(self._vector.num_envs, dtype=bool), 0
        return self._tensor(observation)

    def step(self, action: Tensor) -> Transition:
        actions = self._played(action.flatten(0, 1).cpu().numpy())
        observation, reward, ended, cut, _ = self._vector.step(actions)
        self._time += 1
        self._refuse_own_limit(cut & ~ended)
        self._ended |= ended
        at = torch.from_numpy(ended).to(self._like.device).reshape(self._shape)
        return Transition(self._tensor(observation), self._tensor(reward)[..., 0], at)

    def _tensor(self, numbers: Numbers) -> Tensor:
        return as_tensor(numbers).to(self._like).reshape(*self._shape, -1)

    def _refuse_own_limit(self, cut: Numbers) -> None:
        """Raise ValueError if an environment truncates an episode before the horizon.

        What follows would count, because a time limit is no terminal state; but gymnasium would
        start a new episode there.
        """
        if self._time < self._horizon and (cut & ~self._ended).any():
            raise ValueError(
                f"task.horizon: {self._horizon} is more than the environment's own time limit: it "
                f"truncated an episode at time step {self._time}"
            )


def _played(space: Any) -> Callable[[Numbers], Numbers]:
    """The function that turns a policy's actions [N, ...] into those of an action space."""
    if not space.shape:
        return lambda action: action + space.start
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    middle, half = (high + low) / 2, (high - low) / 2
    return lambda action: np.clip(middle + half * action, space.low, space.high).astype(space.dtype)


def _take(make: str, count: int) -> list[gymnasium.Env[Any, Any]]:
    """Take `count` environments out of the idle ones, and make those that are missing."""
    idle = _idle.setdefault(make, [])
    made = [_make(make) for _ in range(count - len(idle))]
    taken = [*made, *idle[:count]]
    del idle[:count]
    return taken


def _give_back(make: str, environments: list[gymnasium.Env[Any, Any]]) -> None:
    """Return environments to the idle ones."""
    _idle[make] += environments


def _make(path: str) -> gymnasium.Env[Any, Any]:
    """Make an environment. Raises ValueError naming the setting."""
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError("kind: needs gymnasium: pip install -e '.[mujoco]'") from error
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"make: must look like my_module:MyEnvironment, got {path!r}")
    try:
        one = getattr(importlib.import_module(module), name)()
    except Exception as error:  # a user's code may raise anything
        raise ValueError(f"make: {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(one, gymnasium.Env):
        raise ValueError(f"make: {path} makes {type(one).__name__}, not a gymnasium.Env")
    return one


def _checked(one: gymnasium.Env[Any, Any]) -> _Spaces:
    """The spaces of an environment. Raises ValueError for unfit spaces, or without `set_task`."""
    from gymnasium.spaces import Box, Discrete

    name, seen, action = type(one.unwrapped).__name__, one.observation_space, one.action_space
    if not one.has_wrapper_attr("set_task"):
        raise ValueError(f"make: {name} has no method set_task(dict), which tells it its task")
    if not isinstance(seen, Box):
        raise ValueError(f"make: {name} must be observed as a Box, not {type(seen).__name__}")
    if not (isinstance(action, Discrete) or (isinstance(action, Box) and len(action.shape) == 1)):
        raise ValueError(f"make: {name} must take a Discrete action or a Box (A,), not {action}")
    return _Spaces(seen, action)


def _set_task(one: gymnasium.Env[Any, Any], task: Mapping[str, float]) -> None:
    """Tell an environment its task, through its wrappers."""
    one.get_wrapper_attr("set_task")(task)


def _try_task(one: gymnasium.Env[Any, Any], task: Mapping[str, float]) -> None:
    """Set a task once. Raises ValueError naming the setting if that fails."""
    try:
        _set_task(one, task)
    except Exception as error:  # a user's code may raise anything
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"ranges: set_task({task}) fails: {what}") from error
