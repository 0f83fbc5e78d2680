"""Reinforcement learning through the driver: the same promises as for supervised tasks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, from_dict, load, load_run
from pipeline.config.settings import Reinforcement
from pipeline.evaluation.comparison import compare_runs, recipes
from pipeline.evaluation.meta_test import evaluate_run
from pipeline.maml.compilation import Work, worth_compiling
from pipeline.maml.flat_vector import flat_vector
from pipeline.rl import rollouts
from pipeline.rl.policy_loss import SurrogateEstimator
from pipeline.search.space import possible_experiments
from pipeline.search.trial import ranking_of
from pipeline.training.endings import Diverged
from pipeline.training.loop import train
from pipeline.training.placement import decide_compile, decide_workers
from pipeline.training.trust_region import jobs_of_update
from pipeline.worker import chunk, reinforcement
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import CandidateJob, FisherJob, GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tests.conftest import experiment_of
from tests.helpers import Recorder, final_theta

pytestmark = pytest.mark.long

UPDATES = ["trpo", "promp", "gradient"]


@pytest.mark.parametrize("update", ["trpo", "promp"])
def test_trajectories_that_are_lost_are_collected_again(
    moving: dict[str, Any], tmp_path: Path, ray_local: None, update: str
) -> None:
    """Who has collected a chunk is killed before it is asked about it; and the bits are those of an
    undisturbed run."""
    own = moving["reinforcement"] if update == "trpo" else {"update": update}
    settings = {**moving, "reinforcement": own}
    train(experiment_of(settings), tmp_path / "calm")
    killed: list[int] = []

    def kill_the_holder(iteration: int, recorder: Recorder) -> None:
        workers = recorder.session.workers
        total = workers.total

        def killing(theta: Any, ask: Any, num_chunks: int, vector: Any = None) -> Any:
            if vector is not None and not killed:  # a question about trajectories
                holder = workers._holders[0][1]
                killed.append(workers._roster.workers[holder].pid)
                os.kill(killed[0], signal.SIGKILL)
            return total(theta, ask, num_chunks, vector)

        if iteration == 1:
            workers.total = killing

    recorder = Recorder(kill_the_holder)
    train(experiment_of(settings, cluster={"workers": 2}), tmp_path / "hit", watcher=recorder)
    assert any(f"process {killed[0]}) was lost" in notice for notice in recorder.notices)
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "hit"))


def test_who_has_not_collected_a_chunk_answers_the_same(moving: dict[str, Any]) -> None:
    experiment = experiment_of(moving)
    theta = flat_vector(initial_parameters(experiment))
    second = Span(1, 2)
    asked = [(FisherJob(0, second), theta), (CandidateJob(0, second), theta + 0.01)]
    collector = ChunkComputer(experiment, compile=False)
    collector.run(theta, GradientJob(0, second))
    for job, vector in asked:
        stranger = ChunkComputer(experiment, compile=False)
        stranger.run(theta + 1, GradientJob(0, second))  # what another θ collected is no answer
        one, other = collector.run(theta, job, vector), stranger.run(theta, job, vector)
        assert one.num_tasks == other.num_tasks == 2
        for name, value in one.metrics.items():
            np.testing.assert_array_equal(value, other.metrics[name])
        if one.gradient is not None:
            assert other.gradient is not None
            np.testing.assert_array_equal(one.gradient, other.gradient)


@pytest.mark.parametrize(
    ("update", "asked"),
    [("trpo", {FisherJob, CandidateJob}), ("promp", {CandidateJob}), ("gradient", {CandidateJob})],
)
def test_workers_are_decided_on_by_all_that_an_iteration_does(
    moving: dict[str, Any], monkeypatch: pytest.MonkeyPatch, update: str, asked: set[type]
) -> None:
    """Four iterations are timed as they would be in process, and four as on an actor."""
    collections, jobs = [], []

    def collect(*arguments: Any) -> Any:
        collections.append(arguments)
        return rollouts.collect(*arguments)

    def run(self: ChunkComputer, theta: Any, job: Any, vector: Any = None) -> Any:
        jobs.append(job)
        return compute(self, theta, job, vector)

    compute = ChunkComputer.run
    monkeypatch.setattr(reinforcement, "collect", collect)
    monkeypatch.setattr(ChunkComputer, "run", run)
    settings = {**moving, "cluster": {"workers": "auto", "cpus_per_worker": 0.25}}
    placement = decide_workers(
        experiment_of({**settings, "reinforcement": {"update": update}}), compile=False
    )
    assert "an uncompiled iteration takes" in placement.reason
    assert len(collections) == 8
    assert {type(job) for job in jobs} == {GradientJob, *asked}


def test_compilation_is_decided_on_fisher_products_too(
    moving: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks in four iterations, each with three products."""
    calls = []

    def decide(works: Sequence[Work]) -> bool:
        calls.append([work.calls for work in works])
        return worth_compiling(works)

    monkeypatch.setattr(chunk, "worth_compiling", decide)
    for update in ("trpo", "gradient"):
        chosen = {"update": update} if update == "gradient" else moving["reinforcement"]
        settings = {**moving, "reinforcement": chosen}
        assert not decide_compile(experiment_of(settings, compute={"compile": "auto"}))
    assert calls == [[8, 24], [8]]


@pytest.mark.parametrize("estimator", get_args(SurrogateEstimator))
def test_training_improves_the_adapted_policy(
    moving: dict[str, Any], tmp_path: Path, estimator: str
) -> None:
    settings = experiment_of(
        {**moving, "task": {"kind": "navigation", "trajectories": 20, "horizon": 20}},
        outer={"iterations": 10, "tasks_per_batch": 10, "tasks_per_chunk": 10},
        reinforcement={"estimator": estimator, "max_kl": 0.03},
        evaluation={"tasks": 20},
    )
    trained, random, oracle = train(settings, tmp_path / "run")
    best = oracle.mean["return"][0]
    assert trained.mean["return"][1] > random.mean["return"][1] + 1.5
    assert best > trained.mean["return"][1]
    # What the run recorded, by name.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    for step in (0, 1):
        for name in ("return", "entropy", "log_std", "explained_variance", "episode_length"):
            assert f"train/{name}_step{step}" in first
    assert first["train/inner_kl_step1"] > 0
    assert 0 <= first["train/hurt"] <= 1
    assert {"trpo/kl_before", "trpo/kl_after", "trpo/cg_residual"} <= set(first)
    assert (tmp_path / "run" / "plots" / "adaptation_return.png").exists()


def test_evaluation_is_that_of_the_run_and_halves_later_rates(
    moving: dict[str, Any], tmp_path: Path
) -> None:
    experiment = experiment_of(moving, inner={"later_lr_factor": 0.5})
    at_the_end = train(experiment, tmp_path / "run")[0]
    again = evaluate_run(
        load_run(tmp_path / "run"), tmp_path / "run", split="test", num_tasks=None, steps=None
    )[0]
    assert again.mean == at_the_end.mean
    whole = evaluate_run(
        load_run(tmp_path / "run").changed(inner={"later_lr_factor": 1.0}),
        tmp_path / "run",
        split="test",
        num_tasks=None,
        steps=None,
    )[0]
    # The first step is a trained one; the second is not.
    assert whole.mean["return"][:2] == again.mean["return"][:2]
    assert whole.mean["return"][2] != again.mean["return"][2]


def test_without_steps_one_policy_serves_all_tasks(moving: dict[str, Any], tmp_path: Path) -> None:
    """The pretrained baseline: trained without adaptation, adapted at test all the same."""
    trained = train(experiment_of(moving, inner={"steps": 0}), tmp_path / "run")[0]
    assert len(set(trained.mean["return"])) == 3
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "train/return_step0" in first
    assert "train/return_step1" not in first


def test_a_policy_that_explodes_is_reported(moving: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"not finite.*reinforcement\.max_kl"):
        train(experiment_of(moving, inner={"lr": 1e38}), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.horizon=0", "task.horizon: must be at least 1"),
        ("reinforcement.estimator=vine", "reinforcement.estimator"),
        ("inner.batch_size=3", "inner.batch_size: each step has trajectories of its own"),
        ("algorithm=reptile", "outer.direction: reptile is for supervised tasks"),
        ("outer.query_losses=all", "outer.query_losses"),
        ("diagnostics.every=5", "diagnostics.every"),
        ("inner.order=annealed", "inner.order: annealed is for supervised tasks"),
        ("inner.per_step=normalisation", "inner.per_step: is for supervised tasks"),
        ("inner.recompute=true", "inner.recompute: is for supervised tasks"),
        ("outer.lr=0.01", "outer.lr: reinforcement.update=trpo has its own way to move"),
        ("outer.clip_norm=1", "outer.clip_norm: reinforcement.update=trpo has its own way"),
        ("model.kind=mlp", "model.kind: continuous actions need gaussian-policy"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("navigation", [override])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["update=gradient", "max_kl=0.02"], "max_kl: only trpo has it, reinforcement.update is"),
        (["clip=0.1"], "clip: only promp has it, reinforcement.update is trpo"),
        (["update=promp", "damping=0"], "damping: only trpo has it, reinforcement.update is promp"),
        (["update=promp", "clip=1"], "clip: input should be less than 1"),
    ],
)
def test_settings_of_another_update_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("navigation", [f"reinforcement.{override}" for override in overrides])
    assert f"reinforcement.{message}" in str(refused.value)


def test_a_search_over_settings_of_another_update_is_refused() -> None:
    space = "search={space: {reinforcement.clip: {uniform: [0.1, 0.5]}}}"
    with pytest.raises(ConfigError, match=r"search\.space\.reinforcement\.clip: only promp"):
        possible_experiments(load("navigation", [space]))


@pytest.mark.parametrize("update", UPDATES)
def test_resolved_settings_of_every_update_load_again(moving: dict[str, Any], update: str) -> None:
    experiment = experiment_of({**moving, "reinforcement": {"update": update}})
    assert from_dict(experiment.plain()) == experiment


def test_one_policy_for_all_tasks_learns_no_rates() -> None:
    with pytest.raises(ConfigError, match=r"inner\.rates: without inner\.steps"):
        load("navigation", ["inner.steps=0", "inner.rates=per-parameter"])


def test_other_estimators_are_other_programs(moving: dict[str, Any]) -> None:
    """Within a process, where compiled programs are shared: of trials of a search, say."""
    chosen = [{"estimator": "lvc"}, {"estimator": "naive"}, {"update": "promp", "clip": 0.1}]
    experiments = [experiment_of({**moving, "reinforcement": settings}) for settings in chosen]
    programs = {ChunkComputer(each, compile=True).program()[0] for each in experiments}
    assert len(programs) == 3


@pytest.mark.parametrize("inner", [{}, {"order": "first"}, {"steps": 0}], ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_a_policy_without_forward_derivatives_is_refused_where_they_are_needed(
    moving: dict[str, Any], update: str, inner: dict[str, Any]
) -> None:
    """By a Fisher product always, by promp for the second order."""
    own = {"model": {"kind": "tests.helpers:backward_only"}, "reinforcement": {"update": update}}
    experiment = experiment_of({**moving, **own}, inner=inner)
    computer = ChunkComputer(experiment, compile=False)
    if update == "trpo" or (update == "promp" and not inner):
        with pytest.raises(ValueError, match=rf"no forward derivative.*update={update} needs"):
            computer.warm_up()
        return
    computer.warm_up()
    theta = flat_vector(initial_parameters(experiment))
    asked = [
        GradientJob(0, Span(0, 1)),
        *(job for job, _ in jobs_of_update(section(experiment), 0)),
    ]
    for job in asked:
        found = computer.run(theta, job, theta).gradient
        assert found is None or np.isfinite(found).all()


def section(experiment: Experiment) -> Reinforcement:
    assert experiment.reinforcement is not None
    return experiment.reinforcement


def test_supervised_tasks_take_at_least_one_step_and_no_policy_settings(
    quick: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"inner\.steps: must be at least 1"):
        from_dict({**quick, "inner": {"steps": 0}})
    with pytest.raises(ConfigError, match=r"reinforcement: sinusoid tasks are supervised"):
        from_dict({**quick, "reinforcement": {}})
    for kind in ("gaussian-policy", "categorical-policy"):
        with pytest.raises(
            ConfigError, match=rf"model\.kind: {kind} is for reinforcement learning tasks"
        ):
            from_dict({**quick, "model": {"kind": kind}})


def test_runs_are_compared_and_searched_by_their_returns(
    moving: dict[str, Any], tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    train(experiment_of(moving), one)
    different = {"inner": {"steps": 0, "later_lr_factor": 0.5}}
    train(experiment_of(moving, **different, reinforcement={"discount": 0.9}), other)
    (found,) = compare_runs([one, other], steps=(0, 1))
    assert found.metric == "return"
    assert recipes([found]) == {
        "inner steps trained": ["1", "0"],
        "inner later lr factor": ["–", "0.5"],
        "discount": ["0.99", "0.9"],
    }
    assert found.curves[0].protocol["estimator"] == "lvc"
    (difference,) = found.differences
    means = [curve.mean["return"] for curve in found.curves]
    assert difference.mean == pytest.approx([b - a for a, b in zip(*means, strict=True)])
    experiment = experiment_of(
        moving, search={"space": {"inner.lr": {"choice": [0.05, 0.1]}}, "samples": 2}
    )
    names = ChunkComputer(experiment, compile=False).metric_names()
    assert experiment.search is not None
    chosen = ranking_of(experiment.search, experiment, names)
    assert (chosen.metric, chosen.mode) == ("return", "max")


def test_a_policy_can_be_watched(
    moving: dict[str, Any], tmp_path: Path, drawn: list[Figure]
) -> None:
    """In the tasks and after the steps that are evaluated."""
    run, folder = tmp_path / "run", tmp_path / "video"
    file = tmp_path / "mine.yaml"
    file.write_text(experiment_of({**moving, "name": "navigation"}).to_yaml())
    trained = CliRunner().invoke(app, ["train", str(file), f"run_dir={run}"])
    assert trained.exit_code == 0, trained.output
    assert "\nbaseline     maml train navigation-pretrained, then maml compare" in trained.output
    assert (run / "plots" / "trajectories.png").stat().st_size > 1000
    drawn.clear()
    asked = ["--video", str(folder), "--split", "validation", "--tasks", "2", "--steps", "0,2"]
    done = CliRunner().invoke(app, ["evaluate", str(run), *asked])
    assert done.exit_code == 0, done.output
    assert {path.name for path in folder.iterdir()} == {
        *("trajectories.png", "task-0.gif", "task-1.gif")
    }
    still = drawn[0]
    assert [axes.get_title() for axes in still.axes[:2]] == ["before adaptation", "after 2 steps"]
    assert len(still.axes) == 4
    assert "goals of validation tasks" in still.texts[-1].get_text()
    with Image.open(folder / "task-1.gif") as film:
        assert getattr(film, "n_frames", 1) > 5


def test_what_is_made_for_examples_refuses_a_policy(moving: dict[str, Any], tmp_path: Path) -> None:
    train(experiment_of(moving, outer={"iterations": 1}), tmp_path)
    for command, what in {"analyze": "analysis", "export": "an exported model"}.items():
        refused = CliRunner().invoke(app, [command, str(tmp_path)])
        assert refused.exit_code == 2
        assert f"task.kind: {what} needs supervised tasks, not Navigation" in refused.stderr


def test_supervised_runs_are_not_watched(quick: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is done: this run has not even parameters."""
    (tmp_path / "config.yaml").write_text(experiment_of(quick).to_yaml())
    video = ["--video", str(tmp_path / "video")]
    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path), *video])
    assert refused.exit_code == 2
    assert (
        "--video: shows the trajectories of a policy, and sinusoid tasks are supervised"
        in refused.stderr
    )
