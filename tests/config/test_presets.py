"""Algorithms as settings: presets, schedules, refusals, and the driver's promises for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.algorithms import FAMILY, PRESETS
from pipeline.config.loading import ConfigError, from_dict, load
from pipeline.config.phases import phases, query_weights_at
from pipeline.maml import compilation
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.flat_vector import Layout
from pipeline.training.endings import Interrupted
from pipeline.training.loop import train
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import EvaluationJob, GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tests.conftest import experiment_of
from tests.helpers import Recorder, final_theta

pytestmark = pytest.mark.long

# Schedules.


def plus_plus(quick: dict[str, Any], **outer: Any) -> Any:
    settings = {
        **quick,
        "algorithm": "maml++",
        "inner": {"lr": 0.01, "steps": 5},
        "outer": {**quick["outer"], "iterations": 75_000, **outer},
    }
    return from_dict(settings)


@pytest.mark.parametrize("iteration", [0, 499, 500, 1700, 4499, 4999])
def test_query_weights_are_the_published_ones(quick: dict[str, Any], iteration: int) -> None:
    """As in Antoniou et al.'s code: epochs of 500 iterations, annealed over 10 of them."""
    epoch, steps = iteration // 500, 5
    early = max(1 / steps - epoch * (1 / steps / 10), 0.03 / steps)
    last = min(1 / steps + epoch * (steps - 1) * (1 / steps / 10), 1 - (steps - 1) * 0.03 / steps)
    measured = query_weights_at(plus_plus(quick), iteration)
    assert measured == pytest.approx([early] * 4 + [last])
    assert sum(measured) == pytest.approx(1)


def test_after_the_annealing_only_the_last_query_loss_counts(quick: dict[str, Any]) -> None:
    experiment = plus_plus(quick)
    assert query_weights_at(experiment, 5000) is None
    assert [tuple(phase) for phase in phases(experiment)] == [
        (False, True),
        (False, False),
        (True, False),
    ]
    assert experiment.second_order_from == 25_000
    # In a shorter run everything comes sooner; what is not reached is not made.
    assert len(phases(plus_plus(quick, iterations=3000))) == 3
    assert len(phases(plus_plus(quick, iterations=3000, query_losses_until=9000))) == 2


def test_annealing_switches_once_and_compiles_no_iteration_anew(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []
    trace = compilation.trace
    monkeypatch.setattr(compilation, "trace", lambda *a: graphs.append(trace(*a)) or graphs[-1])
    experiment = experiment_of(
        {**quick, "algorithm": "maml++"},
        inner={"second_order_from": 8},
        outer={"query_losses_until": 4, "iterations": 12},
        compute={"dtype": "float64"},
    )
    computer = ChunkComputer(experiment, compile=True)
    theta = Layout.of(initial_parameters(experiment)).join(initial_parameters(experiment)).numpy()
    computer.run(theta, GradientJob(0, Span(0, 1)))
    made = []
    for iteration in range(12):
        computer.run(theta, GradientJob(iteration, Span(0, 1)))
        made.append(len(graphs))
    assert made == [1] * 4 + [2] * 4 + [3] * 4
    first, second = (
        experiment_of(
            {**quick, "algorithm": "maml++"},
            inner={"order": order},
            outer={"query_losses": "last"},
            compute={"dtype": "float64"},
        )
        for order in ("first", "second")
    )
    for iteration, same in ((7, first), (8, second)):
        expected = ChunkComputer(same, compile=False).run(theta, GradientJob(0, Span(0, 1)))
        moved = computer.run(theta, GradientJob(iteration, Span(0, 1)))
        # Other tasks, so only the computation is compared: on the same tasks.
        function, _, knobs = computer.program(iteration)
        batch = ChunkComputer(same, compile=False).program()[1]
        gradient, _ = function(torch.from_numpy(theta), batch, knobs)
        np.testing.assert_allclose(gradient.numpy(), expected.gradient, rtol=1e-9, atol=1e-12)
        assert moved.gradient is not None


# The configuration.


def test_presets_say_what_the_papers_say() -> None:
    expanded = {name: load("omniglot-5w1s", [f"algorithm={name}"]) for name in PRESETS}
    assert expanded["maml"].inner.adapted == ("all",)
    assert expanded["fomaml"].inner.order == "first"
    assert expanded["anil"].inner.adapted == ("head",)
    assert expanded["boil"].inner.adapted == ("body",)
    assert expanded["meta-sgd"].inner.rates == "per-parameter"
    reptile = expanded["reptile"]
    assert (reptile.inner.optimizer, reptile.inner.beta1) == ("adam", 0.0)
    assert (reptile.outer.direction, reptile.outer.optimizer) == ("reptile", "sgd")
    assert (reptile.inner.lr, reptile.outer.lr, reptile.outer.scheduler) == (0.001, 1, "LinearLR")
    plus = expanded["maml++"]
    assert (plus.inner.rates, plus.inner.order) == ("per-layer-and-step", "annealed")
    assert plus.second_order_from == plus.outer.iterations // 3
    assert plus.inner.per_step == plus.inner.not_adapted == ("normalisation",)
    assert plus.outer.scheduler_args == {"eta_min": 1e-5}
    assert plus.model.settings["normalisation"] == "batch-affine"
    assert all(experiment.algorithm_name == name for name, experiment in expanded.items())


def test_what_the_experiment_says_wins_over_the_preset() -> None:
    experiment = load("omniglot-5w1s", ["algorithm=maml++", "inner.rates=fixed"])
    assert experiment.inner.rates == "fixed"
    assert experiment.inner.order == "annealed"
    assert experiment.algorithm_name == "custom"
    assert load("sinusoid", ["inner.order=first"]).algorithm_name == "fomaml"


def test_another_algorithm_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    """Also where the first one's settings are all written down, as in a resolved configuration."""
    path = tmp_path / "resolved.yaml"
    for first in PRESETS:
        path.write_text(load("omniglot-5w1s", [f"algorithm={first}"]).to_yaml())
        for second in set(PRESETS) - {first}:
            changed = load(str(path), [f"algorithm={second}"])
            fresh = load("omniglot-5w1s", [f"algorithm={second}"])
            assert all(changed.flat().get(key) == fresh.flat().get(key) for key in FAMILY)
            assert changed.algorithm_name == second
            same = ("outer.optimizer", "outer.scheduler", "model.normalisation")
            assert all(changed.flat()[key] == fresh.flat()[key] for key in same)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": {"second_order_from": 5}}, "inner.second_order_from: only annealed"),
        ({"outer": {"query_losses": [0.5, 0.5, 0.5]}}, "outer.query_losses: needs a weight"),
        ({"outer": {"query_losses": [0, 0]}}, "outer.query_losses: .* not all 0"),
        (
            {"algorithm": "meta-sgd", "outer": {"weight_decay": 0.1}},
            "outer.weight_decay: would pull the learned inner.rates to zero",
        ),
        (
            {"outer": {"direction": "reptile"}},
            "inner.order: reptile has no second order",
        ),
        (
            {"algorithm": "reptile", "inner": {"rates": "per-parameter"}},
            "inner.rates: reptile has no gradient",
        ),
        ({"algorithm": "mamal"}, "algorithm: "),
    ],
)
def test_nonsense_is_refused(quick: dict[str, Any], settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_of(
            quick | {k: v for k, v in settings.items() if k == "algorithm"},
            **{k: v for k, v in settings.items() if k != "algorithm"},
        )


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"adapted": ["nothing.*"]}, r"^inner.adapted: 'nothing.\*' matches no parameter; there"),
        ({"not_adapted": ["all"]}, "^inner.adapted: no parameter is left to adapt"),
        ({"per_step": ["head"]}, "^inner.per_step: .* cannot have a value for every step"),
    ],
)
def test_names_are_checked_against_the_model(
    quick: dict[str, Any], tmp_path: Path, inner: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(experiment_of(quick, inner=inner), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_parameters_of_no_layer_have_no_head() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"^adapted: .* slope, belongs to no layer"):
        Adaptation.of(Line(), steps=1, adapted=["head"])
    assert Adaptation.of(Line(), steps=1, adapted=["slope"]).fast == ("slope",)


def test_own_weights_count_for_a_single_step_too(quick: dict[str, Any]) -> None:
    experiment = experiment_of(quick, inner={"steps": 1}, outer={"query_losses": [0.5]})
    assert query_weights_at(experiment, 0) == (0.5,)


def test_variants_are_judged_by_their_own_loss(quick: dict[str, Any]) -> None:
    """A setting of the task may change its loss."""
    experiment = experiment_of({**quick, "task": {"kind": "tests.helpers:ScaledSinusoid"}})
    computer = ChunkComputer(experiment, compile=False)
    theta = Layout.of(initial_parameters(experiment)).join(initial_parameters(experiment)).numpy()
    losses = [
        computer.run(theta, EvaluationJob("test", 0, 3, (0,), changes)).metrics["loss"]
        for changes in ({}, {"scale": 10.0})
    ]
    np.testing.assert_allclose(losses[1], 10 * losses[0], rtol=1e-6)


# The contract of the driver, for every algorithm.


def of_algorithm(quick: dict[str, Any], name: str, **cluster: Any) -> Any:
    settings = {
        **quick,
        "algorithm": name,
        "model": {"kind": "mlp", "hidden": [6], "normalisation": "batch-affine"},
    }
    schedule = {"query_losses_until": 4} if name == "maml++" else {}
    inner = {"second_order_from": 3} if name == "maml++" else {}
    return experiment_of(settings, outer=schedule, inner=inner, cluster=cluster)


OWN_WAYS = ("maml++", "meta-sgd", "reptile")
"""What reaches a worker differs here: phases and weights, learned rates, another direction."""


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_bits_with_actors_and_after_an_interruption(
    name: str, quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    experiment = of_algorithm(quick, name)
    assert experiment.algorithm_name == name
    train(experiment, tmp_path / "alone")
    before = Layout.of(initial_parameters(experiment))
    assert final_theta(tmp_path / "alone").numel() == before.size
    if name in OWN_WAYS:
        train(of_algorithm(quick, name, workers=2), tmp_path / "actors")
        assert torch.equal(final_theta(tmp_path / "alone"), final_theta(tmp_path / "actors"))
    recorder = Recorder()
    with pytest.raises(Interrupted):
        train(
            experiment,
            tmp_path / "cut",
            watcher=recorder,
            should_stop=lambda: len(recorder.metrics) == 3,
        )
    train(experiment, tmp_path / "cut", resume=True)
    assert torch.equal(final_theta(tmp_path / "alone"), final_theta(tmp_path / "cut"))


@pytest.mark.parametrize("name", PRESETS)
def test_training_moves_towards_better_adaptation(
    name: str, quick: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**quick, "model": {"kind": "mlp", "hidden": [20], "init_std": None}}
    # Reptile's steps are short ones.
    schedule = {"iterations": 300} if name == "reptile" else {"iterations": 100, "lr": 0.01}
    inner = {"lr": 0.05} if name == "reptile" else {"lr": 0.02}
    settings["outer"] = {"tasks_per_batch": 10, **schedule}
    settings["inner"] = {"steps": 3, **inner}
    settings["task"] = {"kind": "sinusoid", "shots": 10, "queries": 10}
    settings["evaluation"] = {"tasks": 100, "steps": [3]}
    experiment = from_dict({**settings, "algorithm": name})
    trained, random = train(experiment, tmp_path / "run")
    assert trained.mean["loss"][0] < 0.95 * random.mean["loss"][0]
