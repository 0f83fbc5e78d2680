"""`maml runs`: a store written by real trainings and by a search, read and left as it was."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.runs.catalog import Run, compare, find_run, list_runs
from pipeline.runs.mlflow_sender import client_class
from pipeline.runs.mlflow_store import TrackingError
from pipeline.runs.tracker import MlflowTracker
from pipeline.training.loop import train
from tests.commands import maml
from tests.conftest import experiment_of
from tests.recorded import record

SETTINGS: dict[str, Any] = {
    "name": "quick",
    "task": {"kind": "sinusoid", "shots": 5, "queries": 5},
    "model": {"kind": "mlp", "hidden": [8]},
    "inner": {"lr": 0.01, "steps": 2},
    "outer": {"lr": 0.01, "iterations": 4, "tasks_per_batch": 6},
    "compute": {"compile": "never", "device": "cpu", "threads": 1},
    "cluster": {"workers": 0},
    "evaluation": {
        "tasks": 4,
        "validation_tasks": 4,
        "steps": [0, 1, 10],
        "baselines": ["random-init", "oracle"],
    },
}
ACCURACIES = [0.5, 0.8, None, 0.6, 0.7, 0.4, 0.3]
"""Of the trials of the search; one failed before its first validation."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with, from old to new: two trainings, a search of seven trials, an orphan."""
    folder = tmp_path_factory.mktemp("project")
    runs = folder / "runs"
    uri = f"sqlite:///{runs}/mlflow.db"
    train(experiment_of(SETTINGS), runs / "slow")
    train(experiment_of(SETTINGS, inner={"lr": 0.1, "order": "first"}), runs / "fast")
    longer = experiment_of(SETTINGS, inner={"lr": 0.1, "order": "first"}, outer={"iterations": 6})
    train(longer, runs / "fast", resume=True)
    search = MlflowTracker.open(
        uri=uri,
        experiment="searches",
        run_name="sweep",
        run_dir=runs / "sweep",
        params={"name": "glyphs"},
        tags={"kind": "search"},
    )
    parent = search.wait_for_run_id(60)
    for number, accuracy in enumerate(ACCURACIES):
        values = {"validation/accuracy_step3": accuracy, "validation/accuracy_step3_ci95": 0.01}
        record(
            runs / f"trial-{number}",
            uri,
            "FINISHED" if accuracy else "FAILED",
            params={"name": "glyphs", "inner.steps": 1, "evaluation.selection_step": 3},
            tags={"algorithm": "maml", "order": "second"},
            metrics=values if accuracy else {},
            parent_run_id=parent,
        )
    assert search.close("FINISHED") is None
    record(runs / "orphan", uri, "KILLED", parent_run_id="0" * 32)
    return folder


@pytest.fixture(scope="module")
def uri(project: Path) -> str:
    return f"sqlite:///{project}/runs/mlflow.db"


def by_name(uri: str) -> dict[str, Run]:
    return {run.name: run for run in list_runs(uri)}


def test_the_newest_first_and_trials_with_their_search(uri: str) -> None:
    runs = list_runs(uri)
    assert [run.name for run in runs] == ["orphan", "sweep", "fast", "slow"]
    assert [run.status for run in runs] == ["killed", "finished", "finished", "finished"]
    assert [run.is_search for run in runs] == [False, True, False, False]
    names = [trial.name for trial in runs[1].trials]
    assert names == [f"trial-{n}" for n in (1, 4, 3, 0, 5, 6, 2)], "the best first"
    assert [run.name for run in list_runs(uri, limit=2)] == ["orphan", "sweep"]
    assert len(list_runs(uri, limit=2)[1].trials) == len(ACCURACIES)
    assert [run.name for run in list_runs(uri, limit=3)] == ["orphan", "sweep", "fast"]


def test_what_a_run_says_of_itself(uri: str, project: Path) -> None:
    run = by_name(uri)["fast"]
    curve = json.loads((project / "runs" / "fast" / "results.json").read_text())[0]
    assert (run.experiment, run.algorithm, run.order) == ("quick", "fomaml", "first")
    assert run.validation is not None
    assert (run.validation.metric, run.validation.step) == ("loss", 2), "inner.steps"
    history = (project / "runs" / "fast" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in history if "validation/" in line][-1]
    assert run.validation.value.mean == last["validation/loss_step2"]
    assert run.validation.value.ci95 == last["validation/loss_step2_ci95"]
    assert run.metrics["test/trained/loss_step10"] == curve["mean"]["loss"][2]
    assert run.settings["outer.iterations"] == "6", "as resumed, not as begun"
    assert 0 < run.seconds < 300
    assert abs(run.started.timestamp() - time.time()) < 600
    assert run.started.tzinfo is not None
    trial = by_name(uri)["sweep"].trials[0]
    assert trial.validation is not None
    assert (trial.validation.metric, trial.validation.step) == ("accuracy", 3), "selection_step"


def test_trials_are_ranked_by_what_their_search_asks_for(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent = record(
        tmp_path / "sweep",
        uri,
        params={"name": "glyphs", "search.metric": "loss_step9"},
        tags={"kind": "search"},
    )
    for name, loss in (("a", 0.5), ("b", 0.1), ("c", 0.3)):
        values = {"validation/accuracy_step1": loss, "validation/loss_step9": loss}
        settings = {"inner.steps": 1}
        record(tmp_path / name, uri, params=settings, metrics=values, parent_run_id=parent)
    (search,) = list_runs(uri)
    assert [trial.name for trial in search.trials] == ["b", "c", "a"]
    assert search.trials[0].validation is not None
    assert search.trials[0].validation[:2] == ("loss", 9)


def test_trials_of_policies_are_ranked_by_their_returns(tmp_path: Path) -> None:
    """The larger return is the better one, also where the record does not say so."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    searches: dict[str, tuple[dict[str, str], list[str]]] = {
        "tasks": ({"search.ranked_by": "return", "search.ranked_mode": "max"}, ["b", "c", "a"]),
        "step": (
            {"search.ranked_by": "return_step0", "search.ranked_mode": "max"},
            ["a", "c", "b"],
        ),
        "mode": ({"search.ranked_by": "return", "search.ranked_mode": "min"}, ["a", "c", "b"]),
        "unsaid": ({}, ["b", "c", "a"]),
    }
    for sweep, (tags, _) in searches.items():
        params = {"name": "move", "search.metric": None, "search.mode": None}
        parent = record(tmp_path / sweep, uri, params=params, tags={"kind": "search", **tags})
        for name, value in (("a", -30.0), ("b", -10.0), ("c", -20.0)):
            returns = {"validation/return_step1": value, "validation/return_step0": -40.0 - value}
            record(
                tmp_path / sweep / name,
                uri,
                params={"inner.steps": 1},
                metrics={**returns, "validation/loss_step1": value},
                parent_run_id=parent,
            )
    found = {search.name: search for search in list_runs(uri)}
    for sweep, (_, best_first) in searches.items():
        assert [trial.name for trial in found[sweep].trials] == best_first, sweep
        shown = found[sweep].trials[0].validation
        assert shown is not None
        assert shown.metric == "return"


def test_the_metric_that_chooses_a_checkpoint_is_the_one_shown(uri: str, tmp_path: Path) -> None:
    assert by_name(uri)["fast"].tags["selected_by"] == "loss"
    own = f"sqlite:///{tmp_path}/mlflow.db"
    values = {"validation/accuracy_step1": 0.5, "validation/f1_step1": 0.25}
    tags = {"selected_by": "f1"}
    record(tmp_path / "run", own, params={"inner.steps": 1}, tags=tags, metrics=values)
    (run,) = list_runs(own)
    assert run.validation is not None
    assert run.validation == ("f1", 1, (0.25, None))


def test_filter(uri: str) -> None:
    def names(text: str) -> list[str]:
        return [run.name for run in list_runs(uri, text=text)]

    assert names("finished") == ["sweep", "fast", "slow"]
    assert names("Killed") == ["orphan"]
    assert names("FOMAML") == ["fast"]
    assert names("quick") == ["fast", "slow"]
    assert names(by_name(uri)["slow"].run_id[:6]) == ["slow"]
    assert names("nothing-like-this") == []
    (search,) = list_runs(uri, text="trial-3")
    assert (search.name, [trial.name for trial in search.trials]) == ("sweep", ["trial-3"])
    (search,) = list_runs(uri, text="failed")
    assert [trial.name for trial in search.trials] == ["trial-2"]
    assert len(list_runs(uri, text="sweep")[0].trials) == len(ACCURACIES)
    assert [run.name for run in list_runs(uri, text="finished", limit=2)] == ["sweep", "fast"]


def test_a_run_is_found_by_whatever_it_is_called(
    uri: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = by_name(uri)["slow"].run_id
    for reference in ("slow", slow, slow[:8], str(project / "runs" / "slow")):
        assert find_run(reference, uri).run_id == slow, reference
    assert find_run("trial-3", uri).name == "trial-3"
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert find_run("runs/slow", None).run_id == slow
    assert find_run("slow", None).run_id == slow
    monkeypatch.chdir(project / "runs")
    assert find_run("slow", None).run_id == slow, "the folder says where its store is"
    archived = project / "archive" / "slow"
    archived.mkdir(parents=True)
    shutil.copy(project / "runs" / "slow" / "config.yaml", archived)
    assert find_run(str(archived), uri).run_id == slow, "a folder that was moved"
    with pytest.raises(TrackingError, match=r"there are no runs in .*archive/mlflow\.db"):
        find_run(str(archived), None)
    (archived / "config.yaml").write_text("tracking: {enabled: false}")
    with pytest.raises(TrackingError, match=r"was made with tracking\.enabled=false"):
        find_run(str(archived), uri)


def test_who_cannot_be_found_is_told_who_there_is(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"no run in .*'nobody'; the newest are .*\(orphan\)"):
        find_run("nobody", uri)
    with pytest.raises(TrackingError, match=r"the id, the name or the folder ''"):
        find_run("", uri)


def test_several_runs_of_one_name_or_beginning(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ids = [record(tmp_path / part / "same", uri) for part in ("a", "b")]
    message = r"2 runs are called 'same'.*give more of the id"
    with pytest.raises(TrackingError, match=message) as caught:
        find_run("same", uri)
    assert all(run_id[:8] in str(caught.value) for run_id in ids)
    assert find_run(ids[0][:12], uri).run_id == ids[0]

    client = client_class()(uri)
    while len({run_id[0] for run_id in ids}) == len(ids):
        ids.append(client.create_run("1", run_name=f"run-{len(ids)}").info.run_id)
    twins = [run_id for run_id in ids if run_id[0] == ids[-1][0]]
    with pytest.raises(TrackingError, match=f"2 runs are called '{ids[-1][0]}'") as caught:
        find_run(ids[-1][0], uri)
    assert all(run_id[:8] in str(caught.value) for run_id in twins)


def test_compare(uri: str) -> None:
    comparison = compare([find_run(name, uri) for name in ("slow", "fast", "trial-1")])
    settings = comparison.settings
    assert settings["inner.lr"] == ["0.01", "0.1", None]
    assert settings["outer.iterations"] == ["4", "6", None]
    same = compare([find_run("slow", uri), find_run("slow", uri)])
    assert same.settings == {}
    two = compare([find_run("slow", uri), find_run("fast", uri)]).settings
    assert set(two) == {"inner.lr", "inner.order", "outer.iterations"}
    accuracy = comparison.metrics["validation/accuracy_step3"]
    assert accuracy == [None, None, (0.8, 0.01)]
    names = [name for name in comparison.metrics if name.startswith("test/trained/")]
    assert names == [f"test/trained/loss_step{step}" for step in (0, 1, 10)]
    assert all(value is None or value.ci95 is not None for value in comparison.metrics[names[0]])


def test_a_value_that_is_not_a_number(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    record(
        tmp_path / "diverged",
        uri,
        params={"inner.steps": 1},
        metrics={"validation/loss_step1": math.nan, "validation/loss_step1_ci95": math.nan},
    )
    (run,) = list_runs(uri)
    assert run.validation is not None
    assert math.isnan(run.validation.value.mean)
    assert run.to_json()["validation"]["mean"] is None


def test_the_command(project: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, compares, prints JSON; the database stays as it is, byte for byte."""
    before = hashlib.sha256((project / "runs" / "mlflow.db").read_bytes()).digest()
    listed = maml("runs", cwd=project)
    assert listed.returncode == 0, listed.stderr
    rows = [line for line in listed.stdout.splitlines() if line.strip()][2:]
    assert [row.split()[1] for row in rows if "└" not in row] == ["orphan", "sweep", "fast", "slow"]
    assert "7 trials, best first" in rows[1]
    assert "trial-1" in rows[2]
    assert "accuracy, 3 steps" in rows[2]
    assert "80.00 ± 1.00 %" in rows[2]
    assert "query loss, 2 steps" in rows[8]
    assert "2 more" in rows[7]
    assert "quick, fomaml, first" in rows[8]
    assert max(map(len, rows)) <= 130
    assert by_name(uri)["fast"].started.strftime("%H:%M") in rows[8]

    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = json.loads(CliRunner().invoke(app, ["runs", "--json", "--limit", "2"]).stdout)
    assert [run["kind"] for run in found] == ["run", "search"]
    assert found[1]["trials"][0]["validation"] == {
        "metric": "accuracy",
        "step": 3,
        "mean": 0.8,
        "ci95": 0.01,
    }

    compared = CliRunner().invoke(app, ["runs", "compare", "slow", "runs/fast"])
    assert compared.exit_code == 0, compared.stderr
    (lr,) = (line for line in compared.stdout.splitlines() if "inner.lr" in line)
    assert lr.split() == ["inner.lr", "0.01", "0.1"]
    (loss,) = (
        line
        for line in compared.stdout.splitlines()
        if "test, trained: query loss, 10 steps" in line
    )
    assert loss.count("±") == 2
    assert "oracle" not in compared.stdout, "zeros only"

    elsewhere = ["runs", "--uri", uri, "compare", "trial-1", "trial-4", "--json"]
    monkeypatch.chdir(project.parent)
    compared = CliRunner().invoke(app, elsewhere)
    assert json.loads(compared.stdout)["metrics"]["validation/accuracy_step3"][0]["mean"] == 0.8
    monkeypatch.chdir(project)

    for arguments, message in (
        (("runs", "compare", "slow"), "two runs or more"),
        (("runs", "compare", "slow", "nobody"), "'nobody'; the newest are"),
        (("runs", "--uri", "http://127.0.0.1:9"), "cannot read the runs of http://127.0.0.1:9"),
        (("runs", "--uri", "mlruns"), "no longer"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2, done.stderr
        assert message in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr
    assert hashlib.sha256((project / "runs" / "mlflow.db").read_bytes()).digest() == before


def test_looking_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = maml("runs", cwd=tmp_path)
    assert nothing.returncode == 0, nothing.stderr
    assert "no runs in" in nothing.stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert CliRunner().invoke(app, ["runs", "--json"]).stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrackingError, match=r"there are no runs in .*train something first"):
        find_run("any", f"sqlite:///{tmp_path}/mlflow.db")

    empty = tmp_path / "empty.db"
    empty.touch()
    assert list_runs(f"sqlite:///{empty}") == []
    assert empty.stat().st_size == 0
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE runs (a)")
    database.close()
    assert list_runs(f"sqlite:///{other}") == []
    text = tmp_path / "text.db"
    text.write_text("no database at all, " * 100)
    with pytest.raises(TrackingError, match="is not a tracking store"):
        list_runs(f"sqlite:///{text}")
