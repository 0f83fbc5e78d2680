"""Tasks to act in, as a worker knows them: trajectories, collected with the θ of the iteration.

Those of a chunk are kept while the driver asks about them (Fisher products, candidates); whoever
does not have them collects them again, from θ and the tasks' seeds: the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config.experiment import Experiment
from pipeline.config.settings import Reinforcement
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.compilation import Work
from pipeline.maml.inner_loop import has_forward_derivatives
from pipeline.maml.parameters import Params
from pipeline.rl.fisher import Candidate, Proximal, judge, proximal_gradient
from pipeline.rl.policies import distribution_of
from pipeline.rl.policy_loss import PolicyObjective
from pipeline.rl.rollouts import Collected, CollectedBatch, collect, expert_returns
from pipeline.worker.jobs import Cut, Judged
from pipeline.worker.program_cache import fisher_program_of
from pipeline.worker.task_source import EVALUATION_SEED, Indices, Taken, Variants
from tasks.control.mdp import MDPs
from tasks.random import task_keys


class _Kept(NamedTuple):
    """A chunk that was acted out."""

    theta: Params
    collected: Collected
    for_fisher: CollectedBatch


class ControlDomain:
    """A `Domain`, and what the outer optimisers of reinforcement learning ask."""

    def __init__(
        self,
        experiment: Experiment,
        task: MDPs,
        model: nn.Module,
        adaptation: Adaptation,
        alpha: Tensor,
        cut: Cut,
        compile: bool,
    ):
        """Tasks are acted out where `alpha`, the inner rate, is. Compiled are the Fisher products,
        which are most of the work of `trpo`."""
        settings = experiment.reinforcement or Reinforcement()
        clip = settings.clip if settings.update == "promp" else None
        self.objective = PolicyObjective(
            model, distribution_of(task.actions), settings.estimator, clip
        )
        self._experiment, self._task = experiment, task
        self._variants = Variants(experiment, task)
        self._seed, self._settings = experiment.seed, settings
        self._adaptation, self._alpha = adaptation, alpha
        self._second_order = experiment.inner.order != "first"
        self._cut, self._compile = cut, compile
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._fisher = fisher_program_of(experiment, self.objective, adaptation, compile)

    def warm_up(self, theta: Params) -> None:
        """Compile what is compiled. Raises ValueError for a policy that cannot be trained so."""
        update = self._settings.update
        if not has_forward_derivatives(lambda: self._try_out(theta)):
            raise ValueError(
                "model: an operation of the policy has no forward derivative in torch, which "
                f"reinforcement.update={update} needs; gradient does without"
            )
        if self._compile and update == "trpo":
            for chunk in {0, self._cut.num_chunks - 1}:
                self.fisher(theta, 0, chunk, theta)

    def works(self, theta: Params, chunks: int) -> list[Work]:
        """What so many chunks call, beside the meta-gradient, of what is compiled."""
        if self._settings.update != "trpo":
            return []
        arguments = (theta, self._chunk(theta, 0, 0).for_fisher, self._alpha, theta)
        return [Work(self._fisher, arguments, chunks * self._settings.cg_iterations)]

    def take(self, theta: Params, iteration: int, chunk: int) -> Taken:
        collected = self._chunk(theta, iteration, chunk).collected
        facts = {
            f"{name}_step{step}": value
            for step, found in enumerate(collected.metrics)
            for name, value in found.items()
        }
        first, last = (collected.metrics[step]["return"] for step in (0, -1))
        return Taken(collected.batch, {**facts, "hurt": (last < first).to(first.dtype)})

    def prepare_ahead(self) -> bool:
        """Nothing can be: what is collected depends on the next θ."""
        return False

    def act(self, theta: Params, split: str, indices: Indices, steps: int) -> Collected:
        """Tasks of a split, acted out before and after each step of adaptation."""
        return self._collect(self._task, theta, task_keys(EVALUATION_SEED, split, indices), steps)

    def examine(
        self,
        theta: Params,
        split: str,
        indices: Indices,
        steps: tuple[int, ...],
        changes: dict[str, Any],
        judged: Judged,
    ) -> dict[str, Tensor]:
        """After k steps: the return of trajectories that the policy after k steps collected."""
        task = self._variants.of(changes)
        keys = task_keys(EVALUATION_SEED, split, indices)
        if judged != "model":
            returns = expert_returns(task, keys, self._alpha)
            return {"return": returns.expand(len(steps), -1)}
        found = self._collect(task, theta, keys, steps[-1]).metrics
        return {
            name: torch.stack([found[step][name] for step in steps])
            for name in ("return", "episode_length")
        }

    def fisher(self, theta: Params, iteration: int, chunk: int, direction: Params) -> Params:
        """`fisher.fisher_product` on a chunk."""
        batch = self._chunk(theta, iteration, chunk).for_fisher
        return self._fisher(theta, batch, self._alpha, direction)

    def judge(self, theta: Params, iteration: int, chunk: int, candidate: Params) -> Candidate:
        """`fisher.judge` on a chunk that θ collected."""
        batch = self._chunk(theta, iteration, chunk).collected.batch
        return judge(self.objective, self._adaptation, candidate, batch, self._alpha)

    def proximal(
        self, theta: Params, iteration: int, chunk: int, candidate: Params, inner_kl_weight: float
    ) -> Proximal:
        """`fisher.proximal_gradient` on a chunk that θ collected."""
        batch = self._chunk(theta, iteration, chunk).collected.batch
        return self._proximal(candidate, batch, inner_kl_weight)

    def _proximal(self, candidate: Params, batch: CollectedBatch, weight: float) -> Proximal:
        return proximal_gradient(
            self.objective,
            self._adaptation,
            candidate,
            batch,
            self._alpha,
            second_order=self._second_order,
            inner_kl_weight=weight,
        )

    def _try_out(self, theta: Params) -> None:
        """What the update differentiates forward, on a little of the first chunk."""
        little = self._chunk(theta, 0, 0).collected.batch.fewer(1)
        if self._settings.update == "trpo":
            eager = fisher_program_of(self._experiment, self.objective, self._adaptation, False)
            eager(theta, little, self._alpha, theta)
        elif self._settings.update == "promp":
            self._proximal(theta, little, self._settings.inner_kl)

    def _chunk(self, theta: Params, iteration: int, chunk: int) -> _Kept:
        kept = self._kept.get((iteration, chunk))
        if kept is None or not _same(kept.theta, theta):
            tasks = iteration * self._cut.per_batch + self._cut.members(chunk)
            keys = task_keys(self._seed, "train", tasks)
            collected = self._collect(self._task, theta, keys, self._adaptation.steps)
            few = self._settings.fisher_trajectories or self._task.trajectories
            kept = _Kept(theta, collected, collected.batch.fewer(few))
            # Trajectories of another iteration are of another θ.
            self._kept = {at: k for at, k in self._kept.items() if at[0] == iteration}
            self._kept[iteration, chunk] = kept
        return kept

    def _collect(self, task: MDPs, theta: Params, keys: Any, steps: int) -> Collected:
        return collect(
            task,
            self.objective,
            self._adaptation,
            self._settings,
            theta,
            self._alpha,
            keys,
            steps,
        )


def _same(one: Params, other: Params) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
