"""Promised functions take the folder of a run as text or as a path, from the current folder on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import (
    Experiment,
    ReportedError,
    Watcher,
    compare_runs,
    evaluate_run,
    run_search,
    train,
)
from pipeline.config.loading import absolute_path


class Where(Watcher):
    """Remembers the folder that a run says it is in."""

    def starting(self, experiment: Experiment, run_dir: Path) -> None:
        self.folder = run_dir


@pytest.mark.parametrize("kind", [str, Path])
def test_relative_folders_become_absolute(
    kind: Any, quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment, where = Experiment(**quick), Where()
    curves = train(experiment, kind("runs/one"), watcher=where)
    assert where.folder == tmp_path / "runs" / "one"
    again = evaluate_run(experiment, kind("runs/one"))
    assert [curve.mean for curve in again] == [curve.mean for curve in curves]
    (found,) = compare_runs([kind("runs/one"), kind("runs/one")])
    assert found.differences[0].mean == [0, 0, 0]


def test_a_search_is_put_where_text_says(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused here, before Ray starts: the folder is somebody's file."""
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    searched = Experiment(**{**quick, "search": {"space": {"inner.lr": {"grid": [0.1]}}}})
    with pytest.raises(ReportedError, match=f"cannot write to {tmp_path / 'taken'}"):
        run_search(searched, "taken")


def test_home_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute_path("~/runs") == Path("/home/somebody/runs")
