"""Files of a run that somebody has edited or cut: each is named, and a refusal changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config.loading import load_run
from pipeline.runs.folder import History
from pipeline.runs.predictor import Adapter
from pipeline.training.loop import train
from tasks.errors import ReportedError
from tests.commands import maml
from tests.conftest import experiment_of

SETTINGS: dict[str, Any] = {
    "name": "quick",
    "task": {"kind": "sinusoid", "shots": 5, "queries": 5},
    "model": {"kind": "mlp", "hidden": [8]},
    "inner": {"lr": 0.01, "steps": 2},
    "outer": {"lr": 0.01, "iterations": 4, "tasks_per_batch": 4, "scheduler": "CosineAnnealingLR"},
    "compute": {"compile": "never", "device": "cpu", "threads": 1},
    "cluster": {"workers": 0},
    "evaluation": {"tasks": 4, "validation_tasks": 4, "steps": [0, 2], "every": 2},
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is over; tests spoil copies of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(experiment_of(SETTINGS), folder)
    Adapter.load(folder).save(folder.parent / "model")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def manifests(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("*.json"))


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by path."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edited(run: Path, **changes: Any) -> None:
    """Change values of the state in all manifests."""
    for path in manifests(run):
        manifest = json.loads(path.read_text())
        manifest["state"] |= changes
        path.write_text(json.dumps(manifest))


def emptied(run: Path) -> None:
    for path in manifests(run):
        path.write_text(json.dumps({**json.loads(path.read_text()), "state": {}}))


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content) and None


RESUMED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no state": (emptied, "state.scheduler.steps is None"),
    "no extra": (lambda run: edited(run, extra={}), "state.extra.compile is None"),
    "extra of text": (lambda run: edited(run, extra="x"), "state.extra is 'x'"),
    "text for the schedule": (lambda run: edited(run, scheduler="x"), "state.scheduler is 'x'"),
    "a schedule that took text": (
        lambda run: edited(run, scheduler={"steps": "x"}),
        "state.scheduler.steps is 'x'",
    ),
    "a schedule without steps": (
        lambda run: edited(run, scheduler={}),
        "state.scheduler.steps is None",
    ),
    "text for the best": (lambda run: edited(run, best="x"), "state.best is 'x'"),
    "a best without a value": (
        lambda run: edited(run, best={"iteration": 1}),
        "state.best.value is None",
    ),
    "text for bad updates": (lambda run: edited(run, bad_updates="x"), "state.bad_updates is 'x'"),
    "something else": (lambda run: edited(run, more=1), "'more'"),
    "manifests that are lists": (
        lambda run: [path.write_text("[1]") for path in manifests(run)] and None,
        "is damaged",
    ),
    "manifests of bytes": (
        lambda run: [path.write_bytes(b"\xff\x00") for path in manifests(run)] and None,
        "is damaged",
    ),
    "a configuration of bytes": (replaced("config.yaml", b"\xff\xfe\x00"), "config.yaml"),
    "a configuration that is a list": (replaced("config.yaml", b"[1]"), "config.yaml"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_an_edited_run_is_refused_and_unchanged(
    name: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, said = RESUMED[name]
    spoil(run)
    before = contents(run)
    with pytest.raises(ReportedError) as caught:
        train(load_run(run, ["outer.iterations=6"]), run, resume=True)
    assert said in str(caught.value) + caplog.text  # damaged checkpoints are passed over, named
    assert caught.value.exit_code == 2
    assert contents(run) == before


def test_lines_that_are_no_records_are_left_out(run: Path) -> None:
    records = History(run).records()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'[1, 2]\n"x"\n\xff\xfe\n{"loss": 1}\n{"iteration": "x"}\nnull\n{"iteration": true}\n'
        )
    assert History(run).records() == records
    train(load_run(run, ["outer.iterations=6"]), run, resume=True)
    assert [r["iteration"] for r in History(run).records()][-1] == 6


BROKEN = {
    "truncated": lambda content: content[:-7],
    "text": lambda content: b"no parameters",
    "empty": lambda content: b"",
    "of a wrong length": lambda content: b"\xff" * 8 + content,
}


@pytest.mark.parametrize("how", BROKEN)
def test_parameters_that_cannot_be_read(how: str, run: Path, tmp_path: Path) -> None:
    path = run / "theta.safetensors"
    path.write_bytes(BROKEN[how](path.read_bytes()))
    with pytest.raises(ReportedError, match=r"theta\.safetensors"):
        Adapter.load(run)
    for command in (("evaluate", str(run)), ("export", str(run))):
        done = maml(*command, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "theta.safetensors" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"experiment": 1, "input_shape": [1], "output_size": 1, "steps": 1}',
        '{"experiment": {}, "input_shape": 1, "output_size": 1, "steps": 1}',
        '{"experiment": {}, "input_shape": [1], "output_size": "1", "steps": 1}',
        '{"experiment": {}, "input_shape": [1], "output_size": 1, "steps": -1}',
        "[" * 100_000,
    ],
)
def test_a_recipe_that_is_none(content: str, trained: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(trained.parent / "model", tmp_path / "model"))
    (model / "recipe.json").write_text(content)
    with pytest.raises(ReportedError, match=r"recipe\.json"):
        Adapter.load(model)


@pytest.mark.parametrize("steps", [-1, 1.5, "3", True, [1], np.float64(2)])
def test_steps_are_a_number_of_steps(steps: Any, trained: Path) -> None:
    adapter = Adapter.load(trained)
    with pytest.raises(ValueError, match="steps: must be an integer of at least 0"):
        adapter.predict([[0.0]], [[0.0]], [[0.0]], steps=steps)
    assert adapter.predict([[0.0]], [[0.0]], [[0.0]], steps=np.int64(2)).support_loss.shape == (3,)


@pytest.mark.parametrize("targets", [[[0.0], [1.0, 2.0]], [[0.0], 1.0], "ab", [["x"], ["y"]], None])
def test_ragged_targets_are_named(targets: Any, trained: Path) -> None:
    with pytest.raises(ValueError, match="support_y: "):
        Adapter.load(trained).predict([[0.0], [1.0]], targets, [[0.0]])


def test_a_folder_is_its_users_alone(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Others may read it where the environment says so, or where it was there before."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SETTINGS))
    for folder, mode, shared in (("a/b", 0o700, ""), ("c/d", 0o755, "1")):
        done = maml(
            "train", "mine.yaml", f"run_dir={folder}", cwd=tmp_path, MAML_SHARED_RUNS=shared
        )
        assert done.returncode == 0, done.stderr
        for each in (tmp_path / folder, (tmp_path / folder).parent):
            assert each.stat().st_mode & 0o777 == mode, each
