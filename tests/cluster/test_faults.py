"""Kills, stalls, interruptions and numbers that are not: nothing is lost, nothing changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.cluster import dispatch, roster
from pipeline.cluster.dispatch import RayWorkers
from pipeline.cluster.group import WorkersLost
from pipeline.maml.flat_vector import flat_vector
from pipeline.runs.checkpoint import CheckpointStore
from pipeline.training.endings import Diverged, Interrupted
from pipeline.training.loop import train
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tests.conftest import experiment_of
from tests.helpers import Recorder, by_name, final_theta

pytestmark = pytest.mark.long


@pytest.fixture(params=["supervised", "trpo", "promp"])
def slow(
    request: pytest.FixtureRequest, quick: dict[str, Any], moving: dict[str, Any]
) -> dict[str, Any]:
    """An experiment that leaves time to kill somebody."""
    if request.param == "supervised":
        return {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.01}}
    task = {**moving["task"], "kind": "tests.helpers:SlowNavigation", "seconds": 0.01}
    few = {"cg_iterations": 3, "backtracks": 3} if request.param == "trpo" else {"outer_steps": 2}
    return {**moving, "task": task, "reinforcement": {"update": request.param, **few}}


def test_killed_workers_change_nothing(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Workers are killed while they compute; the run ends with the bits of an undisturbed one.
    Those that had collected trajectories: tests/training/test_reinforcement.py."""
    slow = {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.01}}
    train(experiment_of(slow), tmp_path / "calm")
    killed: list[int] = []

    def kill_one(iteration: int, recorder: Recorder) -> None:
        if iteration in (1, 3):
            pids = [pid for pid in recorder.session.workers.pids() if pid not in killed]
            threading.Timer(0.08, lambda: os.kill(pids[0], signal.SIGKILL)).start()
            killed.append(pids[0])

    recorder = Recorder(kill_one)
    train(experiment_of(slow, cluster={"workers": 2}), tmp_path / "hit", watcher=recorder)
    assert len(killed) == 2
    assert any("was lost" in notice for notice in recorder.notices)
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "hit"))


def test_a_stalled_worker_is_overtaken(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """A stopped process answers nothing and does not die either; its chunks go elsewhere."""
    settings = {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.005}}
    train(experiment_of(settings), tmp_path / "calm")
    stopped: list[int] = []

    def stop_one(iteration: int, recorder: Recorder) -> None:
        if iteration == 2:
            stopped.append(recorder.session.workers.pids()[0])
            os.kill(stopped[0], signal.SIGSTOP)

    recorder = Recorder(stop_one)
    try:
        train(
            experiment_of(settings, cluster={"workers": 2, "chunk_timeout": 1.0}),
            tmp_path / "stalled",
            watcher=recorder,
        )
    finally:
        for pid in stopped:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)
    assert any("issued again" in notice for notice in recorder.notices)
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "stalled"))


def test_the_only_worker_may_stall(quick: dict[str, Any], tmp_path: Path, ray_local: None) -> None:
    """With nobody to overtake it, a worker that stays silent is replaced."""
    settings = experiment_of(quick, cluster={"workers": 1, "chunk_timeout": 0.5})
    train(experiment_of(quick), tmp_path / "calm")
    stopped: list[int] = []

    def stop_it(iteration: int, recorder: Recorder) -> None:
        if iteration == 2:
            stopped.append(recorder.session.workers.pids()[0])
            os.kill(stopped[0], signal.SIGSTOP)

    try:
        train(settings, tmp_path / "stalled", watcher=Recorder(stop_it))
    finally:
        for pid in stopped:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "stalled"))


@pytest.mark.timeout(600)
def test_a_chunk_that_ends_every_worker_ends_the_run(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Otherwise it would be given out for ever. Tasks are sampled for all chunks of an iteration at
    once, so it may be any of these."""
    settings = {**quick, "task": {"kind": "tests.helpers:DeadlySinusoid", "at": 4}}
    recorder = Recorder()
    experiment = experiment_of(settings, cluster={"workers": 2})
    said = r"iteration 0, chunk \d \(tasks \d to \d of the meta-batch\) ended 3 processes .*exit"
    with pytest.raises(WorkersLost, match=said):
        train(experiment, tmp_path / "run", watcher=recorder)
    assert any("1 of 2 workers go on" in notice for notice in recorder.notices)


def test_workers_that_cannot_start_end_the_run(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """A library that crashes when it is imported, say: Ray would start processes for ever."""
    settings = {**quick, "task": {"kind": "tests.helpers:CrashingSinusoid", "driver": os.getpid()}}
    with pytest.raises(WorkersLost, match="no worker is left, and none can be started"):
        train(experiment_of(settings, cluster={"workers": 1}), tmp_path / "run")


def test_an_error_of_one_machine_alone_is_not_believed(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """A full disk, a smaller GPU: another worker does the same, and the run goes on."""
    train(experiment_of(quick), tmp_path / "calm")
    spoilt = {"kind": "tests.helpers:SpoiltOnceSinusoid", "at": 25, "once": str(tmp_path / "once")}
    settings = {**quick, "task": {**quick["task"], **spoilt}}
    recorder = Recorder()
    train(experiment_of(settings, cluster={"workers": 2}), tmp_path / "hit", watcher=recorder)
    assert any("disk is full); another one tries" in notice for notice in recorder.notices)
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "hit"))


def test_an_error_in_the_computation_is_not_retried(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    settings = {**quick, "task": {"kind": "tests.helpers:BrokenSinusoid"}}
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        train(experiment_of(settings, cluster={"workers": 1}), tmp_path / "run")


def test_workers_that_fit_nowhere_are_refused(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """A local Ray does not grow: waiting would never end."""
    experiment = experiment_of(quick, cluster={"workers": 1, "gpus_per_worker": 2})
    with pytest.raises(ValueError, match=r"a worker takes 0\.5 CPU, 2 GPU, and Ray has 0 GPU"):
        train(experiment, tmp_path / "run")


def test_starting_is_told_from_waiting(
    quick: dict[str, Any], ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_QUIET", 0.0)
    said: list[str] = []
    RayWorkers(experiment_of(quick), False, 1, said.append, 25).close()
    assert re.fullmatch(r"the worker is starting, for \d+ s now: processes import torch", said[0])
    with monkeypatch.context() as busy:
        busy.setattr(roster, "has_room", lambda experiment: False)
        RayWorkers(experiment_of(quick), False, 1, said.append, 25).close()
    assert "waiting for room" in said[-1]
    assert "the worker takes 0.5 CPU, and others hold what Ray has" in said[-1]


@pytest.mark.timeout(600)
def test_resume_after_sigkill_equals_an_uninterrupted_run(
    slow: dict[str, Any], tmp_path: Path
) -> None:
    """The driver is killed outright; optimiser moments, schedule and best-so-far survive."""
    moved = {"scheduler": "CosineAnnealingLR", "optimizer": "adamw"}
    if slow.get("reinforcement", {}).get("update") == "trpo":
        moved = {}  # has neither
    settings = {
        **slow,
        "task": {**slow["task"], "seconds": 0.003},
        "outer": {**slow["outer"], "iterations": 12, **moved},
        "checkpoint": {"every": 3},
        "evaluation": {**slow["evaluation"], "every": 4},
    }
    train(experiment_of(settings), tmp_path / "whole")
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**settings, "run_dir": str(tmp_path / "cut")}))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    store = CheckpointStore(tmp_path / "cut" / "checkpoints", keep=2)
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not any(c.iteration for c in store.list()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = store.latest()
    assert state is not None
    assert 0 < state.iteration < 12
    train(experiment_of(settings), tmp_path / "cut", resume=True)
    assert torch.equal(final_theta(tmp_path / "whole"), final_theta(tmp_path / "cut"))
    whole, cut = (
        CheckpointStore(tmp_path / n / "checkpoints", 2).latest() for n in ("whole", "cut")
    )
    assert whole is not None
    assert cut is not None
    assert whole.best == cut.best
    assert whole.scheduler == cut.scheduler
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines if "gradient_norm" in line]
    assert iterations == list(range(1, 13)), "every iteration is recorded once"


def test_interrupt_leaves_a_checkpoint(quick: dict[str, Any], tmp_path: Path) -> None:
    experiment = experiment_of(quick)
    recorder = Recorder()
    with pytest.raises(Interrupted, match="iteration 3"):
        train(
            experiment,
            tmp_path / "run",
            watcher=recorder,
            should_stop=lambda: len(recorder.metrics) == 3,
        )
    state = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).latest()
    assert state is not None
    assert state.iteration == 3


def test_nan_stops_before_the_update(quick: dict[str, Any], tmp_path: Path) -> None:
    """Tasks become NaN in iteration 3: θ stays that of iteration 2, and the tasks are named."""
    settings = {
        **quick,
        "task": {"kind": "tests.helpers:NanSinusoid", "first_bad": 23, "last_bad": 58},
    }
    recorder = Recorder()
    with pytest.raises(Diverged) as failure:
        train(experiment_of(settings), tmp_path / "run", watcher=recorder)
    assert "iteration 4" in str(failure.value)
    assert "3 updates in a row" in str(failure.value)
    assert "tasks 40, 41" in str(failure.value)
    assert "Adaptation leads to losses that are not finite: lower inner.lr" in str(failure.value)
    assert "clip" not in str(failure.value)
    assert any("training tasks 23, 24, 25" in notice for notice in recorder.notices)
    state = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).latest()
    assert state is not None
    train(experiment_of(settings, outer={"iterations": 2}), tmp_path / "two")
    theta = by_name({k: v for k, v in state.tensors.items() if k.startswith("theta.")})
    assert torch.equal(theta, final_theta(tmp_path / "two"))
    assert torch.isfinite(theta).all()


def test_one_bad_update_is_passed_over(quick: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **quick,
        "task": {"kind": "tests.helpers:NanSinusoid", "first_bad": 23, "last_bad": 24},
    }
    recorder = Recorder()
    train(experiment_of(settings), tmp_path / "run", watcher=recorder)
    assert torch.isfinite(final_theta(tmp_path / "run")).all()
    assert not np.isfinite(recorder.metrics[2]["meta_gradient_norm"])
    assert np.isfinite(recorder.metrics[3]["meta_gradient_norm"])


def test_answers_of_an_earlier_round_are_discarded(
    quick: dict[str, Any], ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk issued twice answers twice; the second answer must not be taken for the next θ."""
    monkeypatch.setattr(dispatch, "_TICK", 0.05)
    experiment = experiment_of(
        {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.2}},
        cluster={"workers": 2, "chunk_timeout": 0.5},
    )
    flat, said, late = flat_vector(initial_parameters(experiment)), [], 0
    workers = RayWorkers(experiment, False, 2, said.append, flat.size)
    try:
        while workers.ready < 2:
            workers._wait()
        for iteration in range(3):
            scaled = flat * (iteration + 1)
            job = GradientJob(iteration, Span(0, 1))
            (result,) = workers.run(scaled, [job])
            late += sum(len(worker.calls) for worker in workers._roster.workers.values())
            expected = ChunkComputer(experiment, compile=False).run(scaled, job)
            assert result.job == job
            assert np.array_equal(result.gradient, expected.gradient)
    finally:
        workers.close()
    assert any("issued again" in line for line in said)
    assert late > 0
