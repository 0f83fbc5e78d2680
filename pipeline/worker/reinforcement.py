"""A worker's side of reinforcement learning tasks: collects trajectories with the θ of the
iteration, keeps them, answers the driver's questions about them.

The trajectories of a chunk are kept while the driver asks about them (Fisher products,
candidates). A worker that does not have them collects them again from θ and the tasks' seeds, and
gets the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config.settings import Reinforcement
from pipeline.maml.compilation import Work
from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_loop import forward_mode_succeeds
from pipeline.rl.fisher import ProximalGradient, evaluate_candidate, proximal_gradient
from pipeline.rl.policies import distribution_of
from pipeline.rl.policy_loss import PolicyObjective
from pipeline.rl.rollouts import Collected, CollectedBatch, collect, expert_returns
from pipeline.worker.jobs import CandidateJob, Cut, EvaluationJob, FisherJob
from pipeline.worker.learner import Learner
from pipeline.worker.program_cache import fisher_program_of
from pipeline.worker.task_source import (
    EVALUATION_SEED,
    Answer,
    Indices,
    TaskSource,
    TrainingChunk,
    Variants,
)
from tasks.control.mdp import MDPs
from tasks.random import UInt64, task_keys


class _Kept(NamedTuple):
    """The trajectories of a chunk."""

    theta: Params
    """The θ that collected them."""
    collected: Collected
    for_fisher: CollectedBatch
    """The first of them, as many as `reinforcement.fisher_trajectories`."""


class ReinforcementTasks(TaskSource):
    """Tasks whose trajectories a policy collects."""

    objective: PolicyObjective

    def __init__(
        self, learner: Learner, task: MDPs, settings: Reinforcement, cut: Cut, compile: bool
    ):
        """`compile` the Fisher products, which are most of the work of `trpo`."""
        super().__init__(learner)
        self.chunk_jobs |= {FisherJob: self._fisher_answer, CandidateJob: self._candidate}
        experiment = learner.experiment
        clip = settings.clip if settings.update == "promp" else None
        self.objective = PolicyObjective(
            learner.model, distribution_of(task.actions), settings.estimator, clip
        )
        self.constants = (settings.estimator, settings.update, settings.clip)
        self._task, self._variants = task, Variants(experiment, task)
        self._settings, self._cut, self._compile = settings, cut, compile
        self._second_order = experiment.inner.order != "first"
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._fisher = fisher_program_of(learner, self.objective, self.constants, compile)

    def warm_up(self, theta: Params) -> None:
        update = self._settings.update
        if not forward_mode_succeeds(lambda: self._differentiate_forward(theta)):
            raise ValueError(
                "model: an operation of the policy has no forward derivative in torch, which "
                f"reinforcement.update={update} needs; gradient does without"
            )
        if self._compile and update == "trpo":
            for chunk in self._cut.of_every_size:
                self._fisher_product(theta, 0, chunk, theta)

    def works(self, theta: Params, chunks: int) -> list[Work]:
        """The Fisher products of `trpo`: one per iteration of conjugate gradients and chunk."""
        if self._settings.update != "trpo":
            return []
        arguments = (theta, self._chunk(theta, 0, 0).for_fisher, self.learner.alpha, theta)
        return [Work(self._fisher, arguments, chunks * self._settings.cg_iterations)]

    def training_chunk(self, theta: Params, iteration: int, chunk: int) -> TrainingChunk:
        """The metrics are `rollouts.Collected.metrics` by step, and `hurt`: 1 where the return
        after adaptation is lower than before, else 0."""
        collected = self._chunk(theta, iteration, chunk).collected
        metrics = {
            f"{name}_step{step}": value
            for step, found in enumerate(collected.metrics)
            for name, value in found.items()
        }
        first, last = (collected.metrics[step]["return"] for step in (0, -1))
        return TrainingChunk(collected.batch, {**metrics, "hurt": (last < first).to(first.dtype)})

    def collect(self, theta: Params, split: str, indices: Indices, steps: int) -> Collected:
        keys = task_keys(EVALUATION_SEED, split, indices)
        return self._collect_from(self._task, theta, keys, steps)

    def _fisher_answer(
        self, theta: Params, job: FisherJob, chunk: int, direction: Params
    ) -> Answer:
        product = self._fisher_product(theta, job.iteration, chunk, direction)
        return Answer(self._num_tasks(chunk), {}, self.learner.layout.join(product))

    def evaluate(self, theta: Params, job: EvaluationJob) -> dict[str, Tensor]:
        """Returns (undiscounted) and episode lengths of trajectories that the policy after k steps
        collected, means per task."""
        task = self._variants.of(job.changes)
        indices = np.arange(job.first, job.first + job.count)
        keys = task_keys(EVALUATION_SEED, job.split, indices)
        if job.evaluated != "model":
            returns = expert_returns(task, keys, self.learner.alpha)
            return {"return": returns.expand(len(job.steps), -1)}
        found = self._collect_from(task, theta, keys, job.steps[-1]).metrics
        return {
            name: torch.stack([found[step][name] for step in job.steps])
            for name in ("return", "episode_length")
        }

    def _candidate(self, theta: Params, job: CandidateJob, chunk: int, candidate: Params) -> Answer:
        """What another θ is worth on the trajectories that θ collected."""
        batch = self._chunk(theta, job.iteration, chunk).collected.batch
        learner, num_tasks = self.learner, self._num_tasks(chunk)
        if job.inner_kl_weight is None:
            found = evaluate_candidate(
                self.objective, learner.adaptation, candidate, batch, learner.alpha
            )
            return Answer(num_tasks, found._asdict())
        step = self._proximal(candidate, batch, job.inner_kl_weight)
        metrics = {**step.candidate._asdict(), "inner_kl": step.inner_kl}
        return Answer(num_tasks, metrics, learner.layout.join(step.gradient))

    def _fisher_product(
        self, theta: Params, iteration: int, chunk: int, direction: Params
    ) -> Params:
        """`fisher.fisher_product` on a chunk."""
        batch = self._chunk(theta, iteration, chunk).for_fisher
        return self._fisher(theta, batch, self.learner.alpha, direction)

    def _proximal(
        self, candidate: Params, batch: CollectedBatch, weight: float
    ) -> ProximalGradient:
        return proximal_gradient(
            self.objective,
            self.learner.adaptation,
            candidate,
            batch,
            self.learner.alpha,
            second_order=self._second_order,
            inner_kl_weight=weight,
        )

    def _differentiate_forward(self, theta: Params) -> None:
        """Compute what the update differentiates forward, on one trajectory per task of the first
        chunk."""
        little = self._chunk(theta, 0, 0).collected.batch.fewer(1)
        if self._settings.update == "trpo":
            eager = fisher_program_of(self.learner, self.objective, self.constants, False)
            eager(theta, little, self.learner.alpha, theta)
        elif self._settings.update == "promp":
            self._proximal(theta, little, self._settings.inner_kl)

    def _chunk(self, theta: Params, iteration: int, chunk: int) -> _Kept:
        """The trajectories of a chunk: kept ones where θ collected them, else new ones."""
        kept = self._kept.get((iteration, chunk))
        if kept is None or not _same(kept.theta, theta):
            learner = self.learner
            tasks = iteration * self._cut.per_batch + self._cut.members(chunk)
            keys = task_keys(learner.experiment.seed, "train", tasks)
            collected = self._collect_from(self._task, theta, keys, learner.adaptation.steps)
            few = self._settings.fisher_trajectories or self._task.trajectories
            kept = _Kept(theta, collected, collected.batch.fewer(few))
            # Trajectories of another iteration are of another θ.
            self._kept = {at: k for at, k in self._kept.items() if at[0] == iteration}
            self._kept[iteration, chunk] = kept
        return kept

    def _collect_from(self, task: MDPs, theta: Params, keys: UInt64, steps: int) -> Collected:
        return collect(
            task,
            self.objective,
            self.learner.adaptation,
            self._settings,
            theta,
            self.learner.alpha,
            keys,
            steps,
        )

    def _num_tasks(self, chunk: int) -> int:
        return len(self._cut.members(chunk))


def _same(one: Params, other: Params) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
