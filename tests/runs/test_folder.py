"""The records of a run's folder, also after a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.config import json_text
from pipeline.evaluation.meta_test import Curve, write_results
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


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    """NaN and infinity, which JSON does not have, are null, and NaN again for who computes."""
    history = History(tmp_path)
    history.append(1, {"loss": math.nan})
    history.append(5, {"loss": math.inf, "other": -math.inf, "count": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refused(name: str) -> None:
        raise AssertionError(name)

    values = [json.loads(line, parse_constant=refused) for line in lines]
    assert values[0] == {"iteration": 1, "loss": None}
    assert values[-1] == {"iteration": 5, "loss": None, "other": None, "count": 2}
    assert math.isnan(history.records()[0]["loss"])
    assert history.records()[-1]["count"] == 2


def test_strict_json_all_the_way_down() -> None:
    deep = {"a": [math.nan, (1, math.inf)], "b": {"c": -math.inf, "d": 0.5}, "e": "NaN"}
    assert json.loads(json_text.write(deep)) == {
        "a": [None, [1, None]],
        "b": {"c": None, "d": 0.5},
        "e": "NaN",
    }
    assert "\n" not in json_text.write(deep, indent=None)


def test_results_are_strict_json(tmp_path: Path) -> None:
    values = {"loss": [math.nan, 1.0]}
    curve = Curve("trained", "", (0, 1), values, values, {})
    write_results(tmp_path, [curve])
    (written,) = json.loads((tmp_path / "results.json").read_text())
    assert written["mean"] == {"loss": [None, 1.0]}


def test_a_run_without_records(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.forget_after(0)
    assert history.records() == []
    assert not list(tmp_path.iterdir())
