"""Meta-test: curves against slow obvious code, their intervals, and the real data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cluster.group import InProcess
from pipeline.evaluation.meta_test import (
    EvaluationSpec,
    adaptation_curve_of,
    evaluate_run,
    meta_test,
)
from pipeline.maml.flat_vector import flat_vector
from pipeline.runs.checkpoint import CheckpointStore
from pipeline.training.loop import train
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import EvaluationJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.task_source import EVALUATION_SEED
from tasks.glyphs import prepare_glyphs
from tasks.image_folder import prepare_images
from tasks.omniglot import prepare_omniglot
from tasks.quadratic import Quadratic
from tests.conftest import experiment_of


@pytest.fixture
def quadratic(quick: dict[str, Any]) -> dict[str, Any]:
    return {
        **quick,
        "task": {"kind": "quadratic", "dimensions": 3},
        "model": {"kind": "linear"},
        "inner": {"lr": 0.3, "steps": 1},
        "compute": {**quick["compute"], "dtype": "float64"},
    }


def test_curve_and_interval_have_a_closed_form(quadratic: dict[str, Any]) -> None:
    """½ (θ_s − c)ᵀΛ(θ_s − c) with θ_s − c = (I − αΛ)^s (θ − c); 1.96 sd/√n over the tasks."""
    experiment = experiment_of(quadratic)
    theta = initial_parameters(experiment)
    flat = flat_vector(theta)
    steps = (0, 1, 4, 12)
    with InProcess(experiment, compile=False) as workers:
        curve = adaptation_curve_of(workers, experiment, flat, EvaluationSpec("test", 25, steps))
    task = experiment.build_task()
    assert isinstance(task, Quadratic)
    optima = task.optima(EVALUATION_SEED, "test", np.arange(25))
    for position, step in enumerate(steps):
        distance = (1 - 0.3 * task.curvatures) ** step * (flat - optima)
        losses = 0.5 * (task.curvatures * distance**2).sum(1)
        assert curve.mean["loss"][position] == pytest.approx(losses.mean(), rel=1e-9)
        half = 1.96 * losses.std(ddof=1) / 5
        assert curve.ci95["loss"][position] == pytest.approx(half, rel=1e-9)


def test_chunks_of_any_size_give_the_same_curve(quadratic: dict[str, Any]) -> None:
    curves = []
    for chunk in (1, 4, 10):
        experiment = experiment_of(quadratic, outer={"tasks_per_chunk": chunk})
        theta = initial_parameters(experiment)
        spec = EvaluationSpec("test", 10, (0, 2))
        with InProcess(experiment, compile=False) as workers:
            curves.append(adaptation_curve_of(workers, experiment, flat_vector(theta), spec))
    for curve in curves[1:]:
        assert curve.mean["loss"] == pytest.approx(curves[0].mean["loss"], rel=1e-12)


def test_evaluation_changes_nothing(quick: dict[str, Any]) -> None:
    """Not θ, and not the numbers of a second evaluation."""
    experiment = experiment_of(quick)
    computer = ChunkComputer(experiment, compile=False)
    theta = initial_parameters(experiment)
    flat = flat_vector(theta)
    before = flat.copy()
    job = EvaluationJob("test", 0, 4, (0, 5))
    first, second = computer.run(flat, job), computer.run(flat, job)
    assert np.array_equal(flat, before)
    assert np.array_equal(first.metrics["loss"], second.metrics["loss"])


def test_meta_test_has_variants_and_baselines(quick: dict[str, Any]) -> None:
    experiment = experiment_of(
        quick,
        evaluation={
            "variants": {"far": {"query_x_range": [5.0, 9.0]}, "near": {"shots": 2}},
            "baselines": ["random-init", "oracle"],
        },
    )
    theta = initial_parameters(experiment)
    with InProcess(experiment, compile=False) as workers:
        curves = meta_test(workers, experiment, flat_vector(theta))
    assert [(c.variant, c.who) for c in curves] == [
        (variant, who)
        for variant in ("far", "near")
        for who in ("trained", "random init", "oracle")
    ]
    assert curves[0].protocol["query_x_range"] == [5.0, 9.0]
    assert curves[3].protocol["shots"] == 2
    assert curves[2].mean["loss"] == [0.0, 0.0, 0.0]
    assert curves[0].mean["loss"] != curves[1].mean["loss"]


def test_the_test_tasks_do_not_depend_on_the_run(quick: dict[str, Any]) -> None:
    results = []
    for seed in (0, 7):
        experiment = experiment_of({**quick, "seed": seed})
        computer = ChunkComputer(experiment, compile=False)
        theta = {name: torch.zeros_like(p) for name, p in initial_parameters(experiment).items()}
        flat = flat_vector(theta)
        results.append(computer.run(flat, EvaluationJob("test", 0, 5, (0,))).metrics["loss"])
    assert np.array_equal(results[0], results[1])


def test_the_best_is_chosen_at_the_chosen_step(quick: dict[str, Any], tmp_path: Path) -> None:
    """Validation reports the selection step even where `evaluation.steps` leaves it out."""
    experiment = experiment_of(
        quick, evaluation={"steps": [0, 3], "selection_step": 2, "every": 1}, checkpoint={"keep": 1}
    )
    train(experiment, tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    values = {
        line["iteration"]: line["validation/loss_step2"]
        for line in lines
        if "validation/loss_step2" in line
    }
    best = CheckpointStore.of_run(experiment, tmp_path / "run").best()
    assert best is not None
    assert best.best is not None
    assert best.best["value"] == min(values.values())
    assert values[best.iteration] == min(values.values())
    curves = [
        evaluate_run(
            experiment, tmp_path / "run", split="test", num_tasks=4, steps=(2,), checkpoint=which
        )[0]
        for which in ("final", "best")
    ]
    assert (curves[0].mean == curves[1].mean) == (best.iteration == 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"kind": "glyphs", "ways": 5000}}, "ways: "),
        (
            {"task": {"kind": "glyphs"}, "evaluation": {"variants": {"w": {"ways": 3}}}},
            "variants.w",
        ),
        ({"task": {"kind": "glyphs"}, "evaluation": {"baselines": ["oracle"]}}, "no oracle"),
    ],
)
def test_what_cannot_be_tested_is_refused_at_the_start(
    change: dict[str, Any], message: str, quick: dict[str, Any], tmp_path: Path
) -> None:
    data = {"root": str(tmp_path / "data")}
    prepare_glyphs(tmp_path / "data", num_classes=80)
    change["task"]["num_classes"] = 80
    settings = {**quick, "model": {"kind": "conv4", "filters": 4}, "data": data, **change}
    with pytest.raises(ValueError, match=message):
        train(experiment_of(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_omniglot_through_actors(
    quick: dict[str, Any], tmp_path: Path, real_data: Path, ray_local: None
) -> None:
    """Real characters, real actors: a short training beats the random initialisation by far."""
    prepare_omniglot(real_data / "omniglot", tmp_path / "data")
    experiment = experiment_of(
        {
            **quick,
            "task": {
                "kind": "omniglot",
                "ways": 5,
                "shots": 1,
                "queries": 1,
                "rotations": "none",
            },
            "model": {"kind": "conv4", "filters": 16},
            "data": {"root": str(tmp_path / "data")},
        },
        inner={"lr": 0.4, "steps": 1},
        outer={"iterations": 60, "tasks_per_batch": 8, "tasks_per_chunk": 4, "lr": 0.005},
        cluster={"workers": 2},
        evaluation={"tasks": 60},
    )
    trained, random = train(experiment, tmp_path / "run")
    assert trained.mean["accuracy"][1] > random.mean["accuracy"][1] + 0.1
    assert trained.mean["accuracy"][1] > 0.5
    assert trained.protocol["rotations"] == "none"
    assert trained.protocol["queries"] == 1
    assert "batch" in trained.protocol["normalisation"]


def test_own_colour_images(quick: dict[str, Any], tmp_path: Path, real_data: Path) -> None:
    archive = real_data / "grocery" / "grocery_32.zip"
    prepare_images(archive, tmp_path / "data", "groceries", split="51/10/20")
    experiment = experiment_of(
        {
            **quick,
            "task": {"kind": "image-folder", "store": "groceries", "queries": 3},
            "model": {"kind": "conv4", "filters": 8, "downsample": "max-pool", "head": "flatten"},
            "data": {"root": str(tmp_path / "data")},
        },
        outer={"iterations": 2, "tasks_per_batch": 4, "tasks_per_chunk": 2},
    )
    trained, _ = train(experiment, tmp_path / "run")
    assert 0 <= trained.mean["accuracy"][0] <= 1
    assert trained.protocol["ways"] == 5
