"""What a worker does with a chunk of tasks: sample it, adapt to it, return one gradient sum.

The chunk is the unit of distributed work. A job names tasks by their indices and carries no data;
its result depends on the experiment, on θ and on the job alone - not on who computes it, nor when.
Both worker groups, in process and Ray, call `ChunkComputer.run` and nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.adaptation import Adaptation
from pipeline.algorithms import Phase, phase_at, phases, query_weights_at
from pipeline.compilation import Work, worth_compiling
from pipeline.components import build_model
from pipeline.config import Experiment
from pipeline.control import ControlDomain
from pipeline.diagnostics import diagnose
from pipeline.domain import Domain, Judged, Taken
from pipeline.experience import Collected
from pipeline.meta_gradient import ChunkFunction, Knobs, num_tasks
from pipeline.meta_loss import Batch
from pipeline.parameters import Layout, Params
from pipeline.programs import program_of
from pipeline.supervised import SupervisedDomain
from pipeline.task_supply import Cut
from pipeline.update_rules import build_rule
from tasks.base import supervised
from tasks.control.mdp import MDPs

FlatVector = npt.NDArray[np.floating[Any]]


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
            later_factor=inner.later_lr_factor,
        )
    except ValueError as error:
        raise ValueError(f"inner.{error}") from error


def initial_parameters(experiment: Experiment, seed: int | None = None) -> Params:
    """The meta-parameters at initialisation, on the CPU, in the compute precision."""
    return meta_parameters_of(experiment, model_of(experiment, seed))


def meta_parameters_of(experiment: Experiment, model: torch.nn.Module) -> Params:
    """The model's named parameters, and what else the algorithm learns."""
    dtype = getattr(torch, experiment.compute.dtype)
    params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    return adaptation_of(experiment, model).meta_parameters(params, experiment.inner.lr)


def flat_vector(theta: Params) -> FlatVector:
    """Parameters as workers take them."""
    flat: FlatVector = Layout.of(theta).join(theta).numpy()
    return flat


def tasks_per_chunk(experiment: Experiment, num_parameters: int) -> int:
    """Tasks in a chunk; the last chunk of a meta-batch may have fewer."""
    outer = experiment.outer
    return outer.tasks_per_chunk or default_tasks_per_chunk(num_parameters, outer.tasks_per_batch)


def in_chunks(experiment: Experiment, num_parameters: int, num_tasks: int) -> list[tuple[int, int]]:
    """First task and number of tasks of every chunk, where tasks are looked at, not trained on."""
    size = tasks_per_chunk(experiment, num_parameters)
    return [(first, min(size, num_tasks - first)) for first in range(0, num_tasks, size)]


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
        model = model_of(experiment).to(self._device, self._dtype)
        self._adaptation = adaptation_of(experiment, model)
        theta = initial_parameters(experiment)
        self._layout = Layout.of(theta)
        self._initial_theta = self._layout.join(theta).to(self._device, self._dtype)
        self._alpha = torch.tensor(experiment.inner.lr, dtype=self._dtype, device=self._device)
        self._compile = compile
        self._functions: dict[Phase, ChunkFunction] = {}
        task = experiment.build_task()
        per_chunk = tasks_per_chunk(experiment, self._layout.size)
        self._cut = Cut(experiment.outer.tasks_per_batch, per_chunk)
        known = (model, self._adaptation, self._alpha, self._cut)
        self._domain: Domain
        if isinstance(task, MDPs):
            self._domain = ControlDomain(experiment, task, *known, compile)
        else:
            task = supervised(task, "meta-learning")
            self._domain = SupervisedDomain(experiment, task, *known)

    def run(self, theta: FlatVector, job: Job) -> ChunkResult:
        """Compute a job at θ, a flat vector [D] that is only read."""
        # Ray hands out read-only memory; torch would warn about aliasing it.
        flat = torch.from_numpy(np.array(theta)).to(self._device, self._dtype)
        if isinstance(job, GradientJob):
            return self._run_gradient(flat, job)
        if isinstance(job, DiagnosisJob):
            return self._run_diagnosis(flat, job)
        if isinstance(job, EvaluationJob):
            return self._run_evaluation(flat, job)
        return self._run_control(flat, job)

    @property
    def num_chunks(self) -> int:
        """Chunks of a meta-batch."""
        return self._cut.num_chunks

    def warm_up(self) -> None:
        """Compute chunks of every kind that occurs once, so that compilation is behind us.

        Also the moment at which missing data or a model that does not fit its tasks is noticed.
        """
        for phase in phases(self._experiment):
            self._compute(phase, GradientJob(0, 0))
            if not self._cut.even:
                self._compute(phase, GradientJob(0, self.num_chunks - 1))
        if isinstance(self._domain, ControlDomain):
            self._domain.warm_up(self._layout.split(self._initial_theta))

    def metric_names(self) -> list[str]:
        """What an evaluation reports, found out on a task."""
        job = EvaluationJob("validation", 0, 1, (0,))
        return list(self._run_evaluation(self._initial_theta, job).metrics)

    def worth_compiling(self, chunks: int) -> bool:
        """Whether so many chunks repay compilation; decided from the computation alone."""
        self.warm_up()  # what happens only once must not be counted
        function, batch, knobs = self.program(GradientJob(0, 0))
        works = [Work(function, (self._initial_theta, batch, knobs), chunks)]
        if isinstance(self._domain, ControlDomain):
            works += self._domain.works(self._layout.split(self._initial_theta), chunks)
        return worth_compiling(works)

    def program(self, job: GradientJob) -> tuple[ChunkFunction, Batch, Knobs]:
        """The function that computes a chunk, and its arguments beside θ: for those who measure."""
        phase = phase_at(self._experiment, job.iteration)
        return (
            self._function(phase),
            self._take(self._initial_theta, job).batch,
            self._knobs(phase, job.iteration),
        )

    def acted_out(self, theta: FlatVector, split: str, count: int, steps: int) -> Collected:
        """The first tasks of a split as θ acts in them, for those who look."""
        assert isinstance(self._domain, ControlDomain)
        return self._domain.act(self._split(theta), split, np.arange(count), steps)

    def prepare_ahead(self) -> bool:
        """Sample for the next iteration, if anything is left to sample (see `TaskSupply`)."""
        return self._domain.prepare_ahead()

    def _run_gradient(self, theta: Tensor, job: GradientJob) -> ChunkResult:
        began = time.perf_counter()
        batch, facts = self._take(theta, job)
        started = time.perf_counter()
        phase = phase_at(self._experiment, job.iteration)
        knobs = self._knobs(phase, job.iteration)
        gradient, metrics = self._function(phase)(theta, batch, knobs)
        host_gradient = gradient.cpu().numpy()
        host_metrics = _on_host({**metrics, **facts})
        ended = time.perf_counter()
        return ChunkResult(
            job, num_tasks(batch), host_gradient, host_metrics, started - began, ended - started
        )

    def _take(self, theta: Tensor, job: GradientJob) -> Taken:
        return self._domain.take(self._layout.split(theta), job.iteration, job.chunk)

    def _compute(self, phase: Phase, job: GradientJob) -> None:
        knobs = self._knobs(phase, job.iteration)
        batch = self._take(self._initial_theta, job).batch
        self._function(phase)(self._initial_theta, batch, knobs)

    def _function(self, phase: Phase) -> ChunkFunction:
        if phase not in self._functions:
            self._functions[phase] = program_of(
                self._experiment,
                phase,
                self._domain.objective,
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
        metrics = self._domain.examine(
            self._layout.split(theta),
            job.split,
            np.arange(job.first, job.first + job.count),
            job.steps,
            job.changes,
            job.judged,
        )
        return ChunkResult(
            job, job.count, None, _on_host(metrics), 0.0, time.perf_counter() - started
        )

    def _run_diagnosis(self, theta: Tensor, job: DiagnosisJob) -> ChunkResult:
        started = time.perf_counter()
        indices = np.arange(job.first, job.first + job.count)
        phase = phase_at(self._experiment, job.iteration)
        assert isinstance(self._domain, SupervisedDomain)
        found = diagnose(
            self._domain.objective,
            self._adaptation,
            self._layout.split(theta),
            self._domain.held_out("validation", indices),
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
            _on_host(found.metrics),
            0.0,
            time.perf_counter() - started,
        )

    def _run_control(self, theta: Tensor, job: FisherJob | CandidateJob) -> ChunkResult:
        domain = self._domain
        assert isinstance(domain, ControlDomain)
        started = time.perf_counter()
        where = (self._layout.split(theta), job.iteration, job.chunk)
        gradient: Params | None = None
        if isinstance(job, FisherJob):
            gradient, metrics = domain.fisher(*where, self._split(job.direction)), {}
        elif job.inner_kl_weight is None:
            metrics = domain.judge(*where, self._split(job.candidate))._asdict()
        else:
            step = domain.proximal(*where, self._split(job.candidate), job.inner_kl_weight)
            gradient = step.gradient
            metrics = {**step.candidate._asdict(), "inner_kl": step.inner_kl}
        return ChunkResult(
            job,
            len(self._cut.members(job.chunk)),
            None if gradient is None else self._layout.join(gradient).cpu().numpy(),
            _on_host(metrics),
            0.0,
            time.perf_counter() - started,
        )

    def _split(self, flat: FlatVector) -> Params:
        return self._layout.split(torch.from_numpy(np.array(flat)).to(self._alpha))


def _on_host(metrics: dict[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: value.cpu().numpy() for name, value in metrics.items()}
