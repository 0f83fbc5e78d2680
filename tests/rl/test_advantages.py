"""Baseline and generalised advantages, and that nothing beyond an episode's end counts."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.inner_loop import Stages
from pipeline.maml.meta_gradient import Knobs, meta_gradient
from pipeline.rl.advantages import advantages, discounted_sums, fitted, standardised
from pipeline.rl.policies import GAUSSIAN, gaussian_policy
from pipeline.rl.policy_loss import Experience, PolicyObjective, SurrogateEstimator
from pipeline.rl.rollouts import CollectedBatch, CollectedSupport
from tasks.control.mdp import Trajectories, masked, still_going

ESTIMATORS = get_args(SurrogateEstimator)


def some(tasks: int = 2, n: int = 5, horizon: int = 12) -> Trajectories:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(tasks, n, *shape, generator=generator, dtype=torch.float64)

    ended = torch.rand(tasks, n, horizon, generator=generator) < 0.1
    predictions, actions = normal(horizon, 4), normal(horizon, 2)
    return Trajectories(
        normal(horizon, 3),
        actions,
        predictions,
        GAUSSIAN.log_probability(predictions, actions),
        normal(horizon),
        still_going(ended).double(),
        torch.zeros(tasks, 1),
    )


def test_baseline_is_least_squares() -> None:
    past = some()
    returns = discounted_sums(past.rewards * past.mask, 0.9) * past.mask
    measured = fitted(past.observations, past.mask, returns)
    for task in range(2):
        rows, targets, places = [], [], []
        for i in range(5):
            for t in range(int(past.mask[task, i].sum())):
                o = past.observations[task, i, t].numpy()
                s = t / 100
                rows.append([*o, *(o * o), s, s * s, s**3, 1.0])
                targets.append(float(returns[task, i, t]))
                places.append((i, t))
        # The ridge as rows of its own.
        features = np.vstack([rows, math.sqrt(1e-5) * np.eye(10)])
        weights = np.linalg.lstsq(features, np.append(targets, np.zeros(10)), rcond=None)[0]
        for (i, t), row in zip(places, rows, strict=True):
            assert float(measured[task, i, t]) == pytest.approx(float(row @ weights), abs=1e-6)
    assert not measured[past.mask == 0].any()


def test_generalised_advantages_are_those_of_the_obvious_loop() -> None:
    past, discount, lam = some(), 0.95, 0.8
    returns = discounted_sums(past.rewards * past.mask, discount) * past.mask
    baseline = fitted(past.observations, past.mask, returns)
    expected = torch.zeros_like(past.rewards)
    for task in range(2):
        for i in range(5):
            length, running = int(past.mask[task, i].sum()), 0.0
            for t in reversed(range(length)):
                # Neither an end nor the horizon is followed by anything.
                following = float(baseline[task, i, t + 1]) if t + 1 < length else 0.0
                reward = float(past.rewards[task, i, t])
                surprise = reward + discount * following - float(baseline[task, i, t])
                running = surprise + discount * lam * running
                expected[task, i, t] = running
        valid = past.mask[task] > 0
        own = expected[task][valid]
        expected[task][valid] = (own - own.mean()) / own.std(correction=0)
    measured = advantages(past, discount, lam)
    torch.testing.assert_close(measured.values, expected, rtol=1e-6, atol=1e-6)
    assert (measured.explained_variance <= 1).all()
    for task in range(2):
        one = advantages(Trajectories(*(part[task : task + 1] for part in past)), discount, lam)
        torch.testing.assert_close(one.values[0], measured.values[task])


def consequences(past: Trajectories) -> list[Tensor]:
    """Everything that is computed from trajectories."""
    torch.manual_seed(0)
    policy = gaussian_policy((3,), 4, hidden=(5,), activation="tanh").double()
    params = {name: p.detach() for name, p in policy.named_parameters()}
    estimated = advantages(past, 0.9, 0.9)
    found = [estimated.values[..., :12], estimated.explained_variance]
    for estimator in ESTIMATORS:
        objective = PolicyObjective(policy, GAUSSIAN, estimator, clip=0.3)
        experience = Experience(past, estimated.values)
        batch = CollectedBatch(CollectedSupport([experience]), experience)
        adaptation = Adaptation.of(policy, steps=1)
        stages = Stages.of(objective, adaptation)
        knobs = Knobs(torch.tensor(0.1, dtype=torch.float64))
        result = meta_gradient(stages, adaptation, params, batch, knobs)
        found += [*result.gradient.values(), *result.metrics.values()]
        found.append(vmap(objective.kl_at, in_dims=(None, 0))(params, experience))
    assert all(torch.isfinite(each).all() for each in found)
    return found


def test_garbage_beyond_the_end_of_an_episode_changes_nothing() -> None:
    """Also what is no number, which no product with a mask would take away."""
    past = some()
    assert (past.mask == 0).any()
    spoilt = past._replace(
        observations=torch.where(past.mask[..., None] > 0, past.observations, torch.nan),
        actions=torch.where(past.mask[..., None] > 0, past.actions, torch.inf),
        predictions=torch.where(past.mask[..., None] > 0, past.predictions, 1e30),
        log_probabilities=torch.where(past.mask > 0, past.log_probabilities, torch.nan),
        rewards=torch.where(past.mask > 0, past.rewards, -1e9),
    )
    both = (consequences(masked(each)) for each in (past, spoilt))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_longer_horizon_of_masked_garbage_changes_nothing() -> None:
    """Nobody has taken it away: every mean, sum and fit must leave it out by itself."""
    past, generator = some(), torch.Generator().manual_seed(4)

    def padded(values: Tensor) -> Tensor:
        longer = torch.cat([values, torch.zeros_like(values[:, :, :7])], 2)
        noise = torch.randn(longer.shape, generator=generator, dtype=torch.float64)
        valid = mask if longer.dim() == 3 else mask[..., None]
        return torch.where(valid > 0, longer, noise)

    mask = torch.cat([past.mask, torch.zeros_like(past.mask[:, :, :7])], 2)
    observations, actions, predictions, log_probabilities, rewards = map(padded, past[:5])
    longer = Trajectories(
        observations, actions, predictions, log_probabilities, rewards, mask, past.task
    )
    for one, other in zip(consequences(past), consequences(longer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_standardisation_looks_at_valid_steps_only() -> None:
    past = some()
    values = standardised(past.rewards * past.mask, past.mask)
    for task in range(2):
        valid = values[task][past.mask[task] > 0]
        assert float(valid.mean()) == pytest.approx(0, abs=1e-12)
        assert float(valid.std(correction=0)) == pytest.approx(1, abs=1e-6)
