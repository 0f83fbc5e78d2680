"""What a person sees of a run while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.console import ConsoleWatcher, folded
from pipeline.training.loop import MetaLearning, meta_train
from pipeline.training.opening import open_session
from tests.conftest import experiment_of


def last_line(settings: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of the last iteration."""
    experiment = experiment_of(settings, outer={"iterations": 2})
    watcher = ConsoleWatcher()
    with open_session(experiment, folder / "run", MetaLearning(), False, watcher) as session:
        meta_train(session)
    lines = capsys.readouterr().out.splitlines()
    return next(line for line in lines if line.startswith("iteration 2/2"))


def test_losses_of_supervised_tasks(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = last_line(quick, tmp_path, capsys)
    assert "query loss" in line
    assert "support loss" in line
    assert "return" not in line


def test_returns_of_policies(
    moving: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = last_line(moving, tmp_path, capsys)
    assert "  return -" in line
    assert "  return after adaptation -" in line
    assert "loss" not in line


def test_a_policy_that_does_not_adapt_has_one_return(
    moving: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = last_line({**moving, "inner": {"lr": 0.1, "steps": 0}}, tmp_path, capsys)
    assert "  return -" in line
    assert "after adaptation" not in line


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("sinusoid-20261125-231837", 24, ["sinusoid-20261125-231837"]),
        ("sinusoid-20261125-231837", 15, ["sinusoid-", "20261125-231837"]),
        ("sinusoid-20261125-231837", 8, ["sinusoi…", "d-", "2026112…", "5-231837"]),
        ("80.00 ± 1.00 %", 14, ["80.00 ± 1.00 %"]),
        ("five!", 5, ["five!"]),
        ("sixsix", 5, ["sixs…", "ix"]),
        ("one\nminus other", 11, ["one", "minus other"]),
    ],
)
def test_a_name_that_is_broken_says_so(name: str, width: int, lines: list[str]) -> None:
    assert folded(name, width).splitlines() == lines
