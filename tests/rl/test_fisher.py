"""Fisher products and candidates of a chunk, written out by hand and in numerical derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from pipeline.config.settings import Reinforcement
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.adaptation_curve import adapt
from pipeline.maml.flat_vector import Layout, Params, flat_vector
from pipeline.maml.inner_optimizers import InnerOptimizerName, build_inner_optimizer
from pipeline.rl.fisher import evaluate_candidate, fisher_product, proximal_gradient
from pipeline.rl.policies import GAUSSIAN, gaussian_policy
from pipeline.rl.policy_loss import PolicyObjective
from pipeline.rl.rollouts import CollectedBatch, collect
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import FisherJob
from pipeline.worker.learner import initial_parameters, model_of
from pipeline.worker.tree import Span
from tasks.control.navigation import Navigation
from tasks.random import task_keys
from tests.conftest import experiment_of

ALPHA = torch.tensor(0.1, dtype=torch.float64)


class Small:
    """A policy of 24 numbers and the trajectories that it collected."""

    def __init__(self, steps: int, optimizer: InnerOptimizerName = "sgd", **choices: Any) -> None:
        torch.manual_seed(0)
        policy = gaussian_policy((2,), 4, hidden=(4,), activation="tanh").double()
        self.objective = PolicyObjective(policy, GAUSSIAN, "lvc")
        self.adaptation = Adaptation.of(
            policy, steps=steps, optimizer=build_inner_optimizer(optimizer), **choices
        )
        params = {name: p.detach() for name, p in policy.named_parameters()}
        self.meta = self.adaptation.meta_parameters(params, float(ALPHA))
        self.layout = Layout.of(self.meta)
        self.batch: CollectedBatch = collect(
            Navigation(trajectories=6, horizon=8),
            self.objective,
            self.adaptation,
            Reinforcement(),
            self.meta,
            ALPHA,
            task_keys(0, "train", np.arange(3)),
            steps,
        ).batch

    def kl(self, meta: Params, second_order: bool = True) -> Tensor:
        """Sum over the tasks of the KL between adapted policies, written out task by task."""
        total = torch.zeros((), dtype=torch.float64)
        for task in range(3):
            point = self.adaptation.optimizer.start(self.adaptation.start(meta))
            slow = self.adaptation.slow(meta, 0)
            for s in range(self.adaptation.steps):
                support = _of_task(self.batch.support.steps[s], task)
                loss = self.objective.loss({**slow, **point.fast}, support)
                grads = torch.autograd.grad(
                    loss, list(point.fast.values()), create_graph=second_order
                )
                gradient = dict(zip(point.fast, grads, strict=True))
                inputs = self.adaptation.at(meta, ALPHA, s)
                point = self.adaptation.optimizer.update(point, gradient, inputs.rates, inputs.t)
            query = _of_task(self.batch.query, task)
            total = total + self.objective.kl_at({**slow, **point.fast}, query)
        return total


def _of_task(experience: Any, task: int) -> Any:
    past = type(experience.trajectories)(*(part[task] for part in experience.trajectories))
    return type(experience)(past, experience.advantages[task])


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize(
    "choices",
    [
        {"steps": 0},
        {"steps": 1},
        {"steps": 2, "rates": "per-parameter"},
        {"steps": 2, "adapted": ("head",)},
        {"steps": 2, "adapted": ("body",), "optimizer": "momentum"},
        {"steps": 2, "optimizer": "momentum"},
        {"steps": 2, "optimizer": "adam", "rates": "per-parameter"},
    ],
    ids=str,
)
def test_fisher_product_is_the_hessian_of_the_kl(
    choices: dict[str, Any], second_order: bool
) -> None:
    small = Small(**choices)
    flat = small.layout.join(small.meta)
    torch.manual_seed(1)
    direction = torch.randn_like(flat)
    explicit = hessian(lambda f: small.kl(small.layout.split(f), second_order), flat)
    assert isinstance(explicit, Tensor)
    product = fisher_product(
        small.objective,
        small.adaptation,
        small.meta,
        small.batch,
        ALPHA,
        small.layout.split(direction),
        second_order=second_order,
    )
    assert float(explicit.norm()) > 1e-3
    torch.testing.assert_close(small.layout.join(product), explicit @ direction)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_fisher_products_may_be_estimated_from_fewer_trajectories(
    moving: dict[str, Any], count: int
) -> None:
    """Those of a run that collects no more than that, but for the advantages, which are of all."""
    experiment = experiment_of(moving, reinforcement={"fisher_trajectories": count})
    computer = ChunkComputer(experiment, compile=False)
    theta = flat_vector(initial_parameters(experiment))
    found = computer.run(theta, FisherJob(0, Span(0, 1)), theta).gradient
    batch = computer.collect(theta, "train", 4, steps=1).batch
    kept = min(count, 8)
    fewer = batch.fewer(count)
    wholes, parts = ((*of.support.steps, of.query) for of in (batch, fewer))
    for whole, part in zip(wholes, parts, strict=True):
        torch.testing.assert_close(part.advantages, whole.advantages[:, :kept])
        torch.testing.assert_close(part.trajectories.mask, whole.trajectories.mask[:, :kept])
        torch.testing.assert_close(part.trajectories.task, whole.trajectories.task)
    model = model_of(experiment)
    meta = initial_parameters(experiment)
    product = fisher_product(
        PolicyObjective(model, GAUSSIAN, "lvc"),
        Adaptation.of(model, steps=1),
        meta,
        fewer,
        torch.tensor(0.1),
        meta,
        second_order=True,
    )
    np.testing.assert_allclose(found, Layout.of(meta).join(product).numpy(), rtol=1e-4, atol=1e-6)


def test_before_the_step_the_kl_is_zero_and_then_it_is_the_one_written_out() -> None:
    small = Small(1)
    same = evaluate_candidate(small.objective, small.adaptation, small.meta, small.batch, ALPHA)
    torch.testing.assert_close(same.kl, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    moved = {name: value + 0.05 for name, value in small.meta.items()}
    found = evaluate_candidate(small.objective, small.adaptation, moved, small.batch, ALPHA)
    needing = {name: value.requires_grad_() for name, value in moved.items()}
    assert float(found.kl.sum()) == pytest.approx(float(small.kl(needing).detach()), rel=1e-9)
    assert (found.kl > 1e-5).all()


@pytest.mark.parametrize(
    ("steps", "choices"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (2, {"not_adapted": ["network.0.*"], "per_step": ["network.0.*"]}),
    ],
)
def test_proximal_gradient_is_that_of_loss_and_inner_kl(
    steps: int, choices: dict[str, Any]
) -> None:
    """Away from where the trajectories were collected, against numerical derivatives."""
    small, weight = Small(steps, **choices), 0.3
    # Values that differ from step to step, where there is one for every step.
    flat = small.layout.join(small.meta)
    flat = flat + 0.03 * torch.arange(len(flat), dtype=flat.dtype).cos()

    def value(flat: Tensor) -> float:
        meta = small.layout.split(flat)
        loss = evaluate_candidate(
            small.objective, small.adaptation, meta, small.batch, ALPHA
        ).surrogate.sum()
        inner = torch.zeros((), dtype=torch.float64)
        on_the_way = adapt(
            small.objective, small.adaptation, meta, small.batch.support, ALPHA, steps, 3
        )
        for (fast, slow), support in zip(on_the_way, small.batch.support.steps, strict=False):
            shared = {name: value.expand(3, *value.shape) for name, value in slow.items()}
            inner += torch.vmap(small.objective.kl_at)({**shared, **fast}, support).sum() / steps
        return float(loss + weight * inner)

    found = proximal_gradient(
        small.objective,
        small.adaptation,
        small.layout.split(flat),
        small.batch,
        ALPHA,
        second_order=True,
        inner_kl_weight=weight,
    )
    measured = small.layout.join(found.gradient)
    for i in range(0, len(flat), 5):
        bump = torch.zeros_like(flat)
        bump[i] = 1e-5
        numerical = (value(flat + bump) - value(flat - bump)) / 2e-5
        assert float(measured[i]) == pytest.approx(numerical, rel=1e-4, abs=1e-7)
