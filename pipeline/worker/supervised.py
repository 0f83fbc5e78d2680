"""Supervised tasks as a worker knows them: support and query sets, which can be sampled ahead."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from pipeline.config.phases import phase_at
from pipeline.maml.adaptation_curve import adaptation_curve
from pipeline.maml.diagnostics import diagnose
from pipeline.maml.flat_vector import Params
from pipeline.maml.meta_loss import Objective
from pipeline.maml.representations import head_inputs, nearest_centroid
from pipeline.worker.jobs import Cut, DiagnosisJob, EvaluationJob
from pipeline.worker.learner import Learner
from pipeline.worker.task_source import (
    EVALUATION_SEED,
    Answer,
    Indices,
    TaskSource,
    TrainingChunk,
    Variants,
)
from pipeline.worker.task_supply import TaskSupply
from tasks.base import Examples, Supervised, TaskBatch


class SupervisedTasks(TaskSource):
    """Tasks whose examples are sampled."""

    def __init__(self, learner: Learner, task: Supervised, cut: Cut):
        super().__init__(learner)
        self.jobs[DiagnosisJob] = self._diagnosis
        experiment, alpha = learner.experiment, learner.alpha
        self.objective = Objective(learner.model, task)
        self._task, self._variants = task, Variants(experiment, task)
        self._place = partial(TaskBatch.to, device=alpha.device, dtype=alpha.dtype)
        self._supply = TaskSupply(
            task, experiment.seed, cut, experiment.outer.iterations, self._place
        )

    def training_chunk(self, theta: Params, iteration: int, chunk: int) -> TrainingChunk:
        return TrainingChunk(self._supply.take(iteration, chunk), {})

    def prepare_ahead(self) -> bool:
        return self._supply.prepare_ahead()

    def held_out(self, split: str, indices: Indices) -> TaskBatch:
        """The validation or test tasks with these indices."""
        return self._place(self._task.sample(EVALUATION_SEED, split, indices))

    def evaluate(self, theta: Params, job: EvaluationJob) -> dict[str, Tensor]:
        """Raises ValueError where an oracle is asked for and the tasks have none."""
        task = self._variants.of(job.changes)
        indices = np.arange(job.first, job.first + job.count)
        batch = self._place(task.sample(EVALUATION_SEED, job.split, indices))
        if job.evaluated == "oracle":
            prediction = task.oracle(batch)
            if prediction is None:
                kind = self.learner.experiment.task.kind
                raise ValueError(f"evaluation.baselines: {kind} tasks have no oracle")
            return _unadapted(task, batch, prediction, job.steps)
        if job.evaluated == "nearest centroid":
            scores = self._nearest_centroids(task, theta, batch)
            metrics = _unadapted(task, batch, scores, job.steps)
            del metrics["loss"]  # scores are cosines: their cross-entropy says nothing
            return metrics
        learner = self.learner
        objective = Objective(learner.model, task)
        return adaptation_curve(
            objective, learner.adaptation, theta, batch, learner.alpha, steps=job.steps
        )

    def _diagnosis(self, theta: Params, job: DiagnosisJob) -> Answer:
        """`diagnostics.diagnose` on validation tasks."""
        learner = self.learner
        phase = phase_at(learner.experiment, job.iteration)
        found = diagnose(
            self.objective,
            learner.adaptation,
            theta,
            self.held_out("validation", np.arange(job.first, job.first + job.count)),
            learner.knobs(phase, job.iteration),
            order="second" if phase.second_order else "first",
            direction=learner.experiment.outer.direction,
        )
        if found.second is None or found.first is None:
            return Answer(job.count, found.metrics)
        both = torch.stack([learner.layout.join(g) for g in (found.second, found.first)])
        return Answer(job.count, found.metrics, both)

    def _nearest_centroids(self, task: Supervised, theta: Params, batch: TaskBatch) -> Tensor:
        """Scores of every task's queries from the features that the head sees, [B, m, N]."""
        adaptation, model = self.learner.adaptation, self.learner.model
        params = {**adaptation.slow(theta, 0), **adaptation.start(theta)}

        def one(support: Examples, query: Examples) -> Tensor:
            of_support, of_query = (head_inputs(model, params, part.x) for part in (support, query))
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
