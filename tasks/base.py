"""Interfaces of task distributions p(T), and the batches of tasks drawn from them (eq. 1).

A supervised task is a support set to adapt on and a query set to be judged by; its horizon H is 1.
`tasks.control.mdp` has the tasks of reinforcement learning. The pipeline knows tasks only through
`TaskDistribution`, the shipped ones and a user's own alike.

Shapes: B tasks, n support examples and m query examples per task (n = N·K, m = N·Q for N-way
classification with K shots and Q queries per class).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.random import integers, task_keys

SPLITS = ("train", "validation", "test")
_WHICH_EXAMPLE = 2**15  # random stream of `Regression.pooled`; no task uses it


class Examples(NamedTuple):
    """Inputs and targets of one task, [n, ...], or of B tasks, [B, n, ...]."""

    x: Tensor
    y: Tensor

    def at_step(self, step: int, batch_size: int | None = None) -> "Examples":
        """The examples for a step of adaptation, [B, n, ...] -> [B, batch_size, ...].

        Successive steps take the examples in turns; all of them where `batch_size` is None or not
        smaller than n.
        """
        available = self.x.shape[1]
        if batch_size is None or batch_size >= available:
            return self
        first = step * batch_size % available
        beyond = max(first + batch_size - available, 0)  # the turn goes on at the first example

        def in_turn(values: Tensor) -> Tensor:
            return torch.cat([values[:, first : first + batch_size], values[:, :beyond]], 1)

        return Examples(in_turn(self.x), in_turn(self.y))


class TaskBatch(NamedTuple):
    """B tasks at once: every tensor has the leading dimension B."""

    support: Examples
    query: Examples

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TaskBatch":
        """The same tasks on a device, in the precision of the model; labels stay integers."""

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        return TaskBatch(*(Examples(place(part.x), place(part.y)) for part in self))

    def select(self, which: slice) -> "TaskBatch":
        """Some of the tasks, as views."""
        return TaskBatch(*(Examples(part.x[which], part.y[which]) for part in self))


class TaskDistribution(ABC):
    """A distribution p(T) over tasks. Subclass it as `@dataclass(frozen=True, kw_only=True)`.

    The constructor's keyword parameters are the settings of the `task:` section of an experiment:
    they are checked against their type annotations, and a ValueError raised in `__post_init__`
    that begins with the name of the parameter is reported as an error of that field.
    A parameter named `data_root` receives the configuration's `data.root`.
    """

    input_shape: tuple[int, ...]
    """Shape of one example's input, without batch dimensions."""
    output_size: int
    """Number of outputs that the model must have: classes, or dimensions of the target."""
    primary_metric: ClassVar[str] = "loss"
    """The metric by which checkpoints are chosen; 'loss' or a key of `metrics`."""
    higher_is_better: ClassVar[bool] = False
    loss_name: ClassVar[str] = "loss"
    """What the loss is called in tables and plots."""
    has_classes: ClassVar[bool] = False
    """Whether targets are class labels 0 .. output_size - 1."""

    def has_oracle(self, split: str) -> bool:
        """Whether somebody who knows the tasks of the split can solve them: the oracle baseline."""
        return False

    def check(self, split: str) -> None:  # noqa: B027  # not abstract: most tasks need no check
        """Raise ValueError or an error of the data where tasks of this split cannot be sampled.

        Called before a run starts, so that it does not end after hours in its first validation.
        """

    def protocol(self) -> dict[str, Any]:
        """What a reader must know to compare numbers measured on these tasks, as plain values."""
        return {}


class Supervised(TaskDistribution):
    """Tasks whose examples can be sampled: they do not depend on the learner."""

    @abstractmethod
    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        """The tasks with these indices, as CPU tensors with leading dimension B = len(indices).

        Must be pure: each task depends on (seed, split, its own index) and on nothing else - not on
        its neighbours in `indices`, nor on any random state. `tasks.random` has what is needed.
        """

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss L_T of one task: the *mean* over its examples, a scalar."""

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Further scalars of one task worth reporting, by name (means over its examples)."""
        return {}

    @property
    def pooled_size(self) -> int:
        """Number of outputs of one network that learns all training tasks at once (pretraining)."""
        return self.output_size

    def pooled(self, seed: int, indices: npt.NDArray[np.int64]) -> Examples:
        """The training examples with these numbers for ordinary supervised learning, without tasks.

        Inputs [n, ...] and targets [n, ...] for one network with `pooled_size` outputs. Pure, as
        `sample` is. Raises ValueError where the tasks have no common targets.
        """
        raise ValueError(
            f"pretraining: {type(self).__name__} tasks have no common targets (no method `pooled`)"
        )

    def oracle(self, batch: TaskBatch) -> Tensor | None:
        """The best predictions for `batch.query.x`, knowing the tasks; None if unknown."""
        return None

    def has_oracle(self, split: str) -> bool:
        return self.oracle(self.sample(0, split, np.arange(1))) is not None


class Regression(Supervised):
    """Tasks judged by the squared error (eq. 5, but a mean, so that rates do not depend on K)."""

    loss_name: ClassVar[str] = "MSE"

    def pooled(self, seed: int, indices: npt.NDArray[np.int64]) -> Examples:
        """One random query example of each of the training tasks with these indices."""
        query = self.sample(seed, "train", indices).query
        keys = task_keys(seed, "train", indices)
        which = as_tensor(integers(keys, _WHICH_EXAMPLE, 1, query.x.shape[1])[:, 0])
        tasks = torch.arange(len(which))
        return Examples(query.x[tasks, which], query.y[tasks, which])

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)


class Classification(Supervised):
    """Tasks judged by the mean cross-entropy (eq. 6) and by accuracy."""

    has_classes: ClassVar[bool] = True
    primary_metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    loss_name: ClassVar[str] = "cross-entropy"

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (prediction.argmax(-1) == target).to(prediction.dtype).mean()}


def supervised(task: TaskDistribution, what: str) -> Supervised:
    """Return `task` if it is supervised; else raise ValueError, saying that `what` needs it."""
    if not isinstance(task, Supervised):
        raise ValueError(f"task.kind: {what} needs supervised tasks, not {type(task).__name__}")
    return task


_LARGEST = 1_000_000  # more than any size of tasks that fits into memory


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise ValueError unless minimum <= value <= 1,000,000; the configuration reports it for field
    `name`."""
    if not value >= minimum:
        raise ValueError(f"{name}: must be at least {minimum}, got {value}")
    if value > _LARGEST:
        raise ValueError(f"{name}: must be at most {_LARGEST:,}, got {value}")


def ascending(name: str, bounds: tuple[float, float]) -> None:
    """Raise ValueError unless `bounds` is (low, high) with low < high."""
    if not bounds[0] < bounds[1]:
        raise ValueError(f"{name}: must be [low, high] with low < high, got {list(bounds)}")


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """The array as a CPU tensor of the same precision; `TaskBatch.to` casts it later."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
