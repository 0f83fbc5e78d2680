"""The records of a run's folder, also after a crash."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.runs.folder import History


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Three records, the first loss of which is not a number, and the half that a crash left."""
    history = History(tmp_path)
    for iteration, loss in ((1, math.nan), (2, 0.1 + 0.2), (3, 5.0)):
        history.append(iteration, {"loss": loss})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')
    return history


def test_half_a_record_is_left_out(history: History) -> None:
    assert [record["iteration"] for record in history.records()] == [1, 2, 3]
    assert history.records()[1] == {"iteration": 2, "loss": 0.1 + 0.2}
    assert history.first("loss") == 0.1 + 0.2
    assert history.first("accuracy") is None


def test_records_after_a_checkpoint_are_forgotten(history: History, tmp_path: Path) -> None:
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    history.forget_after(2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == first, "byte for byte"
    history.append(3, {"loss": 6.0})
    assert [record["iteration"] for record in history.records()] == [1, 2, 3]


def test_a_run_without_records(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.forget_after(0)
    assert history.records() == []
    assert not list(tmp_path.iterdir())
