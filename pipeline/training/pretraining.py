"""Transfer learning (section 4.1), the comparison that meta-learning must win.

One network is trained on all training tasks at once, without adaptation: on one output per training
class (or, in regression, on the examples of all tasks pooled), or with a head per training task on
one body. Then its parameters serve as θ: `inner` says how they are fine-tuned to a new task, and
the test protocol is the same as for meta-learned ones.

`Pretrainer` is the computation; `ray_train` runs it on the workers of Ray Train. The examples
of an update are cut into parts, whatever the workers: so the result does not depend on their
number, but for the order of additions.
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
from pipeline.maml.adaptation import matching
from pipeline.maml.parameters import Params
from pipeline.training.endings import Diverged
from pipeline.training.outer_update import OuterUpdate
from pipeline.worker.learner import initial_parameters
from tasks.base import supervised
from tasks.random import integers, task_keys

_WHICH = 2**16  # a random stream of its own: which of the tasks of multi-task an update sees


class Pretrainer:
    """Ordinary training, or one worker's share of it; `outer` says how, as for the meta-update."""

    def __init__(self, experiment: Experiment, device: torch.device):
        assert experiment.pretraining is not None
        self._experiment, self._settings = experiment, experiment.pretraining
        self._task = supervised(experiment.build_task(), "pretraining")
        self._device = device
        self._dtype: torch.dtype = getattr(torch, experiment.compute.dtype)
        self.model = wide_model(experiment).to(device, self._dtype)
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        self._update = OuterUpdate(params, experiment.outer)
        # The model looks into the memory that the optimiser updates.
        for name, value in self._update.theta.items():
            self.model.get_parameter(name).data = value
        self.iteration = 0
        """Completed updates."""
        self._bad_updates = 0

    @property
    def theta(self) -> Params:
        """The wide network's parameters."""
        return self._update.theta

    def run(
        self, until: int, forward: Callable[[Tensor], Tensor], rank: int = 0, size: int = 1
    ) -> dict[str, float]:
        """Train to iteration `until`, computing this worker's parts of every update.

        `forward` is the model, or what torch's DDP has made of it. Returns means per update of this
        worker's contributions to the metrics: summed over the workers, the metrics.
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
            norm = self._update.step(self._update.layout.join(gradients))
            self.iteration += 1
            self._guard(norm)
        return {name: float(total) / max(1, until - first) for name, total in sums.items()}

    def _accumulate(
        self, forward: Callable[[Tensor], Tensor], rank: int, size: int
    ) -> dict[str, Tensor]:
        """Gradients of this worker's parts, so scaled that DDP's mean over workers is the gradient
        of the mean over all examples; the parts' share of the metrics."""
        self.model.zero_grad(set_to_none=True)
        count, length = self._settings.batch_size, self._settings.part_size
        parts = [np.arange(first, min(first + length, count)) for first in range(0, count, length)]
        metrics: dict[str, Tensor] = {}
        mine = parts[rank::size]
        for part in mine:
            # Workers exchange gradients once per update.
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
        """Loss and metrics of the examples (of multi-task: of the tasks) with these numbers."""
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
        judged = [self._task.metrics(p.detach(), t) for p, t in zip(own, y, strict=True)]
        metrics = {name: torch.stack([m[name] for m in judged]).mean() for name in judged[0]}
        return torch.stack(losses).mean(), metrics

    def state(self) -> dict[str, Tensor]:
        """All that it takes to go on, on the CPU; with `iteration`."""
        return {name: value.cpu() for name, value in self._update.tensors().items()}

    def restore(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from a state; to be called once, before anything else."""
        placed = {name: value.to(self._device) for name, value in state.items()}
        self._update.restore(placed, {"steps": iteration})
        self.iteration = iteration

    def _guard(self, norm: float) -> None:
        """As in meta-training: a gradient that is not finite is not applied; many end the run."""
        self._bad_updates = 0 if math.isfinite(norm) else self._bad_updates + 1
        if self._bad_updates == self._experiment.outer.max_bad_updates:
            raise Diverged(
                f"iteration {self.iteration - 1}: the gradient is not finite, "
                f"{self._bad_updates} times in a row; lower outer.lr, or set outer.clip_norm"
            )


def wide_model(experiment: Experiment) -> nn.Module:
    """The experiment's model with an output for every training class, or a head for every task."""
    assert experiment.pretraining is not None
    task = supervised(experiment.build_task(), "pretraining")
    outputs = task.pooled_size
    if experiment.pretraining.objective == "multi-task":
        outputs = experiment.pretraining.tasks * task.output_size
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        task.input_shape,
        outputs,
        experiment.seed,
    )


def narrowed(experiment: Experiment, wide: Params) -> Params:
    """θ for new tasks: the body as it was trained. The head is the trained one where it fits, the
    mean of all heads after multi-task training, and a new one otherwise."""
    assert experiment.pretraining is not None
    theta = initial_parameters(experiment)
    several = experiment.pretraining.objective == "multi-task"
    head = set(matching(wide_model(experiment), ["head"], "pretraining")) if several else set()
    for name, new in theta.items():
        old = wide[name].detach().to("cpu", new.dtype)
        if name in head:
            theta[name] = old.view(experiment.pretraining.tasks, *new.shape).mean(0)
        elif old.shape == new.shape:
            theta[name] = old.clone()
    return theta


def check_pretraining(experiment: Experiment) -> None:
    """Raise what would only be met at the end, or in another process. Raises ValueError."""
    if experiment.pretraining is None:
        return
    if experiment.pretraining.objective == "pooled":
        supervised(experiment.build_task(), "pretraining").pooled(experiment.seed, np.arange(1))
    narrowed(experiment, dict(wide_model(experiment).named_parameters()))
