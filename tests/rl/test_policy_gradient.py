"""Policy gradients: distributions, advantages, and the estimators against enumerated truth."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.inner_loop import Stages
from pipeline.maml.meta_gradient import Knobs, meta_gradient
from pipeline.rl.advantages import advantages, discounted_sums, fitted, standardised
from pipeline.rl.policies import CATEGORICAL, GAUSSIAN, distribution_of, gaussian_policy
from pipeline.rl.policy_loss import Experience, PolicyObjective, SurrogateEstimator, surrogate
from pipeline.rl.rollouts import CollectedBatch, CollectedSupport
from tasks.control.mdp import Trajectories, masked, still_going
from tasks.random import task_keys
from tests.two_states import HORIZON, Paths, all_paths, table

ESTIMATORS = get_args(SurrogateEstimator)
PATHS = all_paths()
SCORES = torch.tensor([[0.3, -0.4], [-0.2, 0.5]], dtype=torch.float64)


# Distributions.


def test_gaussian_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    action = torch.randn(7, 3, generator=generator, dtype=torch.float64)

    def torchs(prediction: Tensor) -> torch.distributions.Distribution:
        mean, log_std = prediction.chunk(2, -1)
        return torch.distributions.Normal(mean, log_std.exp())

    torch.testing.assert_close(
        GAUSSIAN.log_probability(new, action), torchs(new).log_prob(action).sum(-1)
    )
    torch.testing.assert_close(GAUSSIAN.entropy(new), torchs(new).entropy().sum(-1))
    kl = torch.distributions.kl_divergence(torchs(old), torchs(new)).sum(-1)
    torch.testing.assert_close(GAUSSIAN.kl(old, new), kl)


def test_categorical_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    action = torch.randint(4, (7,), generator=generator)
    was, now = (torch.distributions.Categorical(logits=scores) for scores in (old, new))
    torch.testing.assert_close(CATEGORICAL.log_probability(new, action), now.log_prob(action))
    torch.testing.assert_close(CATEGORICAL.entropy(new), now.entropy())
    kl = torch.distributions.kl_divergence(was, now)
    torch.testing.assert_close(CATEGORICAL.kl(old, new), kl)


@pytest.mark.parametrize("actions", ["continuous", "discrete"])
def test_sampled_actions_have_the_predicted_distribution(actions: str) -> None:
    distribution = distribution_of(actions)  # type: ignore[arg-type]
    keys = task_keys(0, "train", np.arange(2))
    prediction = torch.tensor([0.5, -1.0, 0.1, -0.7], dtype=torch.float64)
    noise = distribution.noise(keys, 1, 200, 100, 4)
    sampled = distribution.sample(prediction.expand(2, 200, 100, 4), noise)
    if actions == "continuous":
        assert torch.allclose(sampled.mean((0, 1, 2)), prediction[:2], atol=0.03)
        assert torch.allclose(sampled.std((0, 1, 2)), prediction[2:].exp(), atol=0.03)
    else:
        frequency = torch.bincount(sampled.flatten(), minlength=4) / sampled.numel()
        assert torch.allclose(frequency.double(), prediction.softmax(-1), atol=0.01)
    # A task's noise is its own, whoever is sampled beside it.
    torch.testing.assert_close(noise[1:], distribution.noise(keys[1:], 1, 200, 100, 4))


# Advantages.


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


# Estimators: expectations over all trajectories, so without any sampling error.


def expected_loss(
    estimator: SurrogateEstimator, scores: Tensor, at: Tensor, paths: Paths
) -> Tensor:
    """Mean over the trajectories of a policy `at` of the surrogate at `scores`, times H."""

    def one(log_pi: Tensor, collected: Tensor, to_come: Tensor) -> Tensor:
        ones = torch.ones(1, HORIZON, dtype=torch.float64)
        return surrogate(estimator, log_pi[None], collected[None], to_come[None], ones)

    losses = vmap(one)(paths.log_pi(scores), paths.log_pi(at), paths.to_come)
    return HORIZON * (paths.probability(at) * losses).sum()


def second_derivative(estimator: SurrogateEstimator) -> Tensor:
    found = hessian(lambda s: expected_loss(estimator, s, SCORES, PATHS), SCORES)
    return -torch.as_tensor(found).reshape(4, 4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_surrogate_has_the_policy_gradient(estimator: SurrogateEstimator) -> None:
    scores = SCORES.clone().requires_grad_()
    (measured,) = torch.autograd.grad(expected_loss(estimator, scores, SCORES, PATHS), scores)
    (truth,) = torch.autograd.grad(PATHS.value(scores), scores)
    torch.testing.assert_close(-measured, truth)


def cross_terms() -> tuple[Tensor, Tensor]:
    """E Σ_t ∇log π_t ∇log π_tᵀ R_t, and E Σ_t (∇log π_t ∇log π_<tᵀ + transposed) R_t, where R_t is
    what is still to come and π_<t the actions before."""
    p = PATHS.probability(SCORES)
    jacobian = torch.autograd.functional.jacobian(PATHS.log_pi, SCORES)
    score = torch.as_tensor(jacobian).reshape(32, HORIZON, 4)
    before = score.cumsum(1) - score
    weight = p[:, None] * PATHS.to_come
    own = torch.einsum("it,itj,itk->jk", weight, score, score)
    mixed = torch.einsum("it,itj,itk->jk", weight, score, before)
    return own, mixed + mixed.T


def test_second_derivatives_are_where_theory_says() -> None:
    truth = torch.as_tensor(hessian(PATHS.value, SCORES)).reshape(4, 4)
    own, mixed = cross_terms()
    assert min(own.abs().max(), mixed.abs().max()) > 0.01
    torch.testing.assert_close(second_derivative("dice"), truth)
    torch.testing.assert_close(second_derivative("lvc"), truth - mixed)
    torch.testing.assert_close(second_derivative("naive"), truth - mixed - own)


def true_meta_gradient(alpha: float) -> Tensor:
    """Of J(θ + α ∇J(θ)), all expectations enumerated."""

    def after(scores: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(PATHS.value(scores), scores, create_graph=True)
        return PATHS.value(scores + alpha * gradient)

    scores = SCORES.clone().requires_grad_()
    (found,) = torch.autograd.grad(after(scores), scores)
    return found


def sampled(scores: Tensor, count: int, seed: int) -> Experience:
    """Trajectories of a policy, drawn from the enumerated ones; one task, so [1, count, H]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(
        PATHS.probability(scores), count, replacement=True, generator=generator
    )
    ones = torch.ones(1, count, HORIZON, dtype=torch.float64)
    states = PATHS.states[drawn]
    past = Trajectories(
        torch.nn.functional.one_hot(states, 2).double()[None],
        PATHS.actions[drawn][None],
        scores[states][None],
        PATHS.log_pi(scores)[drawn][None],
        PATHS.rewards[drawn][None],
        ones,
        torch.ones(1, 1),
    )
    return Experience(past, PATHS.to_come[drawn][None])


def estimated_meta_gradient(
    estimator: SurrogateEstimator, alpha: float, count: int, seed: int
) -> Tensor:
    """By the functions that train: collect, adapt, collect, and go back."""
    policy = table((2,), 2).double()
    objective = PolicyObjective(policy, CATEGORICAL, estimator)
    adaptation = Adaptation.of(policy, steps=1)
    stages = Stages.of(objective, adaptation)
    meta = {"weight": SCORES.T.contiguous()}
    support = sampled(SCORES, count, seed)
    rate = torch.tensor(HORIZON * alpha, dtype=torch.float64)  # losses are means over time steps
    fast = {"weight": meta["weight"]}
    loss = torch.func.grad(objective.loss)
    one_task = Experience(Trajectories(*(part[0] for part in support[0])), support[1][0])
    adapted = fast["weight"] - rate * loss(fast, one_task)["weight"]
    query = sampled(adapted.T.contiguous(), count, seed + 1)
    batch = CollectedBatch(CollectedSupport([support]), query)
    result = meta_gradient(stages, adaptation, meta, batch, Knobs(rate))
    return -HORIZON * result.gradient["weight"].T


def test_meta_gradients_of_sampled_trajectories() -> None:
    """`dice` agrees with the enumerated meta-gradient, `naive` misses what it must miss."""
    alpha, count, repeats = 0.5, 20_000, 12
    truth = true_meta_gradient(alpha)
    estimates = {
        estimator: torch.stack(
            [estimated_meta_gradient(estimator, alpha, count, 100 * i) for i in range(repeats)]
        )
        for estimator in ESTIMATORS
    }
    away = {
        estimator: float(
            ((found.mean(0) - truth) / (found.std(0) / math.sqrt(repeats))).abs().max()
        )
        for estimator, found in estimates.items()
    }
    assert away["dice"] < 4.5, away
    assert away["naive"] > 10, away
    # lvc misses less than naive does.
    error = {name: float((e.mean(0) - truth).norm()) for name, e in estimates.items()}
    assert error["dice"] < error["lvc"] < error["naive"], error
