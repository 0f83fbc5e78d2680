"""Analysis: what must be so by construction, the words that follow from numbers, the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from pipeline.evaluation.analysis import ALL, BODY, CENTROID, HEAD, NONE, Analysis, analysis_of
from pipeline.evaluation.analysis_finding import finding
from pipeline.evaluation.analysis_page import ability_rows, layer_rows, write_analysis
from pipeline.evaluation.meta_test import evaluate_run
from pipeline.maml.confidence import Estimate
from pipeline.runs.catalog import find_run
from pipeline.runs.mlflow_sender import client_class
from pipeline.training.loop import train
from pipeline.worker.learner import initial_parameters
from tests.commands import maml
from tests.conftest import experiment_of


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "name": "small",
        "task": {"kind": "glyphs", "ways": 3, "shots": 1, "queries": 2, "num_classes": 40},
        "model": {"kind": "conv4", "filters": 8},
        "inner": {"lr": 0.5, "steps": 2},
        "outer": {"lr": 0.005, "iterations": 4, "tasks_per_batch": 4},
        "compute": {"compile": "never", "device": "cpu", "threads": 1},
        "cluster": {"workers": 0},
        "evaluation": {"tasks": 12, "validation_tasks": 4, "steps": [0, 2]},
        "tracking": {"enabled": False},
        "data": {"root": str(tmp_path_factory.mktemp("data"))},
    }


def test_what_does_not_adapt_does_not_change(glyphs: dict[str, Any]) -> None:
    experiment = experiment_of({**glyphs, "algorithm": "anil"})
    found = analysis_of(experiment, initial_parameters(experiment), num_tasks=6)
    *body, head = found.layers
    assert len(body) == 4
    for layer in body:
        assert layer.cka.mean == pytest.approx(1)
        assert layer.moved == Estimate(0.0, 0.0)
    assert head.moved.mean > 0
    assert head.cka.mean < 1
    # Only the head adapts anyway.
    assert found.abilities[HEAD] == found.abilities[ALL]
    assert found.abilities[BODY] == found.abilities[NONE]
    assert set(found.abilities) == {NONE, ALL, HEAD, BODY, CENTROID}


def test_abilities_are_those_of_evaluations(glyphs: dict[str, Any], tmp_path: Path) -> None:
    experiment = experiment_of(glyphs)
    train(experiment, tmp_path / "run")
    from pipeline.runs.folder import parameters_of

    theta = parameters_of(experiment, tmp_path / "run")
    found = analysis_of(experiment, theta, num_tasks=12, queries=2)
    (curve, _) = evaluate_run(
        experiment, tmp_path / "run", split="test", num_tasks=12, steps=(0, 2)
    )
    for position, name in enumerate((NONE, ALL)):
        assert found.abilities[name].mean == pytest.approx(curve.mean["accuracy"][position])
        assert found.abilities[name].ci95 == pytest.approx(curve.ci95["accuracy"][position])
    for name, adapted in ((HEAD, "head"), (BODY, "body")):
        part = experiment_of(glyphs, inner={"adapted": [adapted]})
        (curve, _) = evaluate_run(part, tmp_path / "run", split="test", num_tasks=12, steps=(2,))
        assert found.abilities[name].mean == pytest.approx(curve.mean["accuracy"][0])
    # The ends of the way are the losses before and after.
    (curve, _) = evaluate_run(
        experiment, tmp_path / "run", split="test", num_tasks=12, steps=(0, 2)
    )
    mean = torch.tensor(found.paths).mean(0)
    assert float(mean[0]) == pytest.approx(curve.mean["loss"][0], rel=1e-5)
    assert float(mean[10]) == pytest.approx(curve.mean["loss"][1], rel=1e-5)


def test_more_queries_for_the_representations(glyphs: dict[str, Any]) -> None:
    experiment = experiment_of(glyphs)
    found = analysis_of(experiment, initial_parameters(experiment), num_tasks=2, queries=10)
    assert found.changes == {"queries": 10}
    default = analysis_of(experiment, initial_parameters(experiment), num_tasks=2)
    assert default.changes == {"queries": 15}
    many = experiment_of(glyphs, task={"shots": 10})
    assert analysis_of(many, initial_parameters(many), num_tasks=2).changes == {}
    with pytest.raises(ValueError, match=r"shots: .* need 41 images"):
        analysis_of(experiment, initial_parameters(experiment), num_tasks=2, queries=40)


def test_every_algorithm_can_be_analysed(glyphs: dict[str, Any]) -> None:
    for algorithm in ("boil", "meta-sgd", "maml++", "reptile"):
        experiment = experiment_of({**glyphs, "algorithm": algorithm})
        found = analysis_of(experiment, initial_parameters(experiment), num_tasks=3, queries=3)
        assert ALL in found.abilities
        assert finding(found).startswith("Adaptation in ")


def test_regression_has_no_centroids(quick: dict[str, Any], tmp_path: Path) -> None:
    experiment = experiment_of(quick)
    found = analysis_of(experiment, initial_parameters(experiment), num_tasks=5)
    assert set(found.abilities) == {NONE, ALL, HEAD, BODY}
    assert found.metric == "loss"
    # What is lost is counted so that more is worse.
    worse = found.abilities[HEAD].mean - found.abilities[ALL].mean
    assert found.lost[HEAD].mean == pytest.approx(worse)
    assert ability_rows(found)[0] == ["what adapts", "loss", "loss above 'as trained'"]
    write_analysis(experiment, found, tmp_path)
    page = (tmp_path / "analysis" / "index.html").read_text()
    assert "the final parameters" in page
    assert "centroid" not in page


def made_up(**abilities: float) -> Analysis:
    def estimate(mean: float) -> Estimate:
        return Estimate(mean, 0.01)

    names = {"none": NONE, "all": ALL, "head": HEAD, "body": BODY, "centroid": CENTROID}
    values = {names[key]: estimate(value) for key, value in abilities.items()}
    full = values[ALL].mean
    from pipeline.evaluation.analysis import LayerChange

    return Analysis(
        "accuracy",
        3,
        100,
        "test",
        {},
        [
            LayerChange("1", "Conv", estimate(0.99), estimate(0.98), estimate(0.001)),
            LayerChange("2", "Linear", estimate(0.3), estimate(0.4), estimate(0.5)),
        ],
        values,
        {name: estimate(full - v.mean) for name, v in values.items() if name != ALL},
        [[2.0 - 0.1 * i for i in range(16)]] * 4,
        higher_is_better=True,
    )


def with_body(analysis: Analysis, *, cka: float, moved: float = 0.02) -> Analysis:
    """The same, had the body changed by this."""
    body, head = analysis.layers
    changed = replace(body, cka=Estimate(cka, 0.01), moved=Estimate(moved, 0.01))
    return replace(analysis, layers=[changed, head])


def test_the_finding_follows_from_the_numbers() -> None:
    reuse = made_up(none=0.2, all=0.95, head=0.94, body=0.5, centroid=0.95)
    text = finding(reuse)
    assert "This is feature reuse: the body serves new tasks as it is." in text
    assert "from 20.00 ± 1.00 % to 95.00 ± 1.00 %" in text
    assert "keeps 99 % of the gain" in text
    assert "look alike before and after (the lowest CKA of a layer is 0.99)" in text
    assert "parameters move by up to 0.10 ± 1.00 %; the head's move by 50.00 ± 1.00 %" in text
    assert "never rises on 100 % of the tasks: they lie in one valley" in text
    assert "although adaptation changes it" in finding(with_body(reuse, cka=0.5))
    rapid = made_up(none=0.2, all=0.95, head=0.3, body=0.94, centroid=0.4)
    assert "rapid learning: the body itself changes" in finding(with_body(rapid, cka=0.5))
    could = finding(made_up(none=0.2, all=0.95, head=0.5, body=0.95, centroid=0.9))
    assert "could be reused as they are, as the nearest centroid shows; but" in could
    assert "It is both" in finding(made_up(none=0.2, all=0.95, head=0.6, body=0.6, centroid=0.5))
    assert "nothing to explain" in finding(made_up(none=0.5, all=0.5, head=0.5, body=0.5))
    hilly = replace(reuse, paths=[[1.0, *[5.0] * 9, 0.5, *[0.5] * 5]] * 4)
    assert "never rises on 0 % of the tasks." in finding(hilly)


def test_features_that_look_alike_may_carry_the_gain_all_the_same() -> None:
    """CKA weighs directions by their variance; the finding says both, and how they go together."""
    text = finding(made_up(none=0.2, all=0.95, head=0.23, body=0.94, centroid=0.4))
    assert "representations look alike" in text
    assert "This is rapid learning by small changes of the body" in text
    assert "those before adaptation keep 27 % of the gain" in text


def test_what_adapts_alone_explains_the_gain() -> None:
    """As in ANIL and BOIL, where one part is all that adapts."""
    head = with_body(made_up(none=0.2, all=0.9, head=0.9, body=0.2, centroid=0.4), cka=1, moved=0)
    assert "Only the head adapts, so this is feature reuse by construction." in finding(head)
    body = with_body(made_up(none=0.2, all=0.9, head=0.2, body=0.9, centroid=0.5), cka=0.3)
    assert "rapid learning" in finding(body)
    within_chance = made_up(none=0.5, all=0.505, head=0.505, body=0.5)
    assert "nothing to explain" in finding(within_chance)


def test_a_task_that_diverges_is_left_out(glyphs: dict[str, Any]) -> None:
    experiment = experiment_of(glyphs, inner={"lr": 1e30, "steps": 3})
    found = analysis_of(experiment, initial_parameters(experiment), num_tasks=3)
    finding(found)
    layer_rows(found)


def test_the_tables_and_the_page(
    quick: dict[str, Any], tmp_path: Path, drawn: list[Figure]
) -> None:
    analysis = made_up(none=0.2, all=0.95, head=0.94, body=0.5, centroid=0.95)
    assert layer_rows(analysis)[1][0] == "1 (Conv)"
    assert layer_rows(analysis)[2] == [
        "2 (Linear, head)",
        "0.30 ± 0.01",
        "0.40 ± 0.01",
        "50.00 ± 1.00 %",
    ]
    assert ability_rows(analysis)[0][2] == "accuracy below 'as trained' in %"
    assert ability_rows(analysis)[2] == [ALL, "95.00 ± 1.00", ""]
    still = replace(analysis.layers[0], moved=Estimate(0.0, 0.0))
    analysis = replace(analysis, layers=[still, *analysis.layers])
    files = write_analysis(experiment_of(quick), analysis, tmp_path, "best")
    likeness, moved = drawn[0].axes
    assert likeness.get_yscale() == "linear"
    assert moved.get_yscale() == "log"  # 0.1 % and 50 % on one axis
    assert [text.get_text() for text in moved.texts] == ["does not adapt"]
    labels = [text.get_text() for text in drawn[1].legends[0].get_texts()]
    assert labels == ["4 of the tasks", "mean of 4 tasks", "CI95"]
    page = (tmp_path / "analysis" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "feature reuse" in page
    assert f"Run {tmp_path}, the parameters that were best on validation" in page
    assert "Nearest centroid: no head either" in page
    assert "accuracy below &#x27;as trained&#x27; in %" in page
    assert {file.name for file in files} == {
        "index.html",
        "analysis.json",
        "layers.png",
        "paths.png",
    }
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert numbers["abilities"][ALL] == {"mean": 0.95, "ci95": 0.01}
    assert numbers["monotone_share"] == 1.0


def test_the_command_logs_the_page_to_the_run(glyphs: dict[str, Any], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiment = experiment_of(glyphs, tracking={"enabled": True, "uri": uri})
    train(experiment, tmp_path / "run")
    done = maml("analyze", str(tmp_path / "run"), "--tasks", "4", "--queries", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "what adapts" in done.stdout
    assert str(tmp_path / "run" / "analysis" / "index.html") in done.stdout
    run = find_run(str(tmp_path / "run"), None)
    logged = client_class()(uri).list_artifacts(run.run_id, "analysis")
    assert {Path(file.path).name for file in logged} >= {"index.html", "layers.png"}
    set_by_itself = ("--set", "task.queries=5")
    ignored = maml("analyze", str(tmp_path / "run"), *set_by_itself, cwd=tmp_path)
    assert ignored.returncode == 2
    assert "give --queries N" in ignored.stderr
    shutil.rmtree(tmp_path / "run" / "analysis")
    (tmp_path / "run" / "analysis").touch()
    taken = maml("analyze", str(tmp_path / "run"), cwd=tmp_path)
    assert taken.returncode == 2
    assert f"cannot write to {tmp_path / 'run' / 'analysis'}: File exists; " in taken.stderr
    assert "analysis of" not in taken.stderr, "said before anything is computed"
    bad = maml("analyze", str(tmp_path / "run"), "--split", "exam", cwd=tmp_path)
    assert bad.returncode == 2
    assert "--split" in bad.stderr
    assert "Value error" not in bad.stderr
