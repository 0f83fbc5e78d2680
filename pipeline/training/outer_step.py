"""Chooses how the meta-gradient of an iteration moves θ.

OptimizerStep   one step of `outer.optimizer` (eq. 4)                    supervised tasks
PolicyStep      TRPO, ProMP or one gradient step, see `trust_region`     reinforcement learning
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from pipeline.cluster.group import WorkerGroup
from pipeline.cluster.rounds import Total
from pipeline.config.experiment import Experiment
from pipeline.config.settings import Reinforcement
from pipeline.evaluation.health import why_not_finite
from pipeline.maml.flat_vector import FlatVector
from pipeline.training.aggregation import Aggregate
from pipeline.training.outer_optimizer import OuterOptimizer
from pipeline.training.trust_region import Questions, policy_update, usual_questions
from pipeline.worker.jobs import ChunkJob
from pipeline.worker.tree import Span


class MetaBatch(NamedTuple):
    """The meta-batch of an iteration, and the workers that know its tasks."""

    iteration: int
    num_chunks: int
    workers: WorkerGroup


class OuterStep(Protocol):
    """A way to move θ."""

    def move(
        self, optimizer: OuterOptimizer, mean: Aggregate, batch: MetaBatch
    ) -> dict[str, float]:
        """Move θ, which `optimizer` holds, given the means over the tasks; return metrics to log.

        A gradient that is not finite leaves θ as it is.
        """
        ...

    def usual_questions(self, iteration: int) -> list[tuple[ChunkJob, int]]:
        """The jobs that `move` asks of the first chunk, and how often; for measuring them."""
        ...

    def advice(
        self, experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
    ) -> str:
        """Advice for a run whose meta-gradients are no longer finite.

        `metrics` are means over the tasks of the last meta-batch. `first_loss` is the first
        recorded support loss; None if it was never finite.
        """
        ...


class OptimizerStep:
    """One step of `outer.optimizer`; it asks nothing of the workers."""

    def move(
        self, optimizer: OuterOptimizer, mean: Aggregate, batch: MetaBatch
    ) -> dict[str, float]:
        lr = optimizer.lr
        return {"meta_gradient_norm": optimizer.step(mean.gradient), "outer_lr": lr}

    def usual_questions(self, iteration: int) -> list[tuple[ChunkJob, int]]:
        return []

    def advice(
        self, experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
    ) -> str:
        return why_not_finite(experiment, metrics, first_loss)


class PolicyStep:
    """A step of `trust_region`; it asks the workers about the iteration's trajectories."""

    def __init__(self, settings: Reinforcement):
        self._settings = settings

    def move(
        self, optimizer: OuterOptimizer, mean: Aggregate, batch: MetaBatch
    ) -> dict[str, float]:
        # A copy, because the steps below change θ in place.
        collected_by = optimizer.flat.numpy().copy()

        def ask(question: Callable[[Span], ChunkJob], vector: FlatVector) -> Total:
            return batch.workers.total(collected_by, question, batch.num_chunks, vector)

        questions = Questions(batch.iteration, ask)
        return policy_update(self._settings, optimizer, mean, questions)

    def usual_questions(self, iteration: int) -> list[tuple[ChunkJob, int]]:
        return usual_questions(self._settings, iteration)

    def advice(
        self, experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
    ) -> str:
        return (
            "Adapt or move in smaller steps (inner.lr; reinforcement.max_kl, or outer.lr where the "
            "update is not trpo), or take more task.trajectories"
        )


def outer_step_of(experiment: Experiment) -> OuterStep:
    """The outer step of an experiment."""
    # Experiments in reinforcement learning have this section, all others do not.
    settings = experiment.reinforcement
    return OptimizerStep() if settings is None else PolicyStep(settings)
