"""What a worker does with a chunk of tasks: sample it, adapt to it, return one gradient sum.

The chunk is the unit of distributed work. A job names tasks by their indices and carries no data;
its result depends on the experiment, on θ and on the job alone - not on who computes it, nor when.
Both worker groups, in process and Ray, call `ChunkComputer.run` and nothing else.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config.experiment import Experiment
from pipeline.config.phases import Phase, phase_at, phases
from pipeline.maml.compilation import Work, worth_compiling
from pipeline.maml.flat_vector import FlatVector, Params
from pipeline.maml.meta_gradient import ChunkFunction, Knobs
from pipeline.maml.meta_loss import Batch, num_tasks
from pipeline.rl.rollouts import Collected
from pipeline.worker.jobs import (
    ChunkJob,
    Cut,
    EvaluationJob,
    GradientJob,
    Job,
    JobResult,
    tasks_per_chunk,
)
from pipeline.worker.learner import Learner
from pipeline.worker.program_cache import program_of
from pipeline.worker.reinforcement import ReinforcementTasks
from pipeline.worker.supervised import SupervisedTasks
from pipeline.worker.task_source import TaskSource, TrainingChunk
from pipeline.worker.tree import NO_VECTOR, Span, TreeSum
from tasks.base import supervised
from tasks.control.mdp import mdps


def task_source_of(learner: Learner, cut: Cut, compile: bool) -> TaskSource:
    """The experiment's tasks: the one place where a worker asks of which kind they are.

    Raises ValueError for tasks that can be learned in neither way.
    """
    task, settings = learner.experiment.build_task(), learner.experiment.reinforcement
    if settings is None:
        return SupervisedTasks(learner, supervised(task, "meta-learning"), cut)
    return ReinforcementTasks(learner, mdps(task, "reinforcement"), settings, cut, compile)


class ChunkComputer:
    """Runs jobs of one experiment. Keeps nothing between jobs but caches that can be rebuilt."""

    def __init__(self, experiment: Experiment, compile: bool):
        """Raises ValueError naming the setting of a model that does not fit, of tasks that cannot
        be learned, or of a device that is not there."""
        self._experiment, self._compile = experiment, compile
        self._learner = Learner.of(experiment)
        per_chunk = tasks_per_chunk(experiment, self._learner.layout.size, compile)
        self._cut = Cut(experiment.outer.tasks_per_batch, per_chunk)
        self._source = task_source_of(self._learner, self._cut, compile)
        self._functions: dict[Phase, ChunkFunction] = {}

    def run(self, theta: FlatVector, job: Job, vector: FlatVector | None = None) -> JobResult:
        """Do a job at θ, a flat vector [D] that is only read; so is `vector`, what the job is
        about, if it is about one.

        Raises ValueError for a job that the experiment's tasks do not have.
        """
        flat = self._learner.on_device(theta)
        if isinstance(job, ChunkJob):
            return self._over_chunks(flat, job, vector)
        started = time.perf_counter()
        answer = self._source.answer(self._params(flat), job)
        gradient = None if answer.gradient is None else answer.gradient.cpu().numpy()
        seconds = time.perf_counter() - started
        return JobResult(job, answer.num_tasks, gradient, _on_host(answer.metrics), 0.0, seconds)

    @property
    def num_chunks(self) -> int:
        """Chunks of a meta-batch."""
        return self._cut.num_chunks

    def warm_up(self) -> None:
        """Compute one chunk of every size and phase that occurs; then all programs are compiled.

        Raises what missing data or a model that does not fit its tasks raises.
        """
        for phase in phases(self._experiment):
            for chunk in self._cut.of_every_size:
                self._compute(phase, chunk)
        self._source.warm_up(self._params(self._learner.initial_theta))

    def metric_names(self) -> list[str]:
        """The names of the metrics that an evaluation reports, found by evaluating one task."""
        job = EvaluationJob("validation", 0, 1, (0,))
        return list(self._source.evaluate(self._params(self._learner.initial_theta), job))

    def worth_compiling(self, chunks: int) -> bool:
        """Whether computing so many chunks repays compilation; decided from the computation alone,
        so that the answer is the same on every machine."""
        self.warm_up()  # what happens only once must not be counted
        function, batch, knobs = self.program()
        theta = self._learner.initial_theta
        works = [Work(function, (theta, batch, knobs), chunks)]
        return worth_compiling(works + self._source.works(self._params(theta), chunks))

    def program(self, iteration: int = 0) -> tuple[ChunkFunction, Batch, Knobs]:
        """The function that computes the first chunk of an iteration, and its arguments beside θ;
        for measuring it."""
        phase = phase_at(self._experiment, iteration)
        return (
            self._function(phase),
            self._training_chunk(self._learner.initial_theta, iteration, 0).batch,
            self._learner.knobs(phase, iteration),
        )

    def collect(self, theta: FlatVector, split: str, count: int, steps: int) -> Collected:
        """Trajectories in tasks 0 .. count - 1 of a split, before and after each of `steps` steps.

        Raises ValueError for supervised tasks.
        """
        params = self._params(self._learner.on_device(theta))
        return self._source.collect(params, split, np.arange(count), steps)

    def prepare_ahead(self) -> bool:
        """Use idle time for the next iteration; False if there is nothing to do."""
        return self._source.prepare_ahead()

    def _over_chunks(self, theta: Tensor, job: ChunkJob, vector: FlatVector | None) -> JobResult:
        """One chunk after the other, added up as the tree has it."""
        tree, parts = TreeSum(self.num_chunks), []
        about = None if vector is None else self._params(self._learner.on_device(vector))
        for chunk in range(*job.chunks):
            if isinstance(job, GradientJob):
                part = self._meta_gradient(theta, job.iteration, chunk)
            else:
                part = self._about_trajectories(theta, job, chunk, about)
            gradient = NO_VECTOR if part.gradient is None else part.gradient
            tree.add(Span(chunk, chunk + 1), gradient)
            finite = math.isfinite(gradient.sum()) or bool(np.isfinite(gradient).all())
            parts.append(replace(part, gradient=None, finite=(finite,)))
        ((_, total),) = tree.nodes.items()
        return JobResult(
            job,
            sum(part.num_tasks for part in parts),
            None if total is NO_VECTOR or not total.size else total,
            {n: np.concatenate([part.metrics[n] for part in parts]) for n in parts[0].metrics},
            sum(part.seconds_sampling for part in parts),
            sum(part.seconds_computing for part in parts),
            tuple(flag for part in parts for flag in part.finite),
        )

    def _meta_gradient(self, theta: Tensor, iteration: int, chunk: int) -> JobResult:
        began = time.perf_counter()
        batch, measured = self._training_chunk(theta, iteration, chunk)
        started = time.perf_counter()
        phase = phase_at(self._experiment, iteration)
        knobs = self._learner.knobs(phase, iteration)
        gradient, metrics = self._function(phase)(theta, batch, knobs)
        host_gradient = gradient.cpu().numpy()
        host_metrics = _on_host({**metrics, **measured})
        ended = time.perf_counter()
        job = GradientJob(iteration, Span(chunk, chunk + 1))
        return JobResult(
            job, num_tasks(batch), host_gradient, host_metrics, started - began, ended - started
        )

    def _about_trajectories(
        self, theta: Tensor, job: ChunkJob, chunk: int, vector: Params | None
    ) -> JobResult:
        if vector is None:
            raise ValueError(f"{type(job).__name__}: is about a vector, and was given none")
        started = time.perf_counter()
        answer = self._source.answer_chunk(self._params(theta), job, chunk, vector)
        gradient = None if answer.gradient is None else answer.gradient.cpu().numpy()
        seconds = time.perf_counter() - started
        return JobResult(job, answer.num_tasks, gradient, _on_host(answer.metrics), 0.0, seconds)

    def _training_chunk(self, theta: Tensor, iteration: int, chunk: int) -> TrainingChunk:
        return self._source.training_chunk(self._params(theta), iteration, chunk)

    def _compute(self, phase: Phase, chunk: int) -> None:
        """Compute a chunk at the initial θ, in any phase of the run."""
        theta, knobs = self._learner.initial_theta, self._learner.knobs(phase, 0)
        self._function(phase)(theta, self._training_chunk(theta, 0, chunk).batch, knobs)

    def _function(self, phase: Phase) -> ChunkFunction:
        if phase not in self._functions:
            self._functions[phase] = program_of(
                self._learner, phase, self._source.objective, self._source.constants, self._compile
            )
        return self._functions[phase]

    def _params(self, theta: Tensor) -> Params:
        return self._learner.layout.split(theta)


def _on_host(metrics: dict[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: value.cpu().numpy() for name, value in metrics.items()}
