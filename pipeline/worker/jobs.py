"""Jobs: how a meta-batch is cut into chunks, what a worker is asked to do, and what it returns.

Shapes: B tasks of a job, D meta-parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.tree import Span

Evaluated = Literal["model", "oracle", "nearest centroid"]


@dataclass(frozen=True)
class GradientJob:
    """Compute the meta-gradient of chunks of the meta-batch of `iteration`."""

    iteration: int
    chunks: Span


@dataclass(frozen=True)
class DiagnosisJob:
    """Diagnose the meta-gradient (`maml.diagnostics`) of validation tasks `first` ..
    `first + count - 1`, computed as in `iteration`. Supervised tasks have this job."""

    iteration: int
    first: int
    count: int


@dataclass(frozen=True)
class EvaluationJob:
    """Adapt to tasks `first` .. `first + count - 1` of a split, and report the metrics of each task
    after each of `steps` gradient steps (ascending)."""

    split: str
    first: int
    count: int
    steps: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of `task` that differ from the experiment's."""
    evaluated: Evaluated = "model"
    """Who predicts: the model, the task distribution's oracle, or a classifier on the model's
    features that needs no adaptation."""


@dataclass(frozen=True)
class FisherJob:
    """Multiply the job's vector, a direction [D], by the Fisher matrix at θ, on the trajectories of
    chunks. Reinforcement learning tasks have this job."""

    iteration: int
    chunks: Span


@dataclass(frozen=True)
class CandidateJob:
    """Measure the surrogate loss and the KL of the job's vector, another θ [D], on the trajectories
    that θ collected for chunks; with a weight for the inner KL, compute its gradient too.
    Reinforcement learning tasks have this job."""

    iteration: int
    chunks: Span
    inner_kl_weight: float | None = None


ChunkJob = GradientJob | FisherJob | CandidateJob
"""Jobs about chunks of a training meta-batch, whose results are added up. The chunks of a job are a
node of the tree (`worker.tree`). Fisher and candidate jobs are about trajectories that a gradient
job collected: the worker that did it has them. The vector that they are about travels beside them,
as θ does."""
Job = ChunkJob | EvaluationJob | DiagnosisJob


def units(job: Job) -> int:
    """How many chunks a job takes the time of."""
    return job.chunks.size if isinstance(job, ChunkJob) else 1


@dataclass(frozen=True)
class JobResult:
    """What a worker returns for a job; arrays are on the host."""

    job: Job
    num_tasks: int
    gradient: FlatVector | None
    """Sum over the tasks of their meta-gradients or Fisher products, [D], chunks added as the tree
    has it; for a diagnosis the sums of second and of first order, [2, D]; None where the job has no
    gradient."""
    metrics: dict[str, npt.NDArray[Any]]
    """Per task: [steps, B] for an evaluation or a diagnosis, else [B]."""
    seconds_sampling: float
    """Waiting for the training tasks, or collecting their trajectories; 0 for other jobs."""
    seconds_computing: float
    """The rest of the job."""
    finite: tuple[bool, ...] = ()
    """Of every chunk: whether all elements of its gradient are finite."""

    def with_gradient(self, gradient: FlatVector | None) -> JobResult:
        """The same with another vector."""
        return replace(self, gradient=gradient)


class Cut(NamedTuple):
    """How a meta-batch is cut into chunks."""

    per_batch: int
    """Tasks in a meta-batch."""
    per_chunk: int
    """Tasks in a chunk; the last chunk may have fewer."""

    @property
    def num_chunks(self) -> int:
        """Chunks of a meta-batch."""
        return -(-self.per_batch // self.per_chunk)

    @property
    def of_every_size(self) -> list[int]:
        """One chunk of every number of tasks that occurs: the first, and the last if it has
        fewer."""
        whole = self.per_batch % self.per_chunk == 0 or self.num_chunks == 1
        return [0] if whole else [0, self.num_chunks - 1]

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        """Positions of a chunk's tasks in the meta-batch, counted from 0, [B]."""
        first = chunk * self.per_chunk
        return np.arange(first, min(first + self.per_chunk, self.per_batch))


def described(job: Job, cut: Cut) -> str:
    """A job as people know it, with the tasks that it is about."""
    if isinstance(job, EvaluationJob | DiagnosisJob):
        split = job.split if isinstance(job, EvaluationJob) else "validation"
        return f"{split} tasks {job.first} to {job.first + job.count - 1}"
    first, last = job.chunks.first, job.chunks.end - 1
    chunks = f"chunk {first}" if last == first else f"chunks {first} to {last}"
    tasks = f"tasks {cut.members(first)[0]} to {cut.members(last)[-1]} of the meta-batch"
    return f"iteration {job.iteration}, {chunks} ({tasks})"


SMALL = 20_000
"""Parameters of a model whose cost is in calls, not in arithmetic."""


def default_tasks_per_chunk(num_parameters: int, tasks_per_batch: int, compile: bool) -> int:
    """Tasks in a chunk where `outer.tasks_per_chunk` is not set.

    It is decided from the configuration alone, so that results do not depend on the workers. For a
    small model the meta-batch is one chunk: its cost is in calls, not in arithmetic. For a large
    one the meta-batch is cut in four, so that workers can share it and memory stays bounded; where
    chunks are compiled, in sixteen, which costs nothing down to two tasks.
    """
    if num_parameters < SMALL:
        return tasks_per_batch
    quarter = -(-tasks_per_batch // 4)
    return max(min(2, quarter), -(-tasks_per_batch // 16)) if compile else quarter


def tasks_per_chunk(experiment: Experiment, num_parameters: int, compile: bool) -> int:
    """Tasks in a chunk; the last chunk of a meta-batch may have fewer."""
    outer = experiment.outer
    return outer.tasks_per_chunk or default_tasks_per_chunk(
        num_parameters, outer.tasks_per_batch, compile
    )


def in_chunks(experiment: Experiment, num_parameters: int, num_tasks: int) -> list[tuple[int, int]]:
    """Cut tasks 0 .. num_tasks - 1 of a split into jobs: first task and number of tasks of each."""
    size = tasks_per_chunk(experiment, num_parameters, compile=False)
    return [(first, min(size, num_tasks - first)) for first in range(0, num_tasks, size)]
