"""`maml search` as a person types it: killed, interrupted, resumed, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from tests.commands import clean_environment, maml
from tests.waiting import wait_for

pytestmark = pytest.mark.long


@pytest.fixture
def search_file(quick: dict[str, Any], tmp_path: Path) -> Path:
    """Three trials that take a while, one after the other."""
    quick["task"] = {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.005}
    quick["outer"] = {"lr": 0.01, "iterations": 120, "tasks_per_batch": 4}
    quick["evaluation"] |= {"every": 10, "tasks": 4, "validation_tasks": 4}
    quick["cluster"] = {"workers": 0, "cpus_per_worker": 1}
    quick["tracking"] = {"enabled": True}
    quick["search"] = {
        "space": {"inner.lr": {"grid": [0.01, 0.02, 0.03]}},
        "scheduler": "none",
        "max_concurrent": 1,
    }
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(quick))
    return path


def start(folder: Path) -> subprocess.Popen[str]:
    """A search in a process group of its own, as a terminal has it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "search", "quick.yaml", f"run_dir={folder}"],
        cwd=folder.parent.parent,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_the_second_trial_is_under_way(folder: Path) -> None:
    def under_way() -> bool:
        trials = sorted((folder / "trials").glob("*"))
        return len(trials) == 2 and any((trials[1] / "checkpoints").glob("iteration-*20.json"))

    wait_for(under_way)


def updates(trial: Path) -> list[str]:
    """What a trial recorded of its meta-updates."""
    lines = (trial / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if "tasks_per_second" in line]


def steps_and_runs(tmp_path: Path) -> list[tuple[str, str, list[int]]]:
    """(trial, status, iterations recorded) of every nested MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'maml'")
    runs = client.search_runs([experiment.experiment_id])
    assert len([run for run in runs if "mlflow.parentRunId" not in run.data.tags]) == 1
    found = []
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags:
            points = client.get_metric_history(run.info.run_id, "train/query_loss")
            name = str(run.info.run_name)
            found.append((name, str(run.info.status), sorted(p.step for p in points)))
    return sorted(found)


def test_interrupt(search_file: Path, tmp_path: Path) -> None:
    """Ctrl-C: the state is saved, MLflow says who was killed, and the command to go on is shown."""
    process = start(tmp_path / "runs" / "search")
    try:
        wait_until_the_second_trial_is_under_way(tmp_path / "runs" / "search")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert err.splitlines()[-1] == "to continue: maml search --resume runs/search"
    assert "Traceback" not in out + err
    assert [status for _, status, _ in steps_and_runs(tmp_path)] == ["FINISHED", "KILLED"]


def test_resume(search_file: Path, tmp_path: Path) -> None:
    """While a search runs nobody else goes on with it. After a SIGKILL the finished trial is kept,
    the second goes on from its checkpoint, the third begins; MLflow has each of them once."""
    folder = tmp_path / "runs" / "search"
    process = start(folder)
    try:
        wait_for((folder / "search.yaml").exists)
        other = maml("search", "--resume", str(folder), cwd=tmp_path)
        assert other.returncode == 2
        assert f"run_dir: {folder} is in use by process {process.pid} on " in other.stderr
        wait_until_the_second_trial_is_under_way(folder)
        process.kill()
        process.communicate(timeout=60)
    finally:
        process.kill()
    auto = ("--resume", "auto")
    first, second = sorted((folder / "trials").glob("*"))
    trained = updates(first)
    reached = max(
        int(path.stem.removeprefix("iteration-"))
        for path in (second / "checkpoints").glob("iteration-????????.json")
    )
    assert 20 <= reached < 120

    other = maml("search", "quick.yaml", f"run_dir={folder}", "seed=1", *auto, cwd=tmp_path)
    assert other.returncode == 2
    assert "seed: was 0, is 1; a resumed search keeps its settings" in other.stderr
    resumed = maml("search", "quick.yaml", f"run_dir={folder}", *auto, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Best: inner.lr=0.0" in resumed.stdout
    assert updates(first) == trained  # with the very times that they took
    runs = steps_and_runs(tmp_path)
    names = [path.name for path in sorted((folder / "trials").glob("*"))]
    assert len(names) == 3
    assert [(name, status) for name, status, _ in runs] == [(name, "FINISHED") for name in names]
    assert [steps for _, _, steps in runs] == [list(range(1, 121))] * 3
    table = pandas.read_csv(folder / "results.csv")
    assert sorted(table["trial"]) == names
    assert sorted(table["inner.lr"]) == [0.01, 0.02, 0.03]
    assert set(table["outcome"]) == {"complete"}

    assert json.loads((folder / "search.json").read_text())["over"]
    again = maml("search", "seed=1", "--resume", str(folder), cwd=tmp_path)
    assert again.returncode == 2
    assert "a resumed search keeps its settings" in again.stderr


def test_bad_input(search_file: Path, tmp_path: Path) -> None:
    """One message, exit code 2, nothing started; `maml train` takes no notice of the section."""
    wrong = maml("search", "quick.yaml", "search.space.inner.rate={grid: [1]}", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "search.space.inner.rate: unknown setting" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "runs").exists()
    run = tmp_path / "runs" / "one"
    arguments = ("outer.iterations=2", "tracking.enabled=false", f"run_dir={run}")
    trained = maml("train", "quick.yaml", *arguments, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "search" not in yaml.safe_load((run / "config.yaml").read_text())
