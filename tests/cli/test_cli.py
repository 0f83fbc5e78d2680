"""The `maml` command as a person types it: output, exit codes, no tracebacks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.algorithms import PRESETS
from pipeline.runs.checkpoint import CheckpointStore, load_theta
from tests.commands import clean_environment, maml
from tests.readme import README, blocks
from tests.waiting import wait_for


@pytest.fixture
def experiment_file(quick: dict[str, Any], tmp_path: Path) -> Path:
    quick["tracking"] = {"enabled": True}
    quick["evaluation"]["baselines"] = ["random-init", "oracle"]
    quick["diagnostics"] = {"every": 6}
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(quick))
    return path


def test_train_evaluate_resume(experiment_file: Path, tmp_path: Path) -> None:
    """The whole way: train, look at what is left, evaluate, continue, read MLflow."""
    run = tmp_path / "runs" / "first"
    trained = maml("train", "quick.yaml", f"run_dir={run}", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "MSE after n gradient steps on 6 test tasks" in trained.stdout
    for expected in ("n = 0", "n = 3", "random init", "oracle", str(run), "maml ui"):
        assert expected in trained.stdout
    # The README's sample is cut where it says so, and ends as this does.
    shown = blocks("text", README)[0].splitlines()
    assert shown[-1] == trained.stdout.splitlines()[-1] == "MLflow       maml ui"
    assert shown.count("...") >= 3
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "theta.safetensors",
        "results.json",
        "checkpoints",
        "metrics.jsonl",
        "plots",
    }
    assert {p.name for p in (run / "plots").iterdir()} == {
        "adaptation_loss.png",
        "fits.png",
        "training.png",
        *(f"health_{n}.png" for n in ("gradient_norm", "inner_loss", "curvature", "order", "hurt")),
    }

    evaluated = maml(
        "evaluate", str(run), "--tasks", "5", "--steps", "0,2,20", "--json", cwd=tmp_path
    )
    assert evaluated.returncode == 0, evaluated.stderr
    curves = json.loads(evaluated.stdout)
    assert [curve["who"] for curve in curves] == ["trained", "random init", "oracle"]
    assert curves[0]["steps"] == [0, 2, 20], "more steps than were trained"
    assert curves[0]["protocol"]["tasks"] == 5
    assert curves[0]["protocol"]["split"] == "test"
    assert curves[2]["mean"]["loss"] == [0.0, 0.0, 0.0]

    more = ("outer.iterations=8", "--resume", str(run))
    longer = maml("train", *more, cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert "no warning in 2 diagnoses; runs/first/plots/health_*.png" in longer.stdout
    assert "continuing after iteration 6" in longer.stdout
    recorded(tmp_path, run)


def recorded(tmp_path: Path, run: Path) -> None:
    """One MLflow run holds both halves: parameters, tags, metrics, artifacts."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'maml'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["inner.lr"] == "0.01"
    assert {"algorithm", "order", "workers", "selected_by"} <= set(found.data.tags)
    for metric in (
        "train/query_loss",
        "train/support_loss",
        "meta_gradient_norm",
        "outer_lr",
        "tasks_per_second",
        "seconds/sampling",
        "seconds/computing",
        "seconds/waiting",
        "seconds/aggregating",
        "seconds/updating",
        "seconds/tracking",
        "validation/loss_step3",
        "validation/loss_step3_ci95",
    ):
        assert metric in found.data.metrics, metric
    history = client.get_metric_history(found.info.run_id, "outer_lr")
    assert sorted(point.step for point in history) == list(range(1, 9))
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "results.json", "theta.safetensors", "plots"} <= artifacts


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGINT, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGHUP, 0)],
)
def test_interrupt_writes_a_checkpoint_and_marks_the_run(
    number: signal.Signals, workers: int, quick: dict[str, Any], tmp_path: Path
) -> None:
    quick["cluster"]["workers"] = workers
    quick["task"] = {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.005}
    quick["outer"]["iterations"] = 10_000
    quick["tracking"] = {"enabled": True}
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(quick))
    run = tmp_path / "runs" / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "train", "slow.yaml", f"run_dir={run}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() or process.poll() is not None)
    process.send_signal(number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    stopped, then = err.splitlines()[-2:]
    assert stopped.startswith("stopped after iteration")
    assert then == "to continue: maml train --resume runs/cut"
    assert "Traceback" not in err
    state = CheckpointStore(run / "checkpoints", keep=2).latest()
    assert state is not None
    assert state.iteration >= 1

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'maml'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "KILLED"
    assert state.mlflow_run_id in (None, found.info.run_id)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "sinusiod"], "there is no experiment 'sinusiod'; did you mean sinusoid?\n"),
        (["train", "sinusoid", "inner.lr=-1", "outer.foo=1"], "2 errors"),
        (["train", "omniglot-5w1s"], "maml data prepare omniglot"),
        (["train", "image-folder", "task.store=mine"], "maml data prepare images"),
        (["train", "sinusoid", "run_dir=quick.yaml/run"], "cannot write"),
        (["train", "sinusoid", "compute.device=cuda", "cluster.workers=0"], "no GPU"),
        (["train", "sinusoid", "cluster.workers=99999"], "cluster.workers: 99999 workers on the"),
        (["train", "--resume", "nowhere"], "not the folder of a run"),
        (["train", "sinusoid", "--resume", "nowhere"], "sinusoid: "),
        (["train"], "name an experiment"),
        (["search"], "name an experiment"),
        (["evaluate", "nowhere"], "not the folder of a run"),
        (["data", "prepare", "omniglot", "--source", "nowhere"], "nowhere"),
        (["data", "prepare", "images", "--source", "nowhere", "--name", "x"], "nowhere"),
        (["ui", "--uri", "sqlite:///nowhere/mlflow.db"], "no tracking store"),
        (["config", "show", "sinusoid", "task.kind=none"], "task.kind"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_clear_message(
    arguments: list[str], expected: str, experiment_file: Path, tmp_path: Path
) -> None:
    done = maml(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = maml("train", "sinusiod", "--debug", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "there is no experiment 'sinusiod'" in done.stderr
    options, _, _ = maml("--help", cwd=tmp_path).stdout.partition("Commands")
    assert re.search(r"^│ --debug .* anywhere", options, flags=re.M)


def test_a_failed_run_ends_with_code_1(quick: dict[str, Any], tmp_path: Path) -> None:
    quick["task"] = {"kind": "tests.helpers:NanSinusoid", "last_bad": 10**6}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(quick))
    done = maml("train", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "3 updates in a row were not finite" in done.stderr
    assert "to continue" not in done.stdout + done.stderr, "it would end in the same way"
    assert "Traceback" not in done.stderr


def test_training_survives_an_unreachable_tracking_server(
    experiment_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "alone"
    done = maml(
        "train",
        "quick.yaml",
        f"run_dir={run}",
        cwd=tmp_path,
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
    )
    assert done.returncode == 0, done.stderr
    assert (run / "unsent-tracking.jsonl").exists()
    assert str(run / "unsent-tracking.jsonl") in done.stdout
    assert load_theta(run / "theta.safetensors")


def test_config_commands(tmp_path: Path) -> None:
    shown = maml("config", "show", "sinusoid", "inner.lr=0.25", cwd=tmp_path)
    assert yaml.safe_load(shown.stdout)["inner"]["lr"] == 0.25
    schema = json.loads(maml("config", "schema", cwd=tmp_path).stdout)
    assert schema["type"] == "object"
    listed = maml("config", "list", cwd=tmp_path).stdout
    assert "sinusoid-paper" in listed
    family = maml("config", "algorithms", cwd=tmp_path).stdout
    for name, preset in PRESETS.items():
        assert re.search(rf"^{re.escape(name)} ", family, flags=re.M)
        assert preset.description[:40] in family
        assert all(path in family for path in preset.settings)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["evaluate"],
        ["compare"],
        ["analyze"],
        ["export"],
        ["ui"],
        ["config"],
        ["config", "show"],
        ["submit"],
        ["jobs"],
        ["jobs", "logs"],
        ["jobs", "stop"],
        ["data"],
        ["data", "prepare", "omniglot"],
        ["data", "prepare", "images"],
        ["data", "prepare", "glyphs"],
    ],
)
def test_help_is_there_for_every_command(command: list[str], tmp_path: Path) -> None:
    done = maml(*command, "--help", cwd=tmp_path, COLUMNS="100")
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", done.stdout)
    assert len(text) > 100


def test_the_version_is_printed(tmp_path: Path) -> None:
    done = maml("--version", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"maml-pipeline \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize(
    "command", [[], ["train"], ["jobs", "logs"], ["data", "prepare", "images"]]
)
def test_h_is_short_for_help(command: list[str], tmp_path: Path) -> None:
    short, long = (maml(*command, option, cwd=tmp_path) for option in ("-h", "--help"))
    assert short.returncode == 0
    assert short.stdout == long.stdout
