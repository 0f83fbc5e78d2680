"""`maml runs` and `maml runs compare` as a person reads them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.loop import train
from tests.commands import clean_environment, maml
from tests.conftest import experiment_of
from tests.recorded import record

_DROP_FROM_BOUNDING_SET, _DAC_OVERRIDE, _DAC_READ_SEARCH = 24, 1, 2  # of Linux's prctl


def lines_on_a_terminal(*arguments: str, cwd: Path, columns: int) -> list[str]:
    """What a command prints on a terminal of this width, without colours."""
    done = maml(*arguments, cwd=cwd, COLUMNS=str(columns), FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert max(map(len, lines)) <= columns
    return lines


def test_names_stay_whole_on_a_terminal(tmp_path: Path) -> None:
    """Also those that the project makes itself, of its longest experiments."""
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    names = (
        "omniglot-5w1s-pretrained-20261125-235011",
        "sinusoid-20261125-231837",
        "own_name_" * 8,
    )
    for name in names:
        values = {"validation/loss_step10": 0.25, "validation/loss_step10_ci95": 0.01}
        params = {"name": name.rpartition("-2026")[0], "inner.steps": 10}
        tags = {"algorithm": "maml++", "order": "annealed"}
        record(tmp_path / "runs" / name, uri, params=params, tags=tags, metrics=values)
    lines = lines_on_a_terminal("runs", cwd=tmp_path, columns=80)
    assert [word for line in lines for word in line.split() if word in names] == [*names[1::-1]]
    (of_it,) = (number for number, line in enumerate(lines) if names[0] in line)
    assert lines[of_it].rstrip().endswith("query loss, 10 steps")
    assert lines[of_it + 1].split()[1:4] == ["finished", "maml++,", "annealed"]
    assert lines[of_it + 1].rstrip().endswith("0.25 ± 0.01")
    cut = [line.split()[0] for line in lines if "own_name_" in line]
    assert "".join(cut).replace("…", "") == names[2]
    assert all(part.endswith("…") for part in cut[:-1])

    lines = lines_on_a_terminal("runs", "compare", *names[:2], cwd=tmp_path, columns=80)
    assert any("validation: query loss, 10" in line for line in lines)
    parts = [part for line in lines[:4] for part in line.split() if part.strip("─")]
    assert {"omniglot-5w1s-", "pretrained-20261125-", "235011", names[1]} <= set(parts)


def test_curves_are_called_as_the_experiment_calls_them(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """MLflow's names of metrics have no = and no commas: K=5 is recorded as K-5."""
    variants = {"K=5": {"shots": 5, "queries": 5}, "of-7": {"shots": 7, "queries": 5}}
    few = {"steps": [0, 1], "variants": variants, "baselines": ["random-init", "oracle"]}
    tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path}/runs/mlflow.db"}
    experiment = experiment_of(quick, evaluation=few, tracking=tracking)
    for name in ("one", "other"):
        train(experiment, tmp_path / "runs" / name)
    shown = maml("runs", "compare", "one", "other", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    labels = [re.split(r"  +", line.strip())[0] for line in shown.stdout.splitlines()]
    assert [label for label in labels if label.startswith("test")] == [
        f"test, {who}: query loss, {steps}"
        for who in ("K=5", "K=5, random init", "of-7", "of-7, random init")
        for steps in ("0 steps", "1 step")
    ]


def test_metrics_of_other_programs_keep_their_names(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    for name in ("one", "other"):
        record(tmp_path / "runs" / name, uri, metrics={"test/loss": 1.0}, tags={"test_curves": "["})
    shown = maml("runs", "compare", "one", "other", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^ *test/loss +1 +1 *$", shown.stdout, flags=re.M)


def close_folder(store: Path) -> None:
    store.parent.chmod(0)


def close_file(store: Path) -> None:
    store.touch(mode=0)


def make_a_folder(store: Path) -> None:
    store.mkdir()


def leave_it_half_written(store: Path) -> None:
    """As a process that died leaves it: the next reader has to write."""
    with contextlib.closing(sqlite3.connect(store)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    store.chmod(0o444)
    store.parent.chmod(0o555)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (close_folder, "cannot open STORE: Permission denied; make it readable, or name another"),
        (close_file, "cannot open STORE: .*; make it readable, or name another"),
        (make_a_folder, "STORE is not a tracking store: it is a folder"),
        (leave_it_half_written, "cannot open STORE: .*; make it readable, or name another"),
    ],
)
def test_a_store_that_cannot_be_opened_is_told_in_one_sentence(
    spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    store = runs / "mlflow.db"
    spoil(store)
    done = as_a_common_user("runs", cwd=tmp_path)
    runs.chmod(0o755)
    assert done.returncode == 2
    assert re.match(f"error: {said.replace('STORE', re.escape(str(store)))}", done.stderr)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert {path.name for path in runs.iterdir()} <= {"mlflow.db"}


def test_a_folder_that_cannot_be_written_to_has_no_runs(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    done = as_a_common_user("runs", cwd=tmp_path)
    tmp_path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no runs in ")
    assert list(tmp_path.iterdir()) == []


def as_a_common_user(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command without the right to open whatever there is, which root has."""

    def drop() -> None:
        if os.geteuid() == 0:  # the bounding set: the program that is started next lacks these
            for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
                ctypes.CDLL(None).prctl(_DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)

    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=cwd,
        env=clean_environment(),
        preexec_fn=drop,
        capture_output=True,
        text=True,
        timeout=120,
    )
