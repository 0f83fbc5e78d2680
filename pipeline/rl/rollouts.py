"""Collecting trajectories along adaptation: what reinforcement learning has instead of sampling.

    θ ──act──▶ trajectories ──step──▶ θ'_1 ──act──▶ trajectories ──step──▶ ... θ'_S ──act──▶ query

Afterwards the trajectories are data like any other: adaptation, meta-loss and meta-gradient are
pure functions of them. A trajectory depends on θ, on its task and on the number of the step alone,
so a lost one is collected again.

Shapes: B tasks, n trajectories per task, horizon H.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import vmap

from pipeline.config.settings import Reinforcement
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.learning_curve import adapt
from pipeline.maml.parameters import Params
from pipeline.rl.advantages import advantages
from pipeline.rl.policies import Distribution, distribution_of, log_std_of
from pipeline.rl.policy_loss import Experience, PolicyObjective, mean_over_steps
from tasks.base import as_tensor
from tasks.control.mdp import (
    ACTING,
    Environment,
    KnownEnvironment,
    MDPs,
    Trajectories,
    masked,
    still_going,
)
from tasks.random import UInt64


class CollectedSupport(NamedTuple):
    """The support of B tasks: what each step of adaptation learns from."""

    steps: list[Experience]

    def at_step(self, step: int, batch_size: int | None = None) -> Experience:
        """The trajectories collected before this step."""
        return self.steps[step]


class CollectedBatch(NamedTuple):
    """B tasks as they were acted out: the support, and the query by the adapted policies."""

    support: CollectedSupport
    query: Experience

    def fewer(self, trajectories: int) -> CollectedBatch:
        """The same tasks with so many trajectories at most of each step."""
        support, query = self.support.steps, self.query
        return CollectedBatch(
            CollectedSupport([_first(trajectories, of_step) for of_step in support]),
            _first(trajectories, query),
        )


def _first(count: int, experience: Experience) -> Experience:
    past = experience.trajectories
    kept = Trajectories._make(part[:, :count].contiguous() for part in past)
    return Experience(kept._replace(task=past.task), experience.advantages[:, :count].contiguous())


class Collected(NamedTuple):
    """The experience of B tasks before and after every step of adaptation."""

    steps: list[Experience]
    metrics: list[dict[str, Tensor]]
    """Of each, per task, [B]: return (undiscounted, mean over trajectories), episode_length,
    entropy, explained_variance (of the baseline), log_std, and inner_kl: how far the step before
    moved the policy."""

    @property
    def batch(self) -> CollectedBatch:
        """What a meta-gradient is made of."""
        return CollectedBatch(CollectedSupport(self.steps[:-1]), self.steps[-1])


@torch.no_grad()
def collect(
    task: MDPs,
    objective: PolicyObjective,
    adaptation: Adaptation,
    settings: Reinforcement,
    meta: Params,
    alpha: Tensor,
    keys: UInt64,
    steps: int,
) -> Collected:
    """Adapt to the tasks with these keys for so many steps, collecting before and after each."""
    distribution = distribution_of(task.actions)
    parameters = as_tensor(task.parameters(keys)).to(alpha)
    environment = task.environment(parameters, keys, task.trajectories, alpha)
    support, metrics = CollectedSupport([]), []
    predict, kl = vmap(objective.predict), vmap(objective.kl_at)
    adapted = adapt(objective, adaptation, meta, support, alpha, steps, len(keys))
    try:
        for step, (fast, slow) in enumerate(adapted):
            shared = {name: value.expand(len(keys), *value.shape) for name, value in slow.items()}
            now = {**shared, **fast}
            noise = distribution.noise(
                keys, ACTING + step, task.trajectories, task.horizon, task.output_size
            )
            past = rollout(
                partial(predict, now), distribution, environment, noise.to(alpha), step, parameters
            )
            estimated = advantages(past, settings.discount, settings.gae_lambda)
            found = _facts(task, distribution, past)
            found["explained_variance"] = estimated.explained_variance
            if step:
                found["inner_kl"] = kl(now, support.steps[-1])
            support.steps.append(Experience(past, estimated.values))
            metrics.append(found)
    finally:
        environment.close()
    return Collected(support.steps, metrics)


def rollout(
    act: Callable[[Tensor], Tensor],
    distribution: Distribution,
    environment: Environment,
    noise: Tensor,
    episode: int,
    parameters: Tensor,
) -> Trajectories:
    """Act in all tasks at once, to the horizon (`noise` [B, n, H, ...]); the record.

    `act` maps observations [B, n, O] to predictions; `episode` numbers the rollouts of a task.
    """
    observation = environment.reset(episode)
    rows = []
    for t in range(noise.shape[2]):
        prediction = act(observation)
        action = distribution.sample(prediction, noise[:, :, t])
        after = environment.step(action)
        rows.append((observation, action, prediction, after.reward, after.ended))
        observation = after.observation
    observations, actions, predictions, rewards, ended = (
        torch.stack(values, dim=2) for values in zip(*rows, strict=True)
    )
    mask = still_going(ended).to(rewards.dtype)
    log_probabilities = distribution.log_probability(predictions, actions)
    return masked(
        Trajectories(
            observations, actions, predictions, log_probabilities, rewards, mask, parameters
        )
    )


def _facts(task: MDPs, distribution: Distribution, past: Trajectories) -> dict[str, Tensor]:
    mean = vmap(mean_over_steps)
    facts = {
        "return": past.returns.mean(-1),
        "episode_length": past.lengths.mean(-1),
        "entropy": mean(distribution.entropy(past.predictions), past.mask),
    }
    log_std = log_std_of(past.predictions, task.actions)
    return facts if log_std is None else {**facts, "log_std": mean(log_std, past.mask)}


@torch.no_grad()
def expert_returns(task: MDPs, keys: UInt64, like: Tensor) -> Tensor:
    """Mean undiscounted return of one who knows the tasks with these keys, [B]."""
    parameters = as_tensor(task.parameters(keys)).to(like)
    environment = cast(
        KnownEnvironment, task.environment(parameters, keys, task.trajectories, like)
    )
    try:
        environment.reset(0)
        rewards, ends = [], []
        for _ in range(task.horizon):
            after = environment.step(environment.expert_action())
            rewards.append(after.reward)
            ends.append(after.ended)
        mask = still_going(torch.stack(ends, dim=-1))
        return (torch.stack(rewards, dim=-1) * mask).sum(-1).mean(-1)
    finally:
        environment.close()
