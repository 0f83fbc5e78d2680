"""What a worker does with a chunk of tasks: sample it, adapt to it, return one gradient sum.

The chunk is the unit of distributed work. A job names tasks by their indices and carries no data;
its result depends on the experiment, on θ and on the job alone - not on who computes it, nor when.
Both worker groups, in process and Ray, call `ChunkComputer.run` and nothing else.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.adaptation import Adaptation
from pipeline.algorithms import Phase, phase_at, phases, query_weights_at
from pipeline.compilation import worth_compiling
from pipeline.components import build_model, resolve
from pipeline.config import Experiment
from pipeline.meta_gradient import ChunkFunction, Knobs, adaptation_curve, chunk_function
from pipeline.meta_loss import Objective
from pipeline.parameters import Layout, Params
from pipeline.update_rules import build_rule
from tasks.base import TaskBatch, TaskDistribution

FlatVector = npt.NDArray[np.floating[Any]]
EVALUATION_SEED = 0
"""Validation and test tasks are the same for every run, whatever its seed: curves can be paired."""
_BLOCK_BYTES = 2**18
_LONGEST_BLOCK = 64  # iterations that are sampled at once


@dataclass(frozen=True)
class GradientJob:
    """Compute chunk `chunk` of the meta-batch of `iteration`."""

    iteration: int
    chunk: int


@dataclass(frozen=True)
class EvaluationJob:
    """Adapt to tasks `first` .. `first + count - 1` of a split and report every step of `steps`."""

    split: str
    first: int
    count: int
    steps: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    """Task settings that differ from the experiment's."""
    oracle: bool = False
    """Judge the task distribution's oracle instead of the model."""


Job = GradientJob | EvaluationJob


@dataclass(frozen=True)
class ChunkResult:
    """What comes back for a job."""

    job: Job
    num_tasks: int
    gradient: FlatVector | None
    """Sum of the tasks' meta-gradients, [D]; None for an evaluation."""
    metrics: dict[str, npt.NDArray[Any]]
    """Per task: [B] for a gradient job, [len(steps), B] for an evaluation."""
    seconds_sampling: float
    seconds_computing: float


def default_tasks_per_chunk(num_parameters: int, tasks_per_batch: int) -> int:
    """From the model and the meta-batch alone, so that results do not depend on the workers.

    A small model is cheaper in one piece (the cost is in calls, not in arithmetic); a large one is
    cut in four, so that workers can share the batch and memory stays bounded.
    """
    if num_parameters < 20_000:
        return tasks_per_batch
    return max(1, -(-tasks_per_batch // 4))


def model_of(experiment: Experiment, seed: int | None = None) -> torch.nn.Module:
    """The experiment's model, its initial parameters drawn from the run's seed (or another)."""
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        experiment.build_task(),
        experiment.seed if seed is None else seed,
    )


def adaptation_of(experiment: Experiment, model: torch.nn.Module) -> Adaptation:
    """How the experiment adapts this model. Raises ValueError naming the setting."""
    inner = experiment.inner
    try:
        return Adaptation.of(
            model,
            steps=inner.steps,
            adapted=inner.adapted,
            not_adapted=inner.not_adapted,
            per_step=inner.per_step,
            rates=inner.rates,
            rule=build_rule(inner.optimizer, inner.momentum, inner.beta1),
            batch_size=inner.batch_size,
        )
    except ValueError as error:
        raise ValueError(f"inner.{error}") from error


def initial_parameters(experiment: Experiment, seed: int | None = None) -> Params:
    """The meta-parameters at initialisation, on the CPU, in the compute precision: the model's
    named parameters, and what else the algorithm learns."""
    dtype = getattr(torch, experiment.compute.dtype)
    model = model_of(experiment, seed)
    params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    return adaptation_of(experiment, model).meta_parameters(params, experiment.inner.lr)


def tasks_per_chunk(experiment: Experiment, layout: Layout) -> int:
    """Tasks in a chunk; the last chunk of a meta-batch may have fewer."""
    outer = experiment.outer
    return outer.tasks_per_chunk or default_tasks_per_chunk(layout.size, outer.tasks_per_batch)


def compute_device(experiment: Experiment) -> torch.device:
    """Where chunks are computed. Raises ValueError where a GPU is asked for and there is none."""
    name = experiment.compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device: cuda was asked for, but torch sees no GPU here")
    return torch.device(name)


_MOST_PROGRAMS = 16
_programs: dict[Any, ChunkFunction] = {}
_programs_lock = threading.Lock()


def _shared_chunk_function(
    experiment: Experiment,
    phase: Phase,
    objective: Objective,
    adaptation: Adaptation,
    layout: Layout,
    device: torch.device,
    compile: bool,
) -> ChunkFunction:
    """`chunk_function` of an experiment; compiled ones are shared by the runs of this process.

    θ, the tasks and the inner rate are arguments of a program; the key holds all the rest. So the
    trials of a search that differ in rates, seeds or iterations are compiled once.
    """
    inner, estimator = experiment.inner, experiment.outer.estimator

    def make() -> ChunkFunction:
        return chunk_function(
            objective,
            adaptation,
            layout,
            order="second" if phase.second_order else "first",
            estimator=estimator,
            checkpoint=inner.checkpoint,
            compile=compile,
        )

    if not compile:
        return make()
    task, model = experiment.task, experiment.model
    constants = inner.model_dump(mode="json", exclude={"lr", "order", "second_order_from"})
    # A program freezes what a model or task of the user's own holds besides parameters.
    own = ":" in task.kind + model.kind
    key = (
        experiment.seed if own else None,
        experiment.data.root,
        resolve("task", task.kind),
        resolve("model", model.kind),
        json.dumps([task.settings, model.settings, constants], sort_keys=True),
        phase,
        estimator,
        layout,
        experiment.compute.dtype,
        device,
    )
    with _programs_lock:
        program = _programs.pop(key) if key in _programs else make()
        _programs[key] = program  # the one used last is last
        if len(_programs) > _MOST_PROGRAMS:
            del _programs[next(iter(_programs))]
        return program


class ChunkComputer:
    """Runs jobs of one experiment. Keeps nothing between jobs but caches that can be rebuilt."""

    def __init__(self, experiment: Experiment, compile: bool):
        self._experiment = experiment
        self._device = compute_device(experiment)
        self._dtype: torch.dtype = getattr(torch, experiment.compute.dtype)
        model = model_of(experiment)
        self._task = experiment.build_task()
        self._adaptation = adaptation_of(experiment, model)
        self._layout = Layout.of(initial_parameters(experiment))
        self._tasks_per_chunk = tasks_per_chunk(experiment, self._layout)
        self._objective = Objective(model.to(self._device, self._dtype), self._task)
        self._alpha = torch.tensor(experiment.inner.lr, dtype=self._dtype, device=self._device)
        self._compile = compile
        self._functions: dict[Phase, ChunkFunction] = {}
        self._model = model
        self._changed_tasks: dict[str, tuple[TaskDistribution, Objective]] = {}
        self._block: int | None = None
        self._to_prepare: dict[GradientJob, None] = {}  # in this order
        self._prepared: dict[GradientJob, TaskBatch] = {}

    def run(self, theta: FlatVector, job: Job) -> ChunkResult:
        """Compute a job at θ, a flat vector [D] that is only read."""
        # Ray hands out read-only memory; torch would warn about aliasing it.
        flat = torch.from_numpy(np.array(theta)).to(self._device, self._dtype)
        if isinstance(job, GradientJob):
            return self._run_gradient(flat, job)
        return self._run_evaluation(flat, job)

    @property
    def num_chunks(self) -> int:
        """Chunks of a meta-batch."""
        return -(-self._experiment.outer.tasks_per_batch // self._tasks_per_chunk)

    def warm_up(self) -> None:
        """Compute chunks of every kind that occurs once, so that compilation is behind us.

        Also the moment at which missing data or a model that does not fit its tasks is noticed.
        """
        theta = self._initial_theta()
        last = GradientJob(0, self.num_chunks - 1)
        for phase in phases(self._experiment):
            self._compute(phase, theta, GradientJob(0, 0))
            if self._experiment.outer.tasks_per_batch % self._tasks_per_chunk != 0:
                self._compute(phase, theta, last)

    def metric_names(self) -> list[str]:
        """What an evaluation reports, found out on a task."""
        job = EvaluationJob("validation", 0, 1, (0,))
        return list(self._run_evaluation(self._initial_theta(), job).metrics)

    def run_first_chunk(self) -> None:
        """Compute one chunk, for those who measure."""
        self._compute(phase_at(self._experiment, 0), self._initial_theta(), GradientJob(0, 0))

    def _initial_theta(self) -> Tensor:
        joined = self._layout.join(initial_parameters(self._experiment))
        return joined.to(self._device, self._dtype)

    def worth_compiling(self, calls: int) -> bool:
        """Whether so many chunks repay compilation; decided from the computation alone."""
        self.warm_up()  # what happens only once must not be counted
        function, batch, knobs = self.program(GradientJob(0, 0))
        return worth_compiling(function, (self._initial_theta(), batch, knobs), calls)

    def program(self, job: GradientJob) -> tuple[ChunkFunction, TaskBatch, Knobs]:
        """The function that computes a chunk, and its arguments beside θ: for those who measure."""
        phase = phase_at(self._experiment, job.iteration)
        return self._function(phase), self._take(job), self._knobs(phase, job.iteration)

    def prepare_ahead(self) -> bool:
        """Sample one chunk of the next iteration; False if there is none left to sample.

        Supervised tasks do not depend on θ, so a worker does this while the driver aggregates. Its
        chunks of this iteration are the best guess at those of the next.
        """
        if not self._to_prepare:
            return False
        job = next(iter(self._to_prepare))
        del self._to_prepare[job]
        if job not in self._prepared:
            self._sample(job)
        return True

    def _run_gradient(self, theta: Tensor, job: GradientJob) -> ChunkResult:
        began = time.perf_counter()
        batch = self._take(job)
        started = time.perf_counter()
        phase = phase_at(self._experiment, job.iteration)
        knobs = self._knobs(phase, job.iteration)
        gradient, metrics = self._function(phase)(theta, batch, knobs)
        host_gradient = gradient.cpu().numpy()
        host_metrics = {name: value.cpu().numpy() for name, value in metrics.items()}
        ended = time.perf_counter()
        num_tasks = batch.query.x.shape[0]
        return ChunkResult(
            job, num_tasks, host_gradient, host_metrics, started - began, ended - started
        )

    def _compute(self, phase: Phase, theta: Tensor, job: GradientJob) -> None:
        self._function(phase)(theta, self._take(job), self._knobs(phase, job.iteration))

    def _function(self, phase: Phase) -> ChunkFunction:
        if phase not in self._functions:
            self._functions[phase] = _shared_chunk_function(
                self._experiment,
                phase,
                self._objective,
                self._adaptation,
                self._layout,
                self._device,
                self._compile,
            )
        return self._functions[phase]

    def _knobs(self, phase: Phase, iteration: int) -> Knobs:
        """The iteration's knobs; where a later phase is tried out early, any weights will do."""
        if not phase.every_query_loss:
            return Knobs(self._alpha)
        weights = query_weights_at(self._experiment, iteration)
        return Knobs(self._alpha, self._alpha.new_tensor(weights or [1.0] * self._adaptation.steps))

    def _run_evaluation(self, theta: Tensor, job: EvaluationJob) -> ChunkResult:
        started = time.perf_counter()
        task, objective = self._changed(job.changes)
        indices = np.arange(job.first, job.first + job.count)
        sampled_tasks = task.sample(EVALUATION_SEED, job.split, indices)
        batch = sampled_tasks.to(self._device, self._dtype)
        sampled = time.perf_counter()
        if job.oracle:
            metrics = self._judge_oracle(task, batch, job.steps)
        else:
            metrics = adaptation_curve(
                objective,
                self._adaptation,
                self._layout.split(theta),
                batch,
                self._alpha,
                steps=job.steps,
            )
        host = {name: value.cpu().numpy() for name, value in metrics.items()}
        return ChunkResult(
            job, job.count, None, host, sampled - started, time.perf_counter() - sampled
        )

    def _judge_oracle(
        self, task: TaskDistribution, batch: TaskBatch, steps: tuple[int, ...]
    ) -> dict[str, Tensor]:
        prediction = task.oracle(batch)
        if prediction is None:
            raise ValueError(
                f"evaluation.baselines: {self._experiment.task.kind} tasks have no oracle"
            )
        pairs = zip(prediction, batch.query.y, strict=True)
        losses = torch.stack([task.loss(p, y) for p, y in pairs])
        return {"loss": losses.expand(len(steps), -1)}

    def _changed(self, changes: dict[str, Any]) -> tuple[TaskDistribution, Objective]:
        if not changes:
            return self._task, self._objective
        key = json.dumps(changes, sort_keys=True)
        if key not in self._changed_tasks:
            task = self._experiment.build_task(**changes)
            self._changed_tasks[key] = task, Objective(self._model, task)
        return self._changed_tasks[key]

    def _take(self, job: GradientJob) -> TaskBatch:
        """The tasks of a job: prepared, or sampled now."""
        if job not in self._prepared:
            self._sample(job)
        # What was meant for an iteration that is over went to another worker.
        self._to_prepare = {j: None for j in self._to_prepare if j.iteration > job.iteration}
        following = GradientJob(job.iteration + 1, job.chunk)
        if following.iteration < self._experiment.outer.iterations:
            self._to_prepare[following] = None
        return self._prepared.pop(job)

    def _sample(self, job: GradientJob) -> None:
        """Prepare the tasks of a job - and, where they are so small that a call costs more than its
        numbers, those of the same chunk in the iterations around it.

        Blocks of iterations begin at multiples of their length: which tasks are sampled together
        must not depend on who samples when, or the last bits might.
        """
        per_batch, chunk = self._experiment.outer.tasks_per_batch, self._tasks_per_chunk
        first = job.chunk * chunk
        members = np.arange(first, min(first + chunk, per_batch))
        length = self._iterations_per_block()
        start = job.iteration - job.iteration % length
        indices = members + per_batch * np.arange(start, start + length)[:, None]
        tasks = self._task.sample(self._experiment.seed, "train", indices.ravel())
        tasks = tasks.to(self._device, self._dtype)
        # What is older went to another worker, or was sampled for iterations that were over.
        self._prepared = {j: b for j, b in self._prepared.items() if j.iteration >= job.iteration}
        for number in range(job.iteration - start, length):
            of_job = slice(number * len(members), (number + 1) * len(members))
            self._prepared[GradientJob(start + number, job.chunk)] = tasks.select(of_job)

    def _iterations_per_block(self) -> int:
        if self._block is None:
            one = self._task.sample(self._experiment.seed, "train", np.arange(1))
            size = self._tasks_per_chunk * sum(t.nbytes for examples in one for t in examples)
            self._block = max(1, min(_LONGEST_BLOCK, _BLOCK_BYTES // size))
        return self._block
