"""Runs against each other: paired on the same tasks, and only on the same."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.console import curves_table, out
from pipeline.config.loading import ConfigError, load_run
from pipeline.evaluation.comparison import compare_runs, difference
from pipeline.training.loop import train
from tests.commands import maml
from tests.conftest import experiment_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {
        "task": {"kind": "sinusoid", "shots": 5, "queries": 5},
        "model": {"kind": "mlp", "hidden": [8]},
        "outer": {"lr": 0.01, "iterations": 4, "tasks_per_batch": 6},
        "compute": {"compile": "never", "device": "cpu", "threads": 1},
        "cluster": {"workers": 0},
        "evaluation": {"tasks": 40, "validation_tasks": 4, "steps": [0, 1, 3]},
        "tracking": {"enabled": False},
    }
    for name, inner in (("one", {"lr": 0.01}), ("other", {"lr": 0.1, "order": "first"})):
        train(experiment_of({**settings, "name": name}, inner=inner), folder / name)
    train(experiment_of({**settings, "name": "one"}, task={"shots": 9}), folder / "shots")
    return folder


def test_a_difference_is_taken_task_by_task() -> None:
    rng = np.random.default_rng(0)
    hard = 10 * rng.normal(size=100)  # what makes tasks differ cancels
    one, other = hard + 0.3 + 0.1 * rng.normal(size=100), hard
    found = difference("one", one[None], "other", other[None])
    paired = one - other
    assert found.mean == pytest.approx([paired.mean()])
    assert found.ci95 == pytest.approx([1.96 * paired.std(ddof=1) / 10])
    assert found.ci95[0] < 0.1
    assert found.p[0] < 1e-6
    # The p-value of a difference at the edge of its 95 % interval is 5 %.
    edge = paired - paired.mean() + 1.96 * paired.std(ddof=1) / 10
    assert difference("a", edge[None], "b", np.zeros((1, 100))).p[0] == pytest.approx(
        0.05, abs=1e-4
    )


def test_a_run_against_itself(runs: Path) -> None:
    (found,) = compare_runs([runs / "one", runs / "one"])
    assert found.differences[0].mean == [0.0, 0.0, 0.0]
    assert found.differences[0].p == [1.0, 1.0, 1.0]


def test_curves_are_those_of_evaluate(runs: Path) -> None:
    (found,) = compare_runs([runs / "one", runs / "other"])
    assert [curve.who for curve in found.curves] == ["one", "other"]
    for curve in found.curves:
        (trained, _) = json.loads((runs / curve.who / "results.json").read_text())
        assert curve.mean["loss"] == pytest.approx(trained["mean"]["loss"])
        assert curve.ci95["loss"] == pytest.approx(trained["ci95"]["loss"])
    one, other = (np.array(curve.mean["loss"]) for curve in found.curves)
    assert found.differences[0].mean == pytest.approx(other - one)


def test_other_tasks_are_refused_by_name(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.shots: 5 in .*, 9 in .*--set task\.shots="):
        compare_runs([runs / "one", runs / "shots"])
    (found,) = compare_runs([runs / "one", runs / "shots"], overrides=["task.shots=7"])
    assert found.curves[0].protocol["shots"] == found.curves[1].protocol["shots"] == 7


def test_what_every_variant_sets_is_no_reason_to_refuse_and_cannot_be_overridden(
    runs: Path,
) -> None:
    variants = "evaluation.variants={few: {shots: 3}, more: {shots: 4, queries: 6}}"
    found = compare_runs([runs / "one", runs / "shots"], overrides=[variants])
    assert [[c.protocol["shots"] for c in each.curves] for each in found] == [[3, 3], [4, 4]]
    with pytest.raises(ConfigError, match=r"--set task\.shots: .*\(few, more\) sets shots; add"):
        compare_runs([runs / "one", runs / "shots"], overrides=[variants, "task.shots=7"])
    # A setting of some of them counts for the others.
    one, other = compare_runs([runs / "one"] * 2, overrides=[variants, "task.queries=9"])
    assert [each.curves[0].protocol["queries"] for each in (one, other)] == [9, 6]


def test_a_setting_that_every_variant_sets_is_refused_by_evaluate(
    runs: Path, tmp_path: Path
) -> None:
    several = (
        "evaluate",
        str(runs / "one"),
        "--json",
        "--set",
        "evaluation.variants={few: {shots: 3}}",
    )
    refused = maml(*several, "--set", "task.shots=7", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--set task.shots: changes nothing" in refused.stderr
    (advice,) = re.findall(r"add --set '(.*)' to test without", refused.stderr)
    done = maml(*several, "--set", "task.shots=7", "--set", advice, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    curves = json.loads(done.stdout)
    assert {(curve["variant"], curve["protocol"]["shots"]) for curve in curves} == {("", 7)}


def test_other_data_are_refused(tmp_path: Path) -> None:
    """Two stores of one name, in two folders."""
    settings: dict[str, Any] = {
        "name": "own",
        "task": {"kind": "image-folder", "store": "own", "ways": 2, "shots": 1, "queries": 1},
        "model": {"kind": "mlp", "hidden": [4]},
        "outer": {"iterations": 1, "tasks_per_batch": 2},
        "compute": {"compile": "never", "device": "cpu", "threads": 1},
        "cluster": {"workers": 0},
        "evaluation": {"tasks": 2, "validation_tasks": 2},
        "tracking": {"enabled": False},
    }
    for name, shade in (("one", 10), ("other", 200)):
        for number in range(9):
            folder = tmp_path / name / "images" / f"class-{number}"
            folder.mkdir(parents=True)
            for drawing in range(3):
                pixels = np.full((6, 6), shade + 5 * number + drawing, np.uint8)
                Image.fromarray(pixels).save(folder / f"{drawing}.png")
        source, root = str(tmp_path / name / "images"), str(tmp_path / name / "data")
        given = ("data", "prepare", "images", "--source", source, "--name", "own")
        done = maml(*given, "--split", "3/3/3", "--root", root, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        train(experiment_of({**settings, "data": {"root": root}}), tmp_path / f"run-{name}")
    with pytest.raises(ConfigError, match=r"data\.root: .* are not the same"):
        compare_runs([tmp_path / "run-one", tmp_path / "run-other"])


def test_the_command(runs: Path, tmp_path: Path) -> None:
    arguments = [str(runs / name) for name in ("one", "other")]
    done = maml("compare", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"other .*\n minus one ", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "p = " in done.stdout or "p < " in done.stdout
    # What makes them adapt differently is said, and no name is cut in the middle of a word.
    assert re.search(r"inner lr +0\.01 +0\.1 ", done.stdout)
    assert re.search(r"algorithm +maml +fomaml ", done.stdout)
    assert f"plot  runs{os.sep}comparison.png" in done.stdout
    assert (tmp_path / "runs" / "comparison.png").exists()
    done = maml("compare", *arguments, "--json", "--plot", "x.png", cwd=tmp_path)
    (found,) = json.loads(done.stdout)
    assert len(found["curves"]) == 2
    assert (tmp_path / "x.png").exists()
    alone = maml("compare", arguments[0], cwd=tmp_path)
    assert alone.returncode == 2
    assert "two runs or more" in alone.stderr
    plot = maml("compare", *arguments, "--plot", "x.txt", cwd=tmp_path)
    assert plot.returncode == 2
    assert "--plot" in plot.stderr
    (tmp_path / "taken").touch()
    taken = maml("compare", *arguments, cwd=tmp_path, MAML_RUNS=str(tmp_path / "taken"))
    assert taken.returncode == 2
    assert f"cannot write to {tmp_path / 'taken'}: " in taken.stderr
    assert "choose another place with --plot FILE" in taken.stderr
    assert "meta-test of" not in taken.stderr, "said before anything is computed"
    nowhere = maml("compare", arguments[0], "nowhere", cwd=tmp_path)
    assert nowhere.returncode == 2
    assert "nowhere is not the folder of a run: there is no such folder" in nowhere.stderr


def test_long_names_break_at_their_hyphens(runs: Path) -> None:
    (found,) = compare_runs([runs / "one", runs / "other"])
    name = "sinusoid-pretrained-20261123-062810-again"
    renamed = [dataclasses.replace(found.curves[0], who=name, steps=tuple(range(3)))]
    with out.capture() as captured:
        out.print(curves_table(load_run(runs / "one").build_task(), renamed), width=80)
    lines = captured.get().splitlines()
    assert lines[0].startswith("MSE after n gradient steps on 40 test tasks, ± CI95")
    assert any(line.startswith(" sinusoid-pretrained-20261123-062810-  ") for line in lines)
    assert any(line.startswith(" again ") for line in lines)
