"""What a worker knows of its tasks: where their data comes from, and which jobs they answer.

`supervised` samples examples; `reinforcement` collects trajectories. Everything around them -
adaptation, meta-gradients, chunks, workers - asks a `TaskSource` and never which kind it is: what
only one kind has (jobs, compiled functions, work that is done ahead) is owned by that kind, and
the base class says what happens where a kind has nothing.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config.experiment import Experiment
from pipeline.maml.compilation import Work
from pipeline.maml.flat_vector import Params
from pipeline.maml.meta_loss import Batch, TaskLoss
from pipeline.rl.rollouts import Collected
from pipeline.worker.jobs import ChunkJob, EvaluationJob, GradientJob, Job
from pipeline.worker.learner import Learner
from tasks.base import TaskDistribution

Indices = npt.NDArray[np.int64]
EVALUATION_SEED = 0
"""The seed of validation and test tasks. It is not the run's seed: every run is evaluated on the
same tasks, so that curves can be compared task by task."""

_Tasks = TypeVar("_Tasks", bound=TaskDistribution)
_Answerer = TypeVar("_Answerer", bound=Callable[..., Any])


class TrainingChunk(NamedTuple):
    """The data of a chunk of B training tasks."""

    batch: Batch
    metrics: dict[str, Tensor]
    """What was measured while the data was collected, per task, [B]; empty for sampled data."""


class Answer(NamedTuple):
    """The answer to a job, on the compute device."""

    num_tasks: int
    metrics: dict[str, Tensor]
    """Shapes as in `jobs.JobResult`."""
    gradient: Tensor | None = None
    """Shapes as in `jobs.JobResult`."""


class TaskSource(ABC):
    """The tasks of an experiment, as a worker knows them.

    θ is given by name (`Params`), on the compute device. Tensors that are returned are there too.
    """

    objective: TaskLoss
    """The losses of a task."""
    constants: tuple[Any, ...] = ()
    """Further settings inside `objective`; part of the key of compiled programs."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self.jobs: dict[type, Callable[[Params, Any], Answer]] = {EvaluationJob: self._evaluation}
        """What answers jobs that are not about chunks of a training meta-batch, from θ and the job;
        a kind of tasks adds its own."""
        self.chunk_jobs: dict[type, Callable[[Params, Any, int, Params], Answer]] = {}
        """The same for jobs about chunks other than the meta-gradient, which is the same for every
        kind; from θ, the job, the number of a chunk and the job's vector."""

    @abstractmethod
    def training_chunk(self, theta: Params, iteration: int, chunk: int) -> TrainingChunk:
        """The training tasks of a chunk; θ matters only where it collects the data."""

    @abstractmethod
    def evaluate(self, theta: Params, job: EvaluationJob) -> dict[str, Tensor]:
        """Metrics of each task after each of `job.steps` steps of adaptation,
        [len(job.steps), job.count]."""

    def answer(self, theta: Params, job: Job) -> Answer:
        """Do a job that is not about chunks of a training meta-batch.

        Raises ValueError for a job that these tasks do not have.
        """
        return self._who_does(job, self.jobs)(theta, job)

    def answer_chunk(self, theta: Params, job: ChunkJob, chunk: int, vector: Params) -> Answer:
        """Do the part of a job that is about one chunk, other than the meta-gradient. `vector` is
        what the job is about.

        Raises ValueError for a job that these tasks do not have.
        """
        return self._who_does(job, self.chunk_jobs)(theta, job, chunk, vector)

    def _who_does(self, job: Job, among: Mapping[type, _Answerer]) -> _Answerer:
        """What answers this kind of job. Raises ValueError, which names the jobs that there are."""
        if type(job) in among:
            return among[type(job)]
        there = ", ".join(each.__name__ for each in (GradientJob, *self.chunk_jobs, *self.jobs))
        raise ValueError(
            f"{self.learner.experiment.task.kind} tasks are {type(self).__name__}, which do not "
            f"have the job {type(job).__name__}; they have {there}"
        )

    def _evaluation(self, theta: Params, job: EvaluationJob) -> Answer:
        return Answer(job.count, self.evaluate(theta, job))

    def warm_up(self, theta: Params) -> None:  # noqa: B027  # most have nothing to prepare
        """Compile the functions that belong to this kind of tasks alone.

        Raises ValueError for a model that cannot be trained on these tasks.
        """

    def works(self, theta: Params, chunks: int) -> list[Work]:
        """What `chunks` chunks call of the functions that belong to this kind of tasks alone and
        are worth compiling; none by default."""
        return []

    def prepare_ahead(self) -> bool:
        """Use idle time for the next iteration; False if there is nothing to do."""
        return False

    def collect(self, theta: Params, split: str, indices: Indices, steps: int) -> Collected:
        """Trajectories in tasks of a split, before and after each of `steps` steps of adaptation.

        Raises ValueError for supervised tasks.
        """
        raise ValueError(
            f"{self.learner.experiment.task.kind} tasks are {type(self).__name__}, which have no "
            "trajectories"
        )


class Variants(Generic[_Tasks]):
    """An experiment's task distributions with some settings changed; each is built once."""

    def __init__(self, experiment: Experiment, task: _Tasks):
        """`task` is the distribution without changes."""
        self._experiment = experiment
        self._built: dict[str, Any] = {json.dumps({}): task}

    def of(self, changes: dict[str, Any]) -> _Tasks:
        """The task distribution with these settings changed."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self._built:
            self._built[key] = self._experiment.build_task(**changes)
        task: _Tasks = self._built[key]
        return task
