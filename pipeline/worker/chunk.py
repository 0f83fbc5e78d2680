"""What a worker does with a chunk of tasks: sample it, adapt to it, return one gradient sum.

The chunk is the unit of distributed work. A job names tasks by their indices and carries no data;
its result depends on the experiment, on θ and on the job alone - not on who computes it, nor when.
Both worker groups, in process and Ray, call `ChunkComputer.run` and nothing else.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.experiment import Experiment
from pipeline.config.phases import Phase, phase_at, phases, query_weights_at
from pipeline.maml.compilation import Work, worth_compiling
from pipeline.maml.diagnostics import diagnose
from pipeline.maml.meta_gradient import ChunkFunction, Knobs, num_tasks
from pipeline.maml.meta_loss import Batch
from pipeline.maml.parameters import FlatVector, Layout, Params
from pipeline.rl.rollouts import Collected
from pipeline.worker.jobs import (
    CandidateJob,
    ChunkResult,
    Cut,
    DiagnosisJob,
    EvaluationJob,
    FisherJob,
    GradientJob,
    Job,
    tasks_per_chunk,
)
from pipeline.worker.learner import adaptation_of, compute_device, initial_parameters, model_of
from pipeline.worker.program_cache import program_of
from pipeline.worker.reinforcement import ControlDomain
from pipeline.worker.supervised import SupervisedDomain
from pipeline.worker.task_source import Domain, Taken
from tasks.base import supervised
from tasks.control.mdp import MDPs


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
