"""How θ moves once the meta-gradient of an iteration is known: the one place that decides it.

OptimizerStep   one step of `outer.optimizer` (eq. 4)                   supervised tasks
PolicyStep      what `reinforcement.update` says, see `trust_region`    tasks to act in
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from pipeline.cluster.group import WorkerGroup
from pipeline.config.experiment import Experiment
from pipeline.config.settings import Reinforcement
from pipeline.evaluation.health import why_not_finite
from pipeline.maml.parameters import FlatVector
from pipeline.training.aggregation import Aggregate
from pipeline.training.outer_update import OuterUpdate
from pipeline.training.trust_region import Questions, policy_update, usual_questions
from pipeline.worker.jobs import ChunkResult, Job


class MetaBatch(NamedTuple):
    """The meta-batch of an iteration, and the workers that know its tasks."""

    iteration: int
    num_chunks: int
    workers: WorkerGroup


class OuterStep(Protocol):
    """How θ moves."""

    def move(self, update: OuterUpdate, mean: Aggregate, batch: MetaBatch) -> dict[str, float]:
        """Move θ, which `update` holds, given the mean over the tasks; returns metrics to record.

        A gradient that is not finite moves nothing.
        """
        ...

    def usual_questions(self, iteration: int, theta: FlatVector) -> list[tuple[Job, int]]:
        """The jobs that `move` asks of the first chunk, and how often; for measuring them."""
        ...

    def advice(
        self, experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
    ) -> str:
        """What to change where meta-gradients are not finite any more.

        `metrics` are means over the tasks, `first_loss` the support loss when the run began; None
        if it has not been finite once.
        """
        ...


class OptimizerStep:
    """One step of `outer.optimizer`; it asks nothing of the workers."""

    def move(self, update: OuterUpdate, mean: Aggregate, batch: MetaBatch) -> dict[str, float]:
        lr = update.lr
        return {"meta_gradient_norm": update.step(mean.gradient), "outer_lr": lr}

    def usual_questions(self, iteration: int, theta: FlatVector) -> list[tuple[Job, int]]:
        return []

    def advice(
        self, experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
    ) -> str:
        return why_not_finite(experiment, metrics, first_loss)


class PolicyStep:
    """The step of `trust_region`; it asks the workers about the trajectories of the iteration."""

    def __init__(self, settings: Reinforcement):
        self._settings = settings

    def move(self, update: OuterUpdate, mean: Aggregate, batch: MetaBatch) -> dict[str, float]:
        collected_by = update.flat.numpy().copy()  # θ moves while it is asked about

        def ask(jobs: Sequence[Job]) -> Sequence[ChunkResult]:
            return batch.workers.run(collected_by, jobs).results

        questions = Questions(batch.iteration, batch.num_chunks, ask)
        return policy_update(self._settings, update, mean, questions)

    def usual_questions(self, iteration: int, theta: FlatVector) -> list[tuple[Job, int]]:
        return usual_questions(self._settings, iteration, theta)

    def advice(
        self, experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
    ) -> str:
        return (
            "Adapt or move in smaller steps (inner.lr; reinforcement.max_kl, or outer.lr where the "
            "update is not trpo), or take more task.trajectories"
        )


def outer_step_of(experiment: Experiment) -> OuterStep:
    """The outer step of an experiment."""
    # The section says how policies move, and only tasks to act in have it.
    settings = experiment.reinforcement
    return OptimizerStep() if settings is None else PolicyStep(settings)
