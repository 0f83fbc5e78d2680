"""Transfer learning (section 4.1): the baseline that meta-learning must beat.

One network learns all training tasks at once, without adaptation. Its objective is one of two:

    pooled       one output per training class; in regression, the examples of all tasks pooled
    multi-task   one body, with a head for every training task

Then its parameters serve as θ: `inner` says how they are fine-tuned to a new task, and the
meta-test is the same as for meta-learned parameters.

`Pretrainer` computes; `ray_train` runs it on the workers of Ray Train. The examples of an update
are cut into parts of `part_size`, whatever the number of workers: only the order of additions
depends on it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.components import build_model
from pipeline.config.experiment import Experiment
from pipeline.config.settings import Pretraining
from pipeline.maml.adaptation import matching
from pipeline.maml.flat_vector import Params
from pipeline.training.endings import Diverged
from pipeline.training.outer_optimizer import OuterOptimizer
from pipeline.worker.learner import initial_parameters
from tasks.base import supervised
from tasks.random import integers, task_keys

_WHICH = 2**16  # random stream: which of the tasks of multi-task an update sees


class Pretrainer:
    """Ordinary training, or one worker's share of it, with the optimiser that `outer` describes.

    Raises ValueError for tasks that are not supervised.
    """

    def __init__(self, experiment: Experiment, settings: Pretraining, device: torch.device):
        self._experiment, self._settings = experiment, settings
        self._task = supervised(experiment.build_task(), "pretraining")
        self._device = device
        self._dtype: torch.dtype = getattr(torch, experiment.compute.dtype)
        self.model = wide_model(experiment, settings).to(device, self._dtype)
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        self._optimizer = OuterOptimizer(params, experiment.outer)
        # The model's parameters are views of the memory that the optimiser updates.
        for name, value in self._optimizer.theta.items():
            self.model.get_parameter(name).data = value
        self.iteration = 0
        """Completed updates."""
        self._bad_updates = 0

    @property
    def theta(self) -> Params:
        """The wide network's parameters by name: views."""
        return self._optimizer.theta

    @property
    def next_report(self) -> int:
        """The iteration of the next report: a multiple of `report_every`, or the last one."""
        every = self._settings.report_every
        return min(self._experiment.outer.iterations, (self.iteration // every + 1) * every)

    def run(
        self, until: int, forward: Callable[[Tensor], Tensor], rank: int = 0, size: int = 1
    ) -> dict[str, float]:
        """Train to iteration `until`; worker `rank` of `size` computes its parts of every update.

        `forward` is the model, or the model wrapped by torch's DistributedDataParallel. Returns
        this worker's contributions to the metrics, as means per update; their sum over the workers
        is the metric. Raises Diverged.
        """
        sums: dict[str, Tensor] = {}
        first = self.iteration
        while self.iteration < until:
            for name, value in self._accumulate(forward, rank, size).items():
                sums[name] = sums[name] + value if name in sums else value
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in self.model.named_parameters()
            }
            norm = self._optimizer.step(self._optimizer.layout.join(gradients))
            self.iteration += 1
            self._guard(norm)
        return {name: float(total) / max(1, until - first) for name, total in sums.items()}

    def _accumulate(
        self, forward: Callable[[Tensor], Tensor], rank: int, size: int
    ) -> dict[str, Tensor]:
        """Add up the gradients of this worker's parts; return the parts' share of the metrics.

        DDP averages gradients over the workers. The loss is scaled by `size`, so that this average
        is the gradient of the mean over all examples.
        """
        self.model.zero_grad(set_to_none=True)
        count, length = self._settings.batch_size, self._settings.part_size
        parts = [np.arange(first, min(first + length, count)) for first in range(0, count, length)]
        metrics: dict[str, Tensor] = {}
        mine = parts[rank::size]
        for part in mine:
            # Workers exchange gradients after their last part only: once per update.
            quiet = isinstance(forward, DistributedDataParallel) and part is not mine[-1]
            with forward.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[attr-defined]
                loss, found = self.loss_of(part + self.iteration * count, forward)
                share = len(part) / count
                (size * share * loss).backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": loss.detach(), **found}.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + share * value
        return metrics

    def loss_of(
        self, numbers: Any, forward: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss and metrics (scalars) of the examples with these numbers; multi-task: tasks."""
        seed, settings = self._experiment.seed, self._settings
        if settings.objective == "pooled":
            x, y = self._task.pooled(seed, numbers)
            y = y.to(self._device, self._dtype if y.is_floating_point() else y.dtype)
            prediction = forward(x.to(self._device, self._dtype))
            return self._task.loss(prediction, y), self._task.metrics(prediction.detach(), y)
        keys = task_keys(seed, "train", numbers)
        which = integers(keys, _WHICH, 1, settings.tasks)[:, 0]
        batch = self._task.sample(seed, "train", which).to(self._device, self._dtype)
        x, y = (torch.cat([s, q], dim=1) for s, q in zip(batch.support, batch.query, strict=True))
        prediction = forward(x.flatten(0, 1))
        heads = prediction.view(len(which), x.shape[1], settings.tasks, -1)
        own = [heads[i, :, head] for i, head in enumerate(which)]
        losses = [self._task.loss(p, t) for p, t in zip(own, y, strict=True)]
        by_task = [self._task.metrics(p.detach(), t) for p, t in zip(own, y, strict=True)]
        metrics = {name: torch.stack([m[name] for m in by_task]).mean() for name in by_task[0]}
        return torch.stack(losses).mean(), metrics

    def state(self) -> dict[str, Tensor]:
        """The tensors from which training continues, on the CPU; `iteration` belongs to them."""
        return {name: value.cpu() for name, value in self._optimizer.tensors().items()}

    def restore(self, state: dict[str, Tensor], iteration: int) -> None:
        """Continue from a `state` taken at `iteration`; call it once, before anything else."""
        placed = {name: value.to(self._device) for name, value in state.items()}
        self._optimizer.restore(placed, {"steps": iteration})
        self.iteration = iteration

    def _guard(self, norm: float) -> None:
        """Raise Diverged after `outer.max_bad_updates` gradients in a row that were not finite."""
        self._bad_updates = 0 if math.isfinite(norm) else self._bad_updates + 1
        if self._bad_updates == self._experiment.outer.max_bad_updates:
            raise Diverged(
                f"iteration {self.iteration - 1}: the gradient is not finite, "
                f"{self._bad_updates} times in a row; lower outer.lr, or set outer.clip_norm"
            )


def wide_model(experiment: Experiment, settings: Pretraining) -> nn.Module:
    """The experiment's model with an output for every training class, or a head for every task."""
    task = supervised(experiment.build_task(), "pretraining")
    outputs = task.pooled_size
    if settings.objective == "multi-task":
        outputs = settings.tasks * task.output_size
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        task.input_shape,
        outputs,
        experiment.seed,
    )


def narrowed(experiment: Experiment, settings: Pretraining, wide: Params) -> Params:
    """Make θ for new tasks, on the CPU, from the parameters of the wide network.

    The body stays as it was trained. The head is the mean of all heads after multi-task training,
    else the trained one where its shape fits, else a new one.
    """
    theta = initial_parameters(experiment)
    head: set[str] = set()
    if settings.objective == "multi-task":
        head |= set(matching(wide_model(experiment, settings), ["head"], "pretraining"))
    for name, new in theta.items():
        old = wide[name].detach().to("cpu", new.dtype)
        if name in head:
            theta[name] = old.view(settings.tasks, *new.shape).mean(0)
        elif old.shape == new.shape:
            theta[name] = old.clone()
    return theta


def check_pretraining(experiment: Experiment, settings: Pretraining) -> None:
    """Raise ValueError before the start for what would otherwise fail at the end or on a worker."""
    if settings.objective == "pooled":
        supervised(experiment.build_task(), "pretraining").pooled(experiment.seed, np.arange(1))
    narrowed(experiment, settings, dict(wide_model(experiment, settings).named_parameters()))
