"""Outer optimisers of reinforcement learning: conjugate gradients, and whole steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.cluster.rounds import Total, total_of
from pipeline.config.experiment import Experiment
from pipeline.config.settings import Reinforcement
from pipeline.maml.flat_vector import FlatVector
from pipeline.training.aggregation import aggregate
from pipeline.training.outer_optimizer import OuterOptimizer
from pipeline.training.trust_region import Ask, Questions, conjugate_gradients, policy_update
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import ChunkJob, Cut, FisherJob, GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tests.conftest import experiment_of


def test_conjugate_gradients_solve() -> None:
    generator = np.random.default_rng(0)
    root = generator.normal(size=(12, 12))
    matrix, b = root @ root.T + np.eye(12), generator.normal(size=12)
    found = conjugate_gradients(lambda v: matrix @ v, b, iterations=12, tolerance=0)
    np.testing.assert_allclose(found.x, np.linalg.solve(matrix, b), rtol=1e-8)
    stuck = conjugate_gradients(lambda v: 0 * v, b, iterations=4)
    assert not stuck.x.any()
    few = conjugate_gradients(lambda v: matrix @ v, b, iterations=4)
    np.testing.assert_allclose(few.residual, b - matrix @ few.x, atol=1e-10)
    assert np.linalg.norm(few.residual) > np.linalg.norm(found.residual)


# Whole steps.


class Round:
    """A meta-batch, its gradient, and whoever answers questions about it."""

    def __init__(self, experiment: Experiment) -> None:
        self.computer = ChunkComputer(experiment, compile=False)
        self.optimizer = OuterOptimizer(initial_parameters(experiment), experiment.outer)
        self.before = self.optimizer.flat.numpy().copy()
        self.asked: list[ChunkJob] = []
        total = self.ask(lambda chunks: GradientJob(0, chunks))
        outer = experiment.outer
        self.mean = aggregate(total, Cut(outer.tasks_per_batch, outer.tasks_per_chunk or 1))
        self.settings = experiment.reinforcement or Reinforcement()

    def ask(self, question: Callable[[Span], ChunkJob], vector: FlatVector | None = None) -> Total:
        job = question(Span(0, self.computer.num_chunks))
        self.asked.append(job)
        result = self.computer.run(self.before, job, vector)
        return total_of([result], result.gradient, 0.0)

    def step(self) -> dict[str, float]:
        return policy_update(
            self.settings,
            self.optimizer,
            self.mean,
            Questions(0, self.ask),
        )


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.3])
def test_trust_region_is_kept(moving: dict[str, Any], max_kl: float) -> None:
    round = Round(experiment_of(moving, reinforcement={"max_kl": max_kl, "cg_iterations": 7}))
    metrics = round.step()
    assert sum(isinstance(job, FisherJob) for job in round.asked) == 7
    assert 0 < metrics["trpo/kl_after"] <= max_kl
    assert metrics["trpo/improvement"] > 0
    assert abs(metrics["trpo/kl_before"]) < 1e-6
    assert not np.array_equal(round.before, round.optimizer.flat.numpy())


def spoilt(honest: Ask, name: str, value: float) -> Ask:
    def ask(question: Callable[[Span], ChunkJob], vector: FlatVector) -> Total:
        total = honest(question, vector)
        if name in total.metrics:
            total.metrics[name] = np.full_like(total.metrics[name], value)
        return total

    return ask


def test_a_step_that_cannot_be_had_is_not_taken(
    moving: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate moves too far (or makes things worse): θ stays."""
    for name, value in {"kl": 1.0, "surrogate": 5.0}.items():
        round = Round(experiment_of(moving))
        monkeypatch.setattr(round, "ask", spoilt(round.ask, name, value))
        metrics = round.step()
        assert metrics["trpo/line_search_steps"] == 15
        assert metrics["trpo/kl_after"] == metrics["trpo/improvement"] == 0
        assert np.array_equal(round.before, round.optimizer.flat.numpy())


@pytest.mark.parametrize(
    ("settings", "moved_inside"),
    [
        ({"update": "promp", "outer_steps": 4}, True),
        ({"update": "promp", "outer_steps": 1}, False),
        ({"update": "gradient"}, False),
    ],
)
def test_steps_that_are_taken_unseen_stay_near_and_improve(
    moving: dict[str, Any], settings: dict[str, Any], moved_inside: bool
) -> None:
    round = Round(experiment_of({**moving, "reinforcement": settings}))
    metrics = round.step()
    name = settings["update"]
    assert abs(metrics[f"{name}/kl_before"]) < 1e-6
    assert 0 < metrics[f"{name}/kl_after"] < 0.1
    assert metrics[f"{name}/improvement"] > 0
    assert (metrics.get("promp/inner_kl", 0) > 0) == moved_inside
