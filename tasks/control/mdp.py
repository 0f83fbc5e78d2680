"""Tasks that are Markov decision processes: T = {initial states, transitions, reward, H} (eq. 1).

A task is known by a few numbers (a goal, a velocity); it is a pure function of (seed, split,
index), as supervised tasks are. What it is learned from cannot be sampled in advance: trajectories
come about by acting. So an `Environment` runs B tasks x n trajectories at once, and
`pipeline.experience` acts in it.

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
"""Random streams of a task from which its trajectories take their actions, one per rollout."""


class Step(NamedTuple):
    """What comes of an action, for all trajectories at once."""

    observation: Tensor
    """[B, n, O]"""
    reward: Tensor
    """[B, n]"""
    ended: Tensor
    """[B, n], bool: the episode reached a terminal state. Reaching the horizon is not one."""


class Environment(Protocol):
    """B tasks x n trajectories, all at the same time step.

    A trajectory whose episode has ended goes on in whatever way is convenient: what it does is
    masked. Random numbers belong to the tasks (`tasks.random`), so that a trajectory is the same
    whoever runs it.
    """

    def reset(self, episode: int) -> Tensor:
        """The first observations of the trajectories with this number, [B, n, O]."""
        ...

    def step(self, action: Tensor) -> Step:
        """Act: [B, n, A] where actions are continuous, [B, n] integers where they are discrete."""
        ...

    def close(self) -> None:
        """Give back what was taken."""
        ...


class KnownEnvironment(Environment, Protocol):
    """An environment of tasks whose best actions are known (`MDPs.has_expert`)."""

    def expert_action(self) -> Tensor:
        """What one who knows the tasks would do now."""
        ...


class MDPs(TaskDistribution, ABC):
    """p(T) over Markov decision processes. Subclass it as `@dataclass(frozen=True, kw_only=True)`.

    Subclasses have the settings `trajectories` (per task and step of adaptation: the shots of
    reinforcement learning) and `horizon`.
    """

    trajectories: int
    horizon: int
    actions: Actions = "continuous"
    num_actions: int
    """Dimensions of a continuous action, or number of discrete ones."""
    has_expert: ClassVar[bool] = False
    """Whether its environments know the best actions: are a `KnownEnvironment`."""
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
        """Where these tasks are acted out.

        `parameters` [B, P] of the tasks; `keys` [B] for the random numbers that it needs; tensors
        are to be on the device and in the precision of `like`.
        """

    def positions(self, past: Trajectories) -> Tensor | None:
        """Where on a plane a task's trajectories lead, [n, H + 1, 2]: where each time step began,
        and where the last one ended. None where there is no plane.

        The first two parameters of tasks on a plane are the goal.
        """
        return None

    over_time: ClassVar[str] = "return so far"
    """What `course` is, for an axis."""

    def course(self, past: Trajectories) -> Tensor:
        """How a task's trajectories went, as a number by time step, [n, H]: what is drawn of tasks
        without a plane."""
        return past.rewards.cumsum(-1)

    def describe(self, parameters: Sequence[float]) -> str:
        """The task that these numbers make, in a few words."""
        return f"task {', '.join(f'{number:.2g}' for number in parameters)}"

    def check_sizes(self) -> None:
        """For `__post_init__`: raises ValueError naming the setting."""
        at_least("trajectories", self.trajectories, 1)
        at_least("horizon", self.horizon, 1)

    def protocol(self) -> dict[str, Any]:
        return {"trajectories": self.trajectories, "horizon": self.horizon}


class Trajectories(NamedTuple):
    """What happened: one record of n trajectories of a task, or of B tasks (leading dimension B).

    Where an episode ended early, what follows is masked, whatever it holds.
    """

    observations: Tensor
    """[n, H, O]"""
    actions: Tensor
    """[n, H, A], or [n, H] integers"""
    predictions: Tensor
    """The policy's outputs when it acted, [n, H, output_size]."""
    log_probabilities: Tensor
    """Of the actions when they were taken, [n, H]; summed over the dimensions of an action."""
    rewards: Tensor
    """[n, H]"""
    mask: Tensor
    """1 where the episode was still going on, else 0, [n, H]."""
    task: Tensor
    """The numbers that make the task, [P]."""

    @property
    def returns(self) -> Tensor:
        """Undiscounted sum of each trajectory's rewards, [n]."""
        return (self.rewards * self.mask).sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Time steps of each trajectory, [n]."""
        return self.mask.sum(-1)


def masked(trajectories: Trajectories) -> Trajectories:
    """The same with zeros in what does not count: what is not a number there must not reach a
    product with the mask."""
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
    """Mask [.., H] from the ends [.., H] (bool): the step that ends an episode still counts."""
    before = torch.cumsum(ended.to(torch.int64), -1) - ended.to(torch.int64)
    return before == 0
