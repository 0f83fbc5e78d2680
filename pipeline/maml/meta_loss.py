"""What a task's parameters are judged by: one definition for training and evaluation (eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.maml.parameters import Params
from tasks.base import Examples

Loss = Callable[[Params, Any], Tensor]
"""L_T of one task: (parameters, what the task gives to learn from) -> scalar."""


class Support(Protocol):
    """What B tasks give to learn from: examples (`tasks.base`), or the trajectories of each step
    (`rollouts`). A tree of tensors with leading dimension B."""

    def at_step(self, step: int, batch_size: int | None = None) -> Any:
        """What a step of adaptation sees of it; the same object where steps see the same."""
        ...


class Batch(Protocol):
    """B tasks."""

    @property
    def support(self) -> Support: ...
    @property
    def query(self) -> Any: ...


class TaskLoss(Protocol):
    """The two losses of a task, as pure functions of the parameters of a model."""

    def loss(self, params: Params, examples: Any) -> Tensor:
        """What a step of adaptation descends."""
        ...

    def loss_and_metrics(self, params: Params, examples: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What adapted parameters are judged by, and every metric, detached."""
        ...


class Criterion(Protocol):
    """The part of a task distribution that compares predictions with targets."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor: ...
    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]: ...


class Objective:
    """L_T of a model under a task distribution's loss, as pure functions of the parameters."""

    def __init__(self, model: nn.Module, criterion: Criterion):
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
        """f_θ(x)."""
        prediction: Tensor = functional_call(self._model, params, (x,))
        return prediction

    def loss(self, params: Params, examples: Examples) -> Tensor:
        """L_T(f_θ), the mean over the examples of one task."""
        return self._criterion.loss(self.predict(params, examples.x), examples.y)

    def loss_and_metrics(
        self, params: Params, examples: Examples
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and every metric of one task, metrics detached."""
        prediction = self.predict(params, examples.x)
        with torch.no_grad():
            metrics = self._criterion.metrics(prediction.detach(), examples.y)
        return self._criterion.loss(prediction, examples.y), metrics
