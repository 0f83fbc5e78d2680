"""Tasks that are Markov decision processes: T = {initial states, transitions, reward, H} (eq. 1).

A few numbers make a task (a goal, a velocity). They are a pure function of (seed, split, index), as
supervised tasks are. Its trajectories cannot be sampled in advance, because they depend on the
policy: an `Environment` runs B tasks x n trajectories at once, and `pipeline.rl.rollouts` acts in
it.

Shapes: B tasks, n trajectories per task, horizon H, O observed numbers, A dimensions of actions,
P numbers that make a task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.base import TaskDistribution, at_least
from tasks.random import UInt64

Actions = Literal["continuous", "discrete"]
ACTING = 2**14
"""First of the random streams from which a task's actions are drawn; one stream per rollout."""


class Transition(NamedTuple):
    """The result of an action, for all trajectories at once."""

    observation: Tensor
    """[B, n, O]"""
    reward: Tensor
    """[B, n]"""
    ended: Tensor
    """[B, n], bool: the episode reached a terminal state. Reaching the horizon is not one."""


class Environment(Protocol):
    """B tasks x n trajectories, all at the same time step.

    After the end of its episode a trajectory may go on in any way: what follows is masked. Random
    numbers belong to the tasks (`tasks.random`), so that a trajectory does not depend on the worker
    that runs it.
    """

    def reset(self, episode: int) -> Tensor:
        """Start the trajectories of rollout `episode`; return the first observations, [B, n, O]."""
        ...

    def step(self, action: Tensor) -> Transition:
        """Act: [B, n, A] where actions are continuous, [B, n] integers where they are discrete."""
        ...

    def close(self) -> None:
        """Release what the environment holds."""
        ...


class KnownEnvironment(Environment, Protocol):
    """An environment that knows the best actions (`MDPs.has_expert`)."""

    def expert_action(self) -> Tensor:
        """The best action in the present state, as `step` takes it."""
        ...


class MDPs(TaskDistribution, ABC):
    """A distribution over Markov decision processes; subclass it as TaskDistribution says.

    Subclasses have the settings `trajectories` (per task and step of adaptation: the shots of
    reinforcement learning) and `horizon`.
    """

    trajectories: int
    horizon: int
    actions: Actions = "continuous"
    num_actions: int
    """Dimensions of a continuous action, or number of discrete ones."""
    has_expert: ClassVar[bool] = False
    """Whether `environment` returns a `KnownEnvironment`."""
    primary_metric: ClassVar[str] = "return"
    higher_is_better: ClassVar[bool] = True
    loss_name: ClassVar[str] = "surrogate loss"

    @property
    def output_size(self) -> int:  # type: ignore[override]
        """Outputs of a policy: mean and log standard deviation, or a score per action."""
        return 2 * self.num_actions if self.actions == "continuous" else self.num_actions

    def has_oracle(self, split: str) -> bool:
        return self.has_expert

    @abstractmethod
    def parameters(self, keys: UInt64) -> npt.NDArray[np.float64]:
        """The numbers that make the tasks with these keys (`tasks.random.task_keys`), [B, P]."""

    @abstractmethod
    def environment(
        self, parameters: Tensor, keys: UInt64, trajectories: int, like: Tensor
    ) -> Environment:
        """An environment that runs `trajectories` trajectories of each of B tasks.

        `parameters` [B, P] make the tasks, `keys` [B] give the random numbers. The environment's
        tensors have the device and the precision of `like`.
        """

    def positions(self, past: Trajectories) -> Tensor | None:
        """The positions of a task's trajectories on a plane, [n, H + 1, 2]: at the start of each
        time step, and at the end of the last one. None for tasks without a plane.

        On a plane, the first two parameters of a task are its goal.
        """
        return None

    over_time: ClassVar[str] = "return so far"
    """The name of what `course` returns, for an axis."""

    def course(self, past: Trajectories) -> Tensor:
        """One number per time step of the trajectories, [n, H], to draw tasks without a plane."""
        return past.rewards.cumsum(-1)

    def describe(self, parameters: Sequence[float]) -> str:
        """The task with these parameters, in a few words."""
        return f"task {', '.join(f'{number:.2g}' for number in parameters)}"

    def check_sizes(self) -> None:
        """Check `trajectories` and `horizon`, for `__post_init__`. Raises ValueError."""
        at_least("trajectories", self.trajectories, 1)
        at_least("horizon", self.horizon, 1)

    def protocol(self) -> dict[str, Any]:
        return {"trajectories": self.trajectories, "horizon": self.horizon}


def mdps(task: TaskDistribution, what: str) -> MDPs:
    """Return `task` if it is a distribution over Markov decision processes; else raise ValueError,
    saying that `what` needs one."""
    if not isinstance(task, MDPs):
        raise ValueError(
            f"task.kind: {what} needs reinforcement learning tasks, not {type(task).__name__}"
        )
    return task


class Trajectories(NamedTuple):
    """A record of n trajectories of one task, or of B tasks with a leading dimension B.

    After the end of an episode the entries mean nothing, and the mask is 0.
    """

    observations: Tensor
    """[n, H, O]"""
    actions: Tensor
    """[n, H, A], or [n, H] integers"""
    predictions: Tensor
    """The policy's outputs when it acted, [n, H, output_size]."""
    log_probabilities: Tensor
    """Log-probabilities of the actions when they were taken, summed over dimensions, [n, H]."""
    rewards: Tensor
    """[n, H]"""
    mask: Tensor
    """1 until the end of the episode, 0 after it, [n, H]."""
    task: Tensor
    """The parameters of the task, [P]."""

    @property
    def returns(self) -> Tensor:
        """Undiscounted sum of each trajectory's rewards, [n]."""
        return (self.rewards * self.mask).sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Time steps of each trajectory, [n]."""
        return self.mask.sum(-1)


def masked(trajectories: Trajectories) -> Trajectories:
    """The trajectories with zeros after the ends of episodes.

    A NaN there would survive a product with the mask, because NaN · 0 is NaN.
    """
    valid = trajectories.mask > 0

    def clean(values: Tensor) -> Tensor:
        where = valid if values.dim() == valid.dim() else valid[..., None]
        return torch.where(where, values, torch.zeros_like(values))

    observations, actions, predictions, log_probabilities, rewards, mask, task = trajectories
    return Trajectories(
        clean(observations),
        clean(actions),
        clean(predictions),
        clean(log_probabilities),
        clean(rewards),
        mask,
        task,
    )


def still_going(ended: Tensor) -> Tensor:
    """The mask [..., H] for the ends [..., H] (bool); the step that ends an episode counts."""
    before = torch.cumsum(ended.to(torch.int64), -1) - ended.to(torch.int64)
    return before == 0
