"""The loss of a task as a function of parameters: one definition for training and evaluation
(eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from pipeline.maml.flat_vector import Params
from tasks.base import Examples

Loss = Callable[[Params, Any], Tensor]
"""L_T of one task: (parameters, support or query of the task) -> scalar."""


class Support(Protocol):
    """The support of B tasks: examples (`tasks.base`), or the trajectories of each step
    (`pipeline.rl.rollouts`). A tree of tensors with leading dimension B."""

    def at_step(self, step: int, batch_size: int | None = None) -> Any:
        """The part of the support that step `step` (0, 1, ...) of adaptation uses.

        Where all steps use the same, every call must return the same object.
        """
        ...


class Batch(Protocol):
    """B tasks."""

    @property
    def support(self) -> Support: ...
    @property
    def query(self) -> Any: ...


def num_tasks(batch: Batch) -> int:
    """B, the number of tasks."""
    return int(pytree.tree_leaves(batch.query)[0].shape[0])


class TaskLoss(Protocol):
    """The two losses of a task, as pure functions of the parameters of a model."""

    def loss(self, params: Params, examples: Any) -> Tensor:
        """The loss that a step of adaptation descends, a scalar."""
        ...

    def loss_and_metrics(self, params: Params, examples: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The query loss of adapted parameters and every metric; scalars, metrics detached."""
        ...


class Criterion(Protocol):
    """The part of a task distribution that compares predictions with targets of one task."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor: ...
    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]: ...


class Objective:
    """L_T of a model under a task distribution's loss, as pure functions of the parameters."""

    def __init__(self, model: nn.Module, criterion: Criterion):
        """Raises ValueError for a model that has buffers or no parameters."""
        if names := [name for name, _ in model.named_buffers()]:
            raise ValueError(
                f"model: has buffers ({', '.join(names[:3])}), which adaptation would "
                "share between tasks; use batch statistics (track_running_stats=False), no buffers"
            )
        if not any(True for _ in model.parameters()):
            raise ValueError("model: has no parameters to adapt")
        self._model = model
        self._criterion = criterion

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """f_θ(x), [n, ...] -> [n, outputs]. Inputs and parameters must be on one device."""
        prediction: Tensor = functional_call(self._model, params, (x,))
        return prediction

    def loss(self, params: Params, examples: Examples) -> Tensor:
        """L_T(f_θ), the mean over the examples of one task (eq. 5, 6)."""
        return self._criterion.loss(self.predict(params, examples.x), examples.y)

    def loss_and_metrics(
        self, params: Params, examples: Examples
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same loss and every metric of one task; metrics are detached."""
        prediction = self.predict(params, examples.x)
        with torch.no_grad():
            metrics = self._criterion.metrics(prediction.detach(), examples.y)
        return self._criterion.loss(prediction, examples.y), metrics
