"""Supervised tasks as a worker knows them: support and query sets, sampled whenever it suits."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import vmap

from pipeline.config.experiment import Experiment
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.learning_curve import adaptation_curve
from pipeline.maml.meta_loss import Objective
from pipeline.maml.parameters import Params
from pipeline.maml.representations import head_inputs, nearest_centroid
from pipeline.worker.jobs import Cut, Judged
from pipeline.worker.task_source import EVALUATION_SEED, Indices, Taken, Variants
from pipeline.worker.task_supply import TaskSupply
from tasks.base import Examples, Supervised, TaskBatch


class SupervisedDomain:
    """A `Domain`."""

    def __init__(
        self,
        experiment: Experiment,
        task: Supervised,
        model: nn.Module,
        adaptation: Adaptation,
        alpha: Tensor,
        cut: Cut,
    ):
        """Tasks are computed where `alpha`, the inner rate, is."""
        self.objective = Objective(model, task)
        self._kind = experiment.task.kind
        self._task, self._variants = task, Variants(experiment, task)
        self._model, self._adaptation, self._alpha = model, adaptation, alpha
        self._place = partial(TaskBatch.to, device=alpha.device, dtype=alpha.dtype)
        self._supply = TaskSupply(
            task, experiment.seed, cut, experiment.outer.iterations, self._place
        )
        self.prepare_ahead = self._supply.prepare_ahead

    def take(self, theta: Params, iteration: int, chunk: int) -> Taken:
        return Taken(self._supply.take(iteration, chunk), {})

    def held_out(self, split: str, indices: Indices) -> TaskBatch:
        """Tasks of a split."""
        return self._place(self._task.sample(EVALUATION_SEED, split, indices))

    def examine(
        self,
        theta: Params,
        split: str,
        indices: Indices,
        steps: tuple[int, ...],
        changes: dict[str, Any],
        judged: Judged,
    ) -> dict[str, Tensor]:
        task = self._variants.of(changes)
        batch = self._place(task.sample(EVALUATION_SEED, split, indices))
        if judged == "oracle":
            prediction = task.oracle(batch)
            if prediction is None:
                raise ValueError(f"evaluation.baselines: {self._kind} tasks have no oracle")
            return _unadapted(task, batch, prediction, steps)
        if judged == "nearest centroid":
            scores = self._nearest_centroids(task, theta, batch)
            metrics = _unadapted(task, batch, scores, steps)
            del metrics["loss"]  # scores are cosines: their cross-entropy says nothing
            return metrics
        objective = Objective(self._model, task)
        return adaptation_curve(objective, self._adaptation, theta, batch, self._alpha, steps=steps)

    def _nearest_centroids(self, task: Supervised, theta: Params, batch: TaskBatch) -> Tensor:
        """Scores of every task's queries from the features that the head sees, [B, m, N]."""
        params = {**self._adaptation.slow(theta, 0), **self._adaptation.start(theta)}

        def one(support: Examples, query: Examples) -> Tensor:
            of_support, of_query = (
                head_inputs(self._model, params, part.x) for part in (support, query)
            )
            return nearest_centroid(of_support, support.y, of_query, task.output_size)

        return vmap(one)(batch.support, batch.query)


def _unadapted(
    task: Supervised, batch: TaskBatch, predictions: Tensor, steps: tuple[int, ...]
) -> dict[str, Tensor]:
    """Metrics of predictions that no step of adaptation changes, [len(steps), B]."""

    def one(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": task.loss(prediction, target), **task.metrics(prediction, target)}

    metrics = vmap(one)(predictions, batch.query.y)
    return {name: value.expand(len(steps), -1) for name, value in metrics.items()}
