"""Searches end to end, with Ray Tune and MLflow: every scheduler and algorithm, on small tasks."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from pipeline.cli.search_console import SearchConsole
from pipeline.config.loading import from_dict, load, load_run, with_settings
from pipeline.runs.catalog import list_runs
from pipeline.runs.checkpoint import CheckpointStore
from pipeline.runs.folder import RunFolderError
from pipeline.search.report import compare_orders, settings_text
from pipeline.search.run import run_search
from pipeline.search.trial import COMPLETE, FAILED, STOPPED, Ranking, TrialResult
from pipeline.search.tune import SearchWatcher
from pipeline.training.loop import train
from tests.helpers import final_theta

pytestmark = pytest.mark.long

OPTIMUM = 7.5 / 12.5
"""Curvatures λ = 0.5, 1, 1.5, 2: after a step at rate α what is left of a task's distance in
dimension d is (1 − αλ_d), so the loss Σ λ_d (1 − αλ_d)² is least at α = Σ λ_d² / Σ λ_d³."""

ONE_AFTER_THE_OTHER = {"scheduler": "none", "samples": 1, "max_concurrent": 1}
"""All trials of a search in one process, which takes seconds to start."""


class Listener(SearchWatcher):
    def __init__(self) -> None:
        self.ended_trials: list[TrialResult] = []
        self.notices: list[str] = []
        self.total = 0

    def started(self, plan: Any, trials: int) -> None:
        self.total = trials

    def ended(self, result: TrialResult) -> None:
        self.ended_trials.append(result)

    def notice(self, message: str) -> None:
        self.notices.append(message)


@pytest.fixture
def quadratic(quick: dict[str, Any]) -> dict[str, Any]:
    """The best inner rate after one step is known: OPTIMUM."""
    return {
        **quick,
        "task": {"kind": "quadratic", "spread": 1.0},
        "model": {"kind": "linear"},
        "inner": {"lr": 0.1, "steps": 1},
        "outer": {"lr": 0.05, "iterations": 60, "tasks_per_batch": 20, "tasks_per_chunk": 20},
        "evaluation": {"validation_tasks": 100, "steps": [0, 1], "every": 20},
    }


def test_a_grid_equals_an_exhaustive_evaluation(
    quadratic: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Same ranking and the same numbers, to the last bit, as training each setting by itself."""
    rates = [0.1, 0.3, OPTIMUM, 0.9]
    space = {"inner.lr": {"grid": rates}, "inner.order": {"choice": ["second", "first"]}}
    section = {"space": space, "scheduler": "none", "algorithm": "grid", "max_concurrent": 2}
    experiment = from_dict({**quadratic, "search": section})
    found = run_search(experiment, tmp_path / "search")
    assert [t.outcome for t in found.trials] == [COMPLETE] * 8
    alone = {}
    for trial in found.trials:
        one = with_settings(experiment.changed(search=None), trial.settings)
        folder = tmp_path / trial.trial_id
        train(one, folder)
        assert torch.equal(
            final_theta(folder), final_theta(tmp_path / "search" / "trials" / trial.trial_id)
        )
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        alone[trial.trial_id] = [
            r["validation/loss_step1"] for r in records if "validation/loss_step1" in r
        ][-1]
    assert [t.value for t in found.trials] == [alone[t.trial_id] for t in found.trials]
    assert [t.value for t in found.trials] == sorted(alone.values())
    assert found.best is not None
    assert found.best.settings["inner.lr"] == OPTIMUM
    table = pandas.read_parquet(tmp_path / "search" / "results.parquet")
    assert list(table["validation_loss"]) == sorted(alone.values())
    assert list(pandas.read_csv(tmp_path / "search" / "results.csv")["trial"]) == list(
        table["trial"]
    )
    again = run_search(experiment, tmp_path / "search", resume=True)
    assert again.trials == found.trials
    assert "at equal settings, 4 of them trained to the end" in found.words[-2]
    best = load(str(tmp_path / "search" / "best.yaml"))
    assert best.search is None
    assert best.inner.lr == OPTIMUM
    assert best.description == f"The best setting of search: {settings_text(found.best.settings)}."
    assert best.cluster == experiment.cluster


def test_algorithms_can_be_searched(quick: dict[str, Any], tmp_path: Path, ray_local: None) -> None:
    """Each trial is the algorithm whole: nothing of another one's settings stays."""
    names = ["maml", "reptile", "maml++"]
    section = {"space": {"algorithm": {"grid": names}}, **ONE_AFTER_THE_OTHER}
    experiment = from_dict({**quick, "search": section})
    found = run_search(experiment, tmp_path / "search")
    outcomes = {t.settings["algorithm"]: t.outcome for t in found.trials}
    assert outcomes == dict.fromkeys(names, COMPLETE)
    for trial in found.trials:
        run = load_run(tmp_path / "search" / "trials" / trial.trial_id)
        assert run.algorithm_name == run.algorithm == trial.settings["algorithm"]
        alone = with_settings(experiment.changed(search=None), trial.settings)
        assert (run.inner, run.outer) == (alone.inner, alone.outer)


def test_policies_are_searched_by_their_returns(
    moving: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """The best first, here and in `maml runs`."""
    section = {"space": {"inner.lr": {"grid": [0.01, 1.0]}}, **ONE_AFTER_THE_OTHER}
    settings = {**moving, "outer": {**moving["outer"], "iterations": 2}, "search": section}
    settings["tracking"] = {"enabled": True}
    found = run_search(from_dict(settings), tmp_path / "search")
    assert [trial.outcome for trial in found.trials] == [COMPLETE] * 2
    best, other = found.trials
    assert found.best == best
    assert best.value is not None
    assert other.value is not None
    assert other.value < best.value < 0
    assert load(str(tmp_path / "search" / "best.yaml")).inner.lr == best.settings["inner.lr"]
    (listed,) = list_runs(f"sqlite:///{tmp_path}/mlflow.db")
    assert (listed.tags["search.ranked_by"], listed.tags["search.ranked_mode"]) == ("return", "max")
    assert [trial.name for trial in listed.trials] == [best.trial_id, other.trial_id]
    shown = [trial.validation for trial in listed.trials]
    assert [each and each.value.mean for each in shown] == [best.value, other.value]


def test_tpe_finds_the_best_rate(
    quadratic: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    section = {
        "space": {"inner.lr": {"uniform": [0.05, 1.0]}},
        "samples": 20,
        "scheduler": "none",
        "algorithm": "tpe",
        "max_concurrent": 1,
    }
    found = run_search(from_dict({**quadratic, "search": section}), tmp_path / "search")
    assert found.best is not None
    assert abs(found.best.settings["inner.lr"] - OPTIMUM) < 0.06
    assert len(found.trials) == 20
    with pytest.raises(RunFolderError, match="already holds results; continue a search with"):
        run_search(from_dict({**quadratic, "search": section}), tmp_path / "search")


@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_schedulers_stop_what_is_bad(
    scheduler: str, quadratic: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Every trial ends one way or another, the best one is trained to the end, some are not."""
    rates = [OPTIMUM, 0.01, 0.02, 0.03, 0.04, 0.05]
    section = {
        "space": {"inner.lr": {"grid": rates}},
        "scheduler": scheduler,
    }
    if scheduler == "median":
        section |= {"scheduler_args": {"min_samples_required": 1}, "max_concurrent": 1}
    # Two at a time.
    settings = {**quadratic, "search": section, "cluster": {"workers": 0, "cpus_per_worker": 2}}
    settings["evaluation"] = {**quadratic["evaluation"], "every": 6}
    listener = Listener()
    found = run_search(from_dict(settings), tmp_path / "search", watcher=listener)
    outcomes = {t.settings["inner.lr"]: t.outcome for t in found.trials}
    assert set(outcomes.values()) == {COMPLETE, STOPPED}
    assert outcomes[OPTIMUM] == COMPLETE
    assert listener.total == len(rates) == len(found.trials)
    assert found.best is not None
    assert found.best.settings["inner.lr"] == OPTIMUM


def test_asha_in_mlflow(quadratic: dict[str, Any], tmp_path: Path, ray_local: None) -> None:
    """Trials side by side on one store: each has a run nested in the search's, with its settings,
    its curves and how it ended - complete, stopped early, failed."""
    from mlflow import MlflowClient

    rates = [OPTIMUM, 0.5, 1e25, 0.03, 0.02, 0.01]
    section = {"space": {"inner.lr": {"grid": rates}}, "max_concurrent": 2}
    section["scheduler_args"] = {"grace_period": 12}
    settings = {**quadratic, "search": section, "tracking": {"enabled": True, "experiment": "mine"}}
    settings["evaluation"] = {**quadratic["evaluation"], "every": 6}
    listener = Listener()
    found = run_search(from_dict(settings), tmp_path / "runs" / "search", watcher=listener)
    assert listener.notices == []
    outcomes = {t.settings["inner.lr"]: t.outcome for t in found.trials}
    assert outcomes[1e25] == FAILED
    assert {COMPLETE, STOPPED} <= set(outcomes.values())
    assert not list(tmp_path.rglob("unsent-tracking.jsonl"))
    failed = next(t for t in found.trials if t.outcome == FAILED)
    assert "not finite" in failed.failure
    assert found.trials[-1] is failed

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    everything = client.search_runs([experiment.experiment_id])
    assert len(everything) == 1 + len(rates)
    (parent,) = [run for run in everything if "mlflow.parentRunId" not in run.data.tags]
    nested = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert len(nested) == len(rates)
    expected = {COMPLETE: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
    by_id = {run.info.run_name: run for run in nested}
    for trial in found.trials:
        run = by_id[trial.trial_id]
        assert run.data.params["inner.lr"] == str(trial.settings["inner.lr"])
        assert run.info.status == expected[trial.outcome]
        assert run.data.tags["search.outcome"] == trial.outcome
        if trial.outcome == FAILED:
            continue
        validations = client.get_metric_history(run.info.run_id, "validation/loss_step1")
        assert sorted(m.step for m in validations) == list(range(6, trial.iteration + 1, 6))
        if trial.outcome == COMPLETE:
            plots = [each.path for each in client.list_artifacts(run.info.run_id, "plots")]
            assert "plots/training.png" in plots
        updates = client.get_metric_history(run.info.run_id, "train/query_loss")
        assert sorted(m.step for m in updates) == list(range(1, trial.iteration + 1))

    assert parent.info.status == "FINISHED"
    assert found.best is not None
    assert parent.data.tags["best_trial"] == found.best.trial_id
    assert parent.data.tags["best_run_id"] == by_id[found.best.trial_id].info.run_id
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"best.yaml", "results.parquet", "results.csv", "search.yaml", "plots"}
    plots = {Path(a.path).name for a in client.list_artifacts(parent.info.run_id, "plots")}
    assert plots == {"loss_by_inner.lr.png", "learning_curves.png", "cost.png"}


def test_population_based_training(
    quadratic: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """A trial that lags takes over another's θ and settings, changed; not its identity."""
    section = {
        "space": {"inner.lr": {"uniform": [0.01, 0.6]}, "outer.lr": {"loguniform": [1e-4, 0.1]}},
        "samples": 4,
        "scheduler": "pbt",
    }
    # Two of the four at a time: they take turns.
    settings = {**quadratic, "search": section, "cluster": {"workers": 0, "cpus_per_worker": 2}}
    settings["tracking"] = {"enabled": True}
    settings["evaluation"] = {**quadratic["evaluation"], "every": 10}
    found = run_search(from_dict(settings), tmp_path / "runs" / "search")
    assert [t.outcome for t in found.trials] == [COMPLETE] * 4
    states = {}
    for trial in found.trials:
        folder = tmp_path / "runs" / "search" / "trials" / trial.trial_id
        state = CheckpointStore(folder / "checkpoints", keep=2).latest()
        assert state is not None
        assert state.iteration == 60
        states[trial.trial_id] = state
        config = load(str(folder / "config.yaml"))
        assert config.inner.lr == trial.settings["inner.lr"] <= 0.6
        assert config.outer.lr == trial.settings["outer.lr"]
    started = {name: state for name, state in states.items() if state.extra["ancestor"]}
    assert started
    tokens = {state.extra["tracking_token"]: name for name, state in states.items()}
    assert len(tokens) == len({s.mlflow_run_id for s in states.values()}) == 4
    for name, state in started.items():
        assert tokens[state.extra["ancestor"].split("@")[0]] != name


def test_trials_have_workers_of_their_own(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Two actors per trial, in the trial's placement group; the result is that of no actors."""
    section = {"space": {"inner.lr": {"grid": [0.02]}}, "scheduler": "none"}
    settings = {**quick, "search": section, "cluster": {"workers": 2, "cpus_per_worker": 2}}
    found = run_search(from_dict(settings), tmp_path / "search")
    assert [t.outcome for t in found.trials] == [COMPLETE]
    for trial in found.trials:
        folder = tmp_path / "search" / "trials" / trial.trial_id
        assert load(str(folder / "config.yaml")).cluster.workers == 2
        train(with_settings(from_dict(quick), trial.settings), tmp_path / trial.trial_id)
        assert torch.equal(final_theta(tmp_path / trial.trial_id), final_theta(folder))


def test_more_than_there_is_is_refused(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    section = {"space": {"inner.lr": {"grid": [0.01, 0.02]}}}
    settings = {**quick, "search": section, "cluster": {"workers": 5, "cpus_per_worker": 1}}
    message = "5 workers of 1 CPU, together 5 CPU, and Ray has 4"
    with pytest.raises(ValueError, match=message):
        run_search(from_dict(settings), tmp_path / "search")


def trial(name: str, order: str, lr: float, speed: float = 10.0) -> TrialResult:
    settings = {"inner.lr": lr, "inner.order": order}
    return TrialResult(name, settings, COMPLETE, 20, 1.0, 0.1, 1, 1.0, speed)


def test_progress_says_what_is_new_and_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the pace since the first result: starting does not count, nor do trials done before."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    console = SearchConsole()
    console._total = 10
    said = []
    for at, done in ((0, 2.0), (60, 2.0), (100, 3.0), (110, 4.0), (120, 5.0)):
        clock[0] = at
        said.append(console._eta(done))
    assert said == ["", "", "", "  ETA 1:00", "  ETA 0:50"]
    for line in ("0 done", "0 done", "1 done", "0 done"):
        console.show(0.0, line)
    assert capsys.readouterr().out.splitlines() == ["0 done", "1 done", "0 done"]


def test_orders_are_compared_in_pairs() -> None:
    """By hand: losses 2 / 1 and 6 / 4, so a geometric mean of √3; t(0.975, 1) = 12.7062047."""
    results = [
        trial("a", "first", 0.1, speed=20.0),
        trial("b", "second", 0.1),
        trial("c", "first", 0.2, speed=20.0),
        trial("d", "second", 0.2),
        trial("e", "second", 0.3),
    ]
    curves = {"a": {10: 9.0, 20: 2.0}, "b": {10: 9.0, 20: 1.0}, "e": {20: 3.0}}
    curves |= {"c": {10: 6.0, 20: 7.0}, "d": {10: 4.0}}
    found = compare_orders(results, curves, Ranking("loss", 1, "min"))
    assert found is not None
    assert (found.pairs, found.left_out) == (2, 0)
    assert found.metric.mean == pytest.approx(math.sqrt(3))
    half = 12.7062047 * (math.log(2) - math.log(1.5)) / math.sqrt(2) / math.sqrt(2)
    assert found.metric.high == pytest.approx(math.sqrt(3) * math.exp(half))
    assert found.cost.mean == pytest.approx(0.5)
    points = compare_orders(results, curves, Ranking("accuracy", 1, "max"))
    assert points is not None
    assert points.metric.mean == pytest.approx((1.0 + 2.0) / 2)
    assert compare_orders(results[-1:], curves, Ranking("loss", 1, "min")) is None
