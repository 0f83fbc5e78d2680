"""Estimators of the policy gradient and its second derivative, against enumerated truth."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.inner_loop import Stages
from pipeline.maml.meta_gradient import Knobs, meta_gradient
from pipeline.rl.policies import CATEGORICAL
from pipeline.rl.policy_loss import Experience, PolicyObjective, SurrogateEstimator, surrogate
from pipeline.rl.rollouts import CollectedBatch, CollectedSupport
from tasks.control.mdp import Trajectories
from tests.two_states import HORIZON, Paths, all_paths, table

ESTIMATORS = get_args(SurrogateEstimator)
PATHS = all_paths()
SCORES = torch.tensor([[0.3, -0.4], [-0.2, 0.5]], dtype=torch.float64)


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
