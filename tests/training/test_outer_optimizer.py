"""The outer update: torch's optimisers and schedules, clipped, and resumed where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.lr_schedulers import schedulers
from pipeline.training.outer_optimizer import OuterOptimizer
from tests.conftest import experiment_of


def test_clipping_and_schedule(quick: dict[str, Any]) -> None:
    outer = experiment_of(
        quick,
        outer={
            "optimizer": "sgd",
            "lr": 1.0,
            "clip_norm": 2.0,
            "scheduler": "CosineAnnealingLR",
            "iterations": 4,
        },
    ).outer
    optimizer = OuterOptimizer({"w": torch.zeros(4)}, outer)
    norm = optimizer.step(torch.full((4,), 10.0))
    assert norm == pytest.approx(20.0), "the norm before clipping is reported"
    assert torch.linalg.vector_norm(optimizer.flat).item() == pytest.approx(2.0)
    for _ in range(3):
        optimizer.step(torch.zeros(4))
    assert optimizer.lr == pytest.approx(0.0, abs=1e-12)
    by_value = OuterOptimizer(
        {"w": torch.zeros(2)}, outer.model_copy(update={"clip_norm": None, "clip_value": 0.5})
    )
    by_value.step(torch.tensor([3.0, -0.1]))
    assert by_value.flat.tolist() == pytest.approx([-0.5, 0.1])


@pytest.mark.parametrize("name", schedulers())
def test_every_schedule_is_resumed_where_it_was(name: str, quick: dict[str, Any]) -> None:
    arguments = {
        "OneCycleLR": {"max_lr": 0.1},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
        "CosineAnnealingWarmRestarts": {"T_0": 3},
        "StepLR": {"step_size": 2},
        "MultiStepLR": {"milestones": [2, 5]},
        "ExponentialLR": {"gamma": 0.5},
    }.get(name, {})
    outer = experiment_of(
        quick, outer={"iterations": 9, "scheduler": name, "scheduler_args": arguments}
    ).outer
    straight, resumed = (OuterOptimizer({"w": torch.ones(3)}, outer) for _ in range(2))
    rates = []
    for step in range(9):
        gradient = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
        straight.step(gradient)
        resumed.step(gradient)
        rates.append(straight.lr)
        fresh = OuterOptimizer({"w": torch.ones(3)}, outer)
        fresh.restore(resumed.tensors(), resumed.scheduler_state())
        resumed = fresh
        assert resumed.lr == straight.lr
        assert torch.equal(resumed.flat, straight.flat)
    assert len(set(rates)) > 1 or name == "ConstantLR"


def test_a_finished_schedule_goes_on_when_the_run_is_continued(quick: dict[str, Any]) -> None:
    """At the end of a cosine the rate is 0; with more iterations the longer cosine counts."""
    short, long = (
        experiment_of(quick, outer={"iterations": n, "scheduler": "CosineAnnealingLR"}).outer
        for n in (4, 8)
    )
    finished = OuterOptimizer({"w": torch.ones(2)}, short)
    for _ in range(4):
        finished.step(torch.ones(2))
    assert finished.lr == pytest.approx(0.0, abs=1e-12)
    continued = OuterOptimizer({"w": torch.ones(2)}, long)
    continued.restore(finished.tensors(), finished.scheduler_state())
    assert continued.lr == pytest.approx(long.lr / 2)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_outer_update_equals_torch_per_parameter(optimizer: str, quick: dict[str, Any]) -> None:
    """One flat vector to the optimiser is the same as a tensor per parameter; state survives."""
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    outer = experiment_of(
        quick, outer={"optimizer": optimizer, "weight_decay": 0.1, **momentum}
    ).outer
    generator = torch.Generator().manual_seed(0)
    theta = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    reference = [torch.nn.Parameter(p.clone()) for p in theta.values()]
    factory = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    torch_optimizer: Any = factory[optimizer](reference, lr=outer.lr, weight_decay=0.1, **momentum)  # type: ignore[operator]
    outer_optimizer = OuterOptimizer(theta, outer)
    for step in range(6):
        gradients = {n: torch.randn(p.shape, generator=generator) for n, p in theta.items()}
        outer_optimizer.step(outer_optimizer.layout.join(gradients))
        for parameter, gradient in zip(reference, gradients.values(), strict=True):
            parameter.grad = gradient
        torch_optimizer.step()
        if step == 2:
            restored = OuterOptimizer(theta, outer)
            restored.restore(outer_optimizer.tensors(), outer_optimizer.scheduler_state())
            outer_optimizer = restored
    for ours, theirs in zip(outer_optimizer.theta.values(), reference, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
