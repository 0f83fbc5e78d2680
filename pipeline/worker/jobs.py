"""How a meta-batch is cut into chunks, what is asked about a chunk, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.experiment import Experiment
from pipeline.maml.parameters import FlatVector

Judged = Literal["model", "oracle", "nearest centroid"]


@dataclass(frozen=True)
class GradientJob:
    """Compute chunk `chunk` of the meta-batch of `iteration`."""

    iteration: int
    chunk: int


@dataclass(frozen=True)
class DiagnosisJob:
    """Look into the meta-gradient of validation tasks `first` .. `first + count - 1`, as it is
    computed in `iteration`."""

    iteration: int
    first: int
    count: int


@dataclass(frozen=True)
class EvaluationJob:
    """Adapt to tasks `first` .. `first + count - 1` of a split and report every step of `steps`."""

    split: str
    first: int
    count: int
    steps: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    """Task settings that differ from the experiment's."""
    judged: Judged = "model"
    """The task distribution's oracle instead of the model, or a classifier on the model's features
    that needs no adaptation."""


@dataclass(frozen=True)
class FisherJob:
    """Multiply a direction [D] by the Fisher matrix at θ, on the trajectories of a chunk."""

    iteration: int
    chunk: int
    direction: FlatVector


@dataclass(frozen=True)
class CandidateJob:
    """Judge another θ [D] on the trajectories that θ collected for a chunk; with a weight for the
    inner KL, also its gradient."""

    iteration: int
    chunk: int
    candidate: FlatVector
    inner_kl_weight: float | None = None


Job = GradientJob | EvaluationJob | DiagnosisJob | FisherJob | CandidateJob
FOLLOW_UPS = (FisherJob, CandidateJob)
"""Jobs about trajectories that a gradient job collected."""


@dataclass(frozen=True)
class ChunkResult:
    """What comes back for a job."""

    job: Job
    num_tasks: int
    gradient: FlatVector | None
    """Sum over the tasks of their meta-gradients or Fisher products, [D]; for a diagnosis of
    second and first order, [2, D]; None for an evaluation."""
    metrics: dict[str, npt.NDArray[Any]]
    """Per task: [steps, B] for an evaluation or a diagnosis, else [B]."""
    seconds_sampling: float
    seconds_computing: float


class Cut(NamedTuple):
    """A meta-batch in chunks; the last may have fewer tasks."""

    per_batch: int
    per_chunk: int

    @property
    def num_chunks(self) -> int:
        """Chunks of a meta-batch."""
        return -(-self.per_batch // self.per_chunk)

    @property
    def even(self) -> bool:
        """Whether all chunks have the same number of tasks; else the last has fewer."""
        return self.per_batch % self.per_chunk == 0

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        """Positions in the meta-batch of a chunk's tasks."""
        first = chunk * self.per_chunk
        return np.arange(first, min(first + self.per_chunk, self.per_batch))


def default_tasks_per_chunk(num_parameters: int, tasks_per_batch: int) -> int:
    """From the model and the meta-batch alone, so that results do not depend on the workers.

    A small model is cheaper in one piece (the cost is in calls, not in arithmetic); a large one is
    cut in four, so that workers can share the batch and memory stays bounded.
    """
    if num_parameters < 20_000:
        return tasks_per_batch
    return max(1, -(-tasks_per_batch // 4))


def tasks_per_chunk(experiment: Experiment, num_parameters: int) -> int:
    """Tasks in a chunk; the last chunk of a meta-batch may have fewer."""
    outer = experiment.outer
    return outer.tasks_per_chunk or default_tasks_per_chunk(num_parameters, outer.tasks_per_batch)


def in_chunks(experiment: Experiment, num_parameters: int, num_tasks: int) -> list[tuple[int, int]]:
    """First task and number of tasks of every chunk, where tasks are looked at, not trained on."""
    size = tasks_per_chunk(experiment, num_parameters)
    return [(first, min(size, num_tasks - first)) for first in range(0, num_tasks, size)]
