"""Tasks to act in that gymnasium runs: any environment of a user's own with a task parameter.

What is needed: something that makes environments, by its path, and in them a method
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
from tasks.control.mdp import Actions, MDPs, Step
from tasks.random import UInt64, bits, uniform

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

Numbers = npt.NDArray[Any]
RESETTING = 2**13
"""Random streams of a task from which its trajectories take their seeds, one per rollout."""

_idle: dict[str, list[gymnasium.Env[Any, Any]]] = {}
"""Environments of this process that nobody acts in, by what made them: many are slow to make."""


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
        self._spaces  # noqa: B018  # refuses an environment that cannot be acted in

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
        """In the order of `ranges`, [B, P]."""
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
            # In gymnasium 1.1, a vector that is forgotten closes what it was made of.
            vector.closed = True
            _give_back(self.make, taken)

        return Vectorised(vector, keys, trajectories, self.horizon, like, give_back)

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "make": self.make, "ranges": self.ranges}

    @cached_property
    def _spaces(self) -> _Spaces:
        (one,) = _take(self.make, 1)
        spaces = _checked(one)
        _try_task(one, {name: low for name, (low, _) in self.ranges.items()})
        _give_back(self.make, [one])
        return spaces


@dataclass(frozen=True)
class _Spaces:
    """What an environment shows and takes."""

    observation: Any
    action: Any


class Vectorised:
    """Gymnasium's vector API as an `Environment`: B tasks x n trajectories, one environment each.

    A policy's [-1, 1] is the range of a bounded action, and what is beyond is clipped, as in the
    original code; an action without bounds is taken as it is.
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
        # 32 bits: the most that environments with numpy's older generator take.
        seeds = bits(self._keys, RESETTING + episode, self._shape[1]) >> np.uint64(32)
        observation, _ = self._vector.reset(seed=seeds.reshape(-1).tolist())  # type: ignore[arg-type]
        self._ended, self._time = np.zeros(self._vector.num_envs, dtype=bool), 0
        return self._tensor(observation)

    def step(self, action: Tensor) -> Step:
        actions = self._played(action.flatten(0, 1).cpu().numpy())
        observation, reward, ended, cut, _ = self._vector.step(actions)
        self._time += 1
        self._refuse_own_limit(cut & ~ended)
        self._ended |= ended
        at = torch.from_numpy(ended).to(self._like.device).reshape(self._shape)
        return Step(self._tensor(observation), self._tensor(reward)[..., 0], at)

    def _tensor(self, numbers: Numbers) -> Tensor:
        return as_tensor(numbers).to(self._like).reshape(*self._shape, -1)

    def _refuse_own_limit(self, cut: Numbers) -> None:
        """A time limit is no end, so that what follows would count; but gymnasium starts anew."""
        if self._time < self._horizon and (cut & ~self._ended).any():
            raise ValueError(
                f"task.horizon: {self._horizon} is more than the environment's own time limit: it "
                f"truncated an episode at time step {self._time}"
            )


def _played(space: Any) -> Callable[[Numbers], Numbers]:
    """What turns a policy's actions [N, ...] into those of an action space."""
    if not space.shape:
        return lambda action: action + space.start
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    middle, half = (high + low) / 2, (high - low) / 2
    return lambda action: np.clip(middle + half * action, space.low, space.high).astype(space.dtype)


def _take(make: str, count: int) -> list[gymnasium.Env[Any, Any]]:
    """Environments for the caller alone; tasks and seeds are to be set."""
    idle = _idle.setdefault(make, [])
    made = [_make(make) for _ in range(count - len(idle))]
    taken = [*made, *idle[:count]]
    del idle[:count]
    return taken


def _give_back(make: str, environments: list[gymnasium.Env[Any, Any]]) -> None:
    _idle[make] += environments


def _make(path: str) -> gymnasium.Env[Any, Any]:
    """Raises ValueError naming the setting."""
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError("kind: needs gymnasium: pip install -e '.[mujoco]'") from error
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"make: must look like my_module:MyEnvironment, got {path!r}")
    try:
        one = getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever a user's code raises is for the user to read
        raise ValueError(f"make: {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(one, gymnasium.Env):
        raise ValueError(f"make: {path} makes {type(one).__name__}, not a gymnasium.Env")
    return one


def _checked(one: gymnasium.Env[Any, Any]) -> _Spaces:
    """Its spaces. Raises ValueError where a policy cannot act in it or the task cannot be set."""
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
    one.get_wrapper_attr("set_task")(task)


def _try_task(one: gymnasium.Env[Any, Any], task: Mapping[str, float]) -> None:
    try:
        _set_task(one, task)
    except Exception as error:  # as above
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"ranges: set_task({task}) fails: {what}") from error
