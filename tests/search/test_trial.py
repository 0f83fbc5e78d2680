"""What a trial tells Ray Tune, in this process: Ray's own end of the line is replaced by a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.tune

from pipeline.config.loading import from_dict
from pipeline.search.space import search_of
from pipeline.search.trial import Plan, Reporter, _states, ranking_of
from pipeline.training.loop import MetaLearning, meta_train
from pipeline.training.opening import open_session


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", lambda metrics, checkpoint=None: found.append(metrics))
    return found


def plan_of(quick: dict[str, Any], folder: Path) -> Plan:
    section = {"space": {"inner.lr": {"grid": [0.01]}}, "scheduler": "hyperband"}
    quick["evaluation"] |= {"every": 2}
    experiment = from_dict({**quick, "search": section})
    ranking = ranking_of(search_of(experiment), experiment, ["loss"])
    return Plan(experiment, folder, "token", ranking, ())


def test_a_failure_counts_in_the_same_units_as_a_validation(
    quick: dict[str, Any], tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    """Schedulers compare trials by these: six iterations are three validations."""
    plan = plan_of(quick, tmp_path)
    folder = tmp_path / "run"
    reporter = Reporter(plan, folder)
    with open_session(plan.experiment, folder, MetaLearning(), False, reporter) as session:
        meta_train(session)
    reporter.report()
    reporter.failed("RuntimeError: on purpose")
    times = [(report["iteration"], report["validations"]) for report in reports]
    assert times == [(2, 1), (4, 2), (6, 3), (6, 3)]
    assert [bool(report["failure"]) for report in reports] == [False, False, False, True]


def test_a_failure_before_the_start(
    quick: dict[str, Any], tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    Reporter(plan_of(quick, tmp_path), tmp_path / "run").failed("ConfigError: inner.lr")
    (report,) = reports
    assert (report["iteration"], report["validations"]) == (0, 0)


def test_a_trial_that_was_killed_before_its_first_checkpoint_begins_again(
    quick: dict[str, Any], tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    """While it compiled; Tune starts it again, and so does a search that is resumed."""
    plan = plan_of(quick, tmp_path)
    folder = plan.trial_dir("one")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(plan.experiment.to_yaml())
    (folder / "checkpoints").mkdir()
    own, other = _states(plan.experiment, folder, plan.trial_token("one"), None)
    assert (own, other) == (None, None)
    reporter, token = Reporter(plan, folder), plan.trial_token("one")
    with open_session(
        plan.experiment, folder, MetaLearning(), False, reporter, token=token
    ) as session:
        meta_train(session)
    assert [report["iteration"] for report in reports] == [2, 4]
