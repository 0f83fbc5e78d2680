"""What a worker does with a chunk of tasks: sample it, adapt to it, return one gradient sum.

The chunk is the unit of distributed work. A job names tasks by their indices and carries no data;
its result depends on the experiment, on θ and on the job alone - not on who computes it, nor when.
Both worker groups, in process and Ray, call `ChunkComputer.run` and nothing else.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import vmap

from pipeline.adaptation import Adaptation
from pipeline.algorithms import Phase, phase_at, phases, query_weights_at
from pipeline.compilation import worth_compiling
from pipeline.components import build_model
from pipeline.config import Experiment
from pipeline.diagnostics import diagnose
from pipeline.meta_gradient import ChunkFunction, Knobs, adaptation_curve
from pipeline.meta_loss import Objective
from pipeline.parameters import Layout, Params
from pipeline.programs import program_of
from pipeline.representations import head_inputs, nearest_centroid
from pipeline.task_supply import TaskSupply
from pipeline.update_rules import build_rule
from tasks.base import Examples, TaskBatch, TaskDistribution

FlatVector = npt.NDArray[np.floating[Any]]
Judged = Literal["model", "oracle", "nearest centroid"]
EVALUATION_SEED = 0
"""Validation and test tasks are the same for every run, whatever its seed: curves can be paired."""


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


Job = GradientJob | EvaluationJob | DiagnosisJob


@dataclass(frozen=True)
class ChunkResult:
    """What comes back for a job."""

    job: Job
    num_tasks: int
    gradient: FlatVector | None
    """Sum of the tasks' meta-gradients, [D]; for a diagnosis of second and first order, [2, D];
    None for an evaluation."""
    metrics: dict[str, npt.NDArray[Any]]
    """Per task: [B] for a gradient job, [steps, B] otherwise."""
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
    task = experiment.build_task()
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        task.input_shape,
        task.output_size,
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


def tasks_per_chunk(experiment: Experiment, num_parameters: int) -> int:
    """Tasks in a chunk; the last chunk of a meta-batch may have fewer."""
    outer = experiment.outer
    return outer.tasks_per_chunk or default_tasks_per_chunk(num_parameters, outer.tasks_per_batch)


def compute_device(experiment: Experiment) -> torch.device:
    """Where chunks are computed. Raises ValueError where a GPU is asked for and there is none."""
    name = experiment.compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device: cuda was asked for, but torch sees no GPU here")
    return torch.device(name)


class ChunkComputer:
    """Runs jobs of one experiment. Keeps nothing between jobs but caches that can be rebuilt."""

    def __init__(self, experiment: Experiment, compile: bool):
        self._experiment = experiment
        self._device = compute_device(experiment)
        self._dtype: torch.dtype = getattr(torch, experiment.compute.dtype)
        model = model_of(experiment)
        self._task = experiment.build_task()
        self._adaptation = adaptation_of(experiment, model)
        theta = initial_parameters(experiment)
        self._layout = Layout.of(theta)
        self._initial_theta = self._layout.join(theta).to(self._device, self._dtype)
        outer, chunk = experiment.outer, tasks_per_chunk(experiment, self._layout.size)
        self._tasks = TaskSupply(
            self._task,
            experiment.seed,
            outer.tasks_per_batch,
            chunk,
            outer.iterations,
            lambda batch: batch.to(self._device, self._dtype),
        )
        self._objective = Objective(model.to(self._device, self._dtype), self._task)
        self._alpha = torch.tensor(experiment.inner.lr, dtype=self._dtype, device=self._device)
        self._compile = compile
        self._functions: dict[Phase, ChunkFunction] = {}
        self._model = model
        self._changed_tasks: dict[str, tuple[TaskDistribution, Objective]] = {}

    def run(self, theta: FlatVector, job: Job) -> ChunkResult:
        """Compute a job at θ, a flat vector [D] that is only read."""
        # Ray hands out read-only memory; torch would warn about aliasing it.
        flat = torch.from_numpy(np.array(theta)).to(self._device, self._dtype)
        if isinstance(job, GradientJob):
            return self._run_gradient(flat, job)
        if isinstance(job, DiagnosisJob):
            return self._run_diagnosis(flat, job)
        return self._run_evaluation(flat, job)

    @property
    def num_chunks(self) -> int:
        """Chunks of a meta-batch."""
        return self._tasks.num_chunks

    def warm_up(self) -> None:
        """Compute chunks of every kind that occurs once, so that compilation is behind us.

        Also the moment at which missing data or a model that does not fit its tasks is noticed.
        """
        for phase in phases(self._experiment):
            self._compute(phase, GradientJob(0, 0))
            if not self._tasks.even:
                self._compute(phase, GradientJob(0, self.num_chunks - 1))

    def metric_names(self) -> list[str]:
        """What an evaluation reports, found out on a task."""
        job = EvaluationJob("validation", 0, 1, (0,))
        return list(self._run_evaluation(self._initial_theta, job).metrics)

    def run_first_chunk(self) -> None:
        """Compute one chunk, for those who measure."""
        self._compute(phase_at(self._experiment, 0), GradientJob(0, 0))

    def worth_compiling(self, calls: int) -> bool:
        """Whether so many chunks repay compilation; decided from the computation alone."""
        self.warm_up()  # what happens only once must not be counted
        function, batch, knobs = self.program(GradientJob(0, 0))
        return worth_compiling(function, (self._initial_theta, batch, knobs), calls)

    def program(self, job: GradientJob) -> tuple[ChunkFunction, TaskBatch, Knobs]:
        """The function that computes a chunk, and its arguments beside θ: for those who measure."""
        phase = phase_at(self._experiment, job.iteration)
        return (
            self._function(phase),
            self._tasks.take(job.iteration, job.chunk),
            self._knobs(phase, job.iteration),
        )

    def prepare_ahead(self) -> bool:
        """Sample for the next iteration, if anything is left to sample (see `TaskSupply`)."""
        return self._tasks.prepare_ahead()

    def _run_gradient(self, theta: Tensor, job: GradientJob) -> ChunkResult:
        began = time.perf_counter()
        batch = self._tasks.take(job.iteration, job.chunk)
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

    def _compute(self, phase: Phase, job: GradientJob) -> None:
        knobs = self._knobs(phase, job.iteration)
        self._function(phase)(
            self._initial_theta, self._tasks.take(job.iteration, job.chunk), knobs
        )

    def _function(self, phase: Phase) -> ChunkFunction:
        if phase not in self._functions:
            self._functions[phase] = program_of(
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
        if job.judged == "oracle":
            metrics = self._unadapted(task, batch, self._ask_oracle(task, batch), job.steps)
        elif job.judged == "nearest centroid":
            scores = self._nearest_centroids(task, theta, batch)
            metrics = self._unadapted(task, batch, scores, job.steps)
            del metrics["loss"]  # scores are cosines: their cross-entropy says nothing
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

    def _run_diagnosis(self, theta: Tensor, job: DiagnosisJob) -> ChunkResult:
        started = time.perf_counter()
        indices = np.arange(job.first, job.first + job.count)
        tasks = self._task.sample(EVALUATION_SEED, "validation", indices)
        phase = phase_at(self._experiment, job.iteration)
        found = diagnose(
            self._objective,
            self._adaptation,
            self._layout.split(theta),
            tasks.to(self._device, self._dtype),
            self._knobs(phase, job.iteration),
            order="second" if phase.second_order else "first",
            estimator=self._experiment.outer.estimator,
        )
        both = None
        if found.second is not None and found.first is not None:
            both = torch.stack([self._layout.join(g) for g in (found.second, found.first)])
        return ChunkResult(
            job,
            job.count,
            None if both is None else both.cpu().numpy(),
            {name: value.cpu().numpy() for name, value in found.metrics.items()},
            0.0,
            time.perf_counter() - started,
        )

    def _ask_oracle(self, task: TaskDistribution, batch: TaskBatch) -> Tensor:
        prediction = task.oracle(batch)
        if prediction is None:
            raise ValueError(
                f"evaluation.baselines: {self._experiment.task.kind} tasks have no oracle"
            )
        return prediction

    def _nearest_centroids(self, task: TaskDistribution, theta: Tensor, batch: TaskBatch) -> Tensor:
        """Scores of every task's queries from the features that the head sees, [B, m, N]."""
        meta = self._layout.split(theta)
        params = {**self._adaptation.slow(meta, 0), **self._adaptation.start(meta)}

        def one(support: Examples, query: Examples) -> Tensor:
            of_support, of_query = (
                head_inputs(self._model, params, part.x) for part in (support, query)
            )
            return nearest_centroid(of_support, support.y, of_query, task.output_size)

        return vmap(one)(batch.support, batch.query)

    def _unadapted(
        self, task: TaskDistribution, batch: TaskBatch, predictions: Tensor, steps: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Metrics of predictions that no step of adaptation changes, [len(steps), B]."""

        def one(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
            return {"loss": task.loss(prediction, target), **task.metrics(prediction, target)}

        metrics = vmap(one)(predictions, batch.query.y)
        return {name: value.expand(len(steps), -1) for name, value in metrics.items()}

    def _changed(self, changes: dict[str, Any]) -> tuple[TaskDistribution, Objective]:
        if not changes:
            return self._task, self._objective
        key = json.dumps(changes, sort_keys=True)
        if key not in self._changed_tasks:
            task = self._experiment.build_task(**changes)
            self._changed_tasks[key] = task, Objective(self._model, task)
        return self._changed_tasks[key]
