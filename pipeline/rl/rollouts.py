"""Collecting trajectories before and after every step of adaptation.

    θ ──act──▶ trajectories ──step──▶ θ'_1 ──act──▶ trajectories ──step──▶ ... θ'_S ──act──▶ query

Supervised tasks are sampled; trajectories are collected with the parameters of the moment. After
that they are fixed data: adaptation, meta-loss and meta-gradient are pure functions of them. A
trajectory depends on θ, its task and the number of the step alone, so collecting it again gives the
same trajectory.

Shapes: B tasks, n trajectories per task, horizon H, O observed numbers.
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
from pipeline.maml.adaptation_curve import adapt
from pipeline.maml.flat_vector import Params
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
    """The support of B tasks: the trajectories that each step of adaptation uses."""

    steps: list[Experience]
    """By step; every tensor is [B, n, ...]."""

    def at_step(self, step: int, batch_size: int | None = None) -> Experience:
        """The trajectories collected before this step; a step uses all of them."""
        return self.steps[step]


class CollectedBatch(NamedTuple):
    """Trajectories of B tasks (a `meta_loss.Batch`); the adapted policies collected the query."""

    support: CollectedSupport
    query: Experience

    def fewer(self, trajectories: int) -> CollectedBatch:
        """The same tasks with the first `trajectories` of each step, or all if there are fewer."""
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
    """The experience of B tasks after 0, 1, ... steps of adaptation."""

    steps: list[Experience]
    metrics: list[dict[str, Tensor]]
    """Of each element of `steps`, per task, [B]: return (undiscounted, mean over trajectories),
    episode_length (in time steps), entropy (in nats), explained_variance (of the baseline), log_std
    (continuous actions alone), and after the first step inner_kl: the KL by which the last step
    moved the policy, in nats."""

    @property
    def batch(self) -> CollectedBatch:
        """The support of every step but the last, and the last as the query."""
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
    """Take `steps` steps of adaptation to the tasks with these keys, and collect before and after
    each step.

    θ (`meta`) and `alpha` must be on one device; trajectories are there and in that precision.
    Whatever the environment raises is raised here, after the environment is closed.
    """
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
    """Act in B tasks x n trajectories at once, to the horizon.

    `act` maps observations [B, n, O] to predictions [B, n, output_size]; `noise` [B, n, H, ...]
    draws the actions; `episode` is the number of this rollout among those of a task; `parameters`
    [B, P] make the tasks. Returns trajectories with the leading dimension B, zero where masked.
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
    """Metrics of the trajectories of B tasks, each [B]."""
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
    """Mean undiscounted return of the best actions in the tasks with these keys, [B].

    The environments must be `KnownEnvironment`s (`MDPs.has_expert`). Tensors are on the device and
    in the precision of `like`.
    """
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
