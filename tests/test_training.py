"""The driver's promises: the same θ for any number of workers, after a kill, after a resume."""

from __future__ import annotations

import json
import os
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

from pipeline.aggregation import aggregate
from pipeline.checkpoint import CheckpointStore, load_theta
from pipeline.chunk import ChunkComputer, GradientJob, initial_parameters
from pipeline.outer_update import OuterUpdate, schedulers
from pipeline.parameters import Layout
from pipeline.ray_workers import RayWorkers
from pipeline.session import Interrupted, RunFolderError, Watcher
from pipeline.training import TrainingFailed, train
from tests.conftest import experiment_of


def final_theta(run_dir: Path) -> torch.Tensor:
    theta = load_theta(run_dir / "theta.safetensors")
    return by_name(theta)


def by_name(params: dict[str, torch.Tensor]) -> torch.Tensor:
    """One vector, in the order of the names: files keep no order."""
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


class Recorder(Watcher):
    """Keeps what it is told, and calls `at` after each iteration."""

    def __init__(self, at: Any = None):
        self.notices: list[str] = []
        self.metrics: list[dict[str, float]] = []
        self.session: Any = None
        self._at = at

    def started(self, session: Any) -> None:
        self.session = session

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)
        if self._at is not None:
            self._at(iteration, self)


def test_training_finds_the_optimum(quick: dict[str, Any], tmp_path: Path) -> None:
    """The best start for quadratics with optima ~ N(1, 0.1²) is 1 in every coordinate."""
    experiment = experiment_of(
        {**quick, "task": {"kind": "quadratic", "spread": 0.1}, "model": {"kind": "linear"}},
        inner={"lr": 0.2},
        outer={"iterations": 200, "lr": 0.05, "tasks_per_chunk": 10},
        evaluation={"tasks": 50},
    )
    (trained, random) = train(experiment, tmp_path / "run")
    assert (trained.who, random.who) == ("trained", "random init")
    torch.testing.assert_close(final_theta(tmp_path / "run"), torch.ones(4), atol=0.05, rtol=0)
    for step in range(3):
        assert trained.mean["loss"][step] < 0.2 * random.mean["loss"][step]
    assert trained.mean["loss"][2] < 0.5 * trained.mean["loss"][0]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bits(
    workers: int, quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Chunks of 3, 3, 3 and 1 tasks. All workers are on this machine: hardware does not vary."""
    train(experiment_of(quick), tmp_path / "alone")
    train(experiment_of(quick, cluster={"workers": workers}), tmp_path / "actors")
    assert torch.equal(final_theta(tmp_path / "alone"), final_theta(tmp_path / "actors"))


def test_compiled_workers_give_the_same_bits(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Each process compiles for itself, from the same program, for the same number of threads."""
    settings = {**quick, "compute": {**quick["compute"], "compile": "always"}}
    train(experiment_of(settings), tmp_path / "alone")
    train(experiment_of(settings, cluster={"workers": 2}), tmp_path / "actors")
    assert torch.equal(final_theta(tmp_path / "alone"), final_theta(tmp_path / "actors"))


def test_killed_workers_change_nothing(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Workers are killed while they compute; the run ends with the bits of an undisturbed one."""
    slow = {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.05}
    settings = {**quick, "task": slow}
    train(experiment_of(settings), tmp_path / "calm")
    killed: list[int] = []

    def kill_one(iteration: int, recorder: Recorder) -> None:
        if iteration in (1, 3):
            pids = [pid for pid in recorder.session.workers.pids() if pid not in killed]
            threading.Timer(0.08, lambda: os.kill(pids[0], signal.SIGKILL)).start()
            killed.append(pids[0])

    recorder = Recorder(kill_one)
    train(experiment_of(settings, cluster={"workers": 2}), tmp_path / "hit", watcher=recorder)
    assert len(killed) == 2
    assert any("was lost" in notice for notice in recorder.notices)
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "hit"))


def test_a_stalled_worker_is_overtaken(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """A stopped process answers nothing and does not die either; its chunks go elsewhere."""
    settings = {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.02}}
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


def test_an_error_in_the_computation_is_not_retried(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    settings = {**quick, "task": {"kind": "tests.helpers:BrokenSinusoid"}}
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        train(experiment_of(settings, cluster={"workers": 1}), tmp_path / "run")


def test_resume_after_sigkill_equals_an_uninterrupted_run(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """The driver is killed outright; optimiser moments, schedule and best-so-far survive."""
    settings = {
        **quick,
        "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.01},
        "outer": {
            **quick["outer"],
            "iterations": 30,
            "scheduler": "CosineAnnealingLR",
            "optimizer": "adamw",
        },
        "checkpoint": {"every": 4},
        "evaluation": {**quick["evaluation"], "every": 5},
    }
    train(experiment_of(settings), tmp_path / "whole")
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**settings, "run_dir": str(tmp_path / "cut")}))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    store = CheckpointStore(tmp_path / "cut" / "checkpoints", keep=2)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(c.iteration for c in store.list()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = store.latest()
    assert state is not None
    assert 0 < state.iteration < 30
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
    iterations = [json.loads(line)["iteration"] for line in lines if "outer_lr" in line]
    assert iterations == list(range(1, 31)), "every iteration is recorded once"


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
    with pytest.raises(TrainingFailed) as failure:
        train(experiment_of(settings), tmp_path / "run", watcher=recorder)
    assert "iteration 4" in str(failure.value)
    assert "3 updates in a row" in str(failure.value)
    assert "tasks 40, 41" in str(failure.value)
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


def test_chunked_equals_whole(quick: dict[str, Any]) -> None:
    """Unequal chunks give the mean over all tasks, not the mean of means."""
    whole = experiment_of(quick, outer={"tasks_per_chunk": 10}, compute={"dtype": "float64"})
    chunked = experiment_of(quick, compute={"dtype": "float64"})
    gradients = []
    for experiment in (whole, chunked):
        computer = ChunkComputer(experiment, compile=False)
        theta = initial_parameters(experiment)
        flat = Layout.of(theta).join(theta).numpy()
        jobs = [GradientJob(0, chunk) for chunk in range(computer.num_chunks)]
        results = [computer.run(flat, job) for job in jobs]
        gradients.append(aggregate(results))
        computer.close()
    assert len(gradients) == 2
    torch.testing.assert_close(gradients[0].gradient, gradients[1].gradient, rtol=1e-12, atol=1e-12)
    for name, value in gradients[0].metrics.items():
        assert value == pytest.approx(gradients[1].metrics[name], rel=1e-12)


def test_answers_of_an_earlier_round_are_discarded(quick: dict[str, Any], ray_local: None) -> None:
    """A chunk issued twice answers twice; the second answer must not be taken for the next θ."""
    experiment = experiment_of(
        {**quick, "task": {"kind": "tests.helpers:SlowSinusoid", "seconds": 0.3}},
        cluster={"workers": 2, "chunk_timeout": 0.15},
    )
    workers = RayWorkers(experiment, False, 2, lambda line: None)
    try:
        theta = initial_parameters(experiment)
        flat = Layout.of(theta).join(theta).numpy()
        for iteration in range(3):
            scaled = flat * (iteration + 1)
            (result,) = workers.run(scaled, [GradientJob(iteration, 0)]).results
            alone = ChunkComputer(experiment, compile=False)
            expected = alone.run(scaled, GradientJob(iteration, 0))
            alone.close()
            assert result.job == GradientJob(iteration, 0)
            assert np.array_equal(result.gradient, expected.gradient)
    finally:
        workers.close()


def test_a_run_folder_is_not_overwritten(quick: dict[str, Any], tmp_path: Path) -> None:
    train(experiment_of(quick), tmp_path / "run")
    with pytest.raises(RunFolderError, match="--resume"):
        train(experiment_of(quick), tmp_path / "run")


def test_a_run_folder_that_cannot_be_written(quick: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match="cannot write"):
        train(experiment_of(quick), tmp_path / "file" / "run")


def test_clipping_and_schedule(quick: dict[str, Any]) -> None:
    outer = experiment_of(
        quick,
        outer={
            "optimizer": "sgd",
            "lr": 1.0,
            "clip_norm": 2.0,
            "scheduler": "CosineAnnealingLR",
            "iterations": 4,
        },
    ).outer
    update = OuterUpdate({"w": torch.zeros(4)}, outer)
    norm = update.step(torch.full((4,), 10.0))
    assert norm == pytest.approx(20.0), "the norm before clipping is reported"
    assert torch.linalg.vector_norm(update.flat).item() == pytest.approx(2.0)
    for _ in range(3):
        update.step(torch.zeros(4))
    assert update.lr == pytest.approx(0.0, abs=1e-12)
    by_value = OuterUpdate(
        {"w": torch.zeros(2)}, outer.model_copy(update={"clip_norm": None, "clip_value": 0.5})
    )
    by_value.step(torch.tensor([3.0, -0.1]))
    assert by_value.flat.tolist() == pytest.approx([-0.5, 0.1])


@pytest.mark.parametrize("name", schedulers())
def test_every_schedule_is_resumed_where_it_was(name: str, quick: dict[str, Any]) -> None:
    arguments = {
        "OneCycleLR": {"max_lr": 0.1},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
        "CosineAnnealingWarmRestarts": {"T_0": 3},
        "StepLR": {"step_size": 2},
        "MultiStepLR": {"milestones": [2, 5]},
        "ExponentialLR": {"gamma": 0.5},
    }.get(name, {})
    outer = experiment_of(
        quick, outer={"iterations": 9, "scheduler": name, "scheduler_args": arguments}
    ).outer
    straight, resumed = (OuterUpdate({"w": torch.ones(3)}, outer) for _ in range(2))
    rates = []
    for step in range(9):
        gradient = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
        straight.step(gradient)
        resumed.step(gradient)
        rates.append(straight.lr)
        fresh = OuterUpdate({"w": torch.ones(3)}, outer)
        fresh.restore(resumed.tensors(), resumed.scheduler_state())
        resumed = fresh
        assert resumed.lr == straight.lr
        assert torch.equal(resumed.flat, straight.flat)
    assert len(set(rates)) > 1 or name == "ConstantLR"


def test_a_finished_schedule_goes_on_when_the_run_is_continued(quick: dict[str, Any]) -> None:
    """At the end of a cosine the rate is 0; with more iterations the longer cosine counts."""
    short, long = (
        experiment_of(quick, outer={"iterations": n, "scheduler": "CosineAnnealingLR"}).outer
        for n in (4, 8)
    )
    finished = OuterUpdate({"w": torch.ones(2)}, short)
    for _ in range(4):
        finished.step(torch.ones(2))
    assert finished.lr == pytest.approx(0.0, abs=1e-12)
    continued = OuterUpdate({"w": torch.ones(2)}, long)
    continued.restore(finished.tensors(), finished.scheduler_state())
    assert continued.lr == pytest.approx(long.lr / 2)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_outer_update_equals_torch_per_parameter(optimizer: str, quick: dict[str, Any]) -> None:
    """One flat vector to the optimiser is the same as a tensor per parameter; state survives."""
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    outer = experiment_of(
        quick, outer={"optimizer": optimizer, "weight_decay": 0.1, **momentum}
    ).outer
    generator = torch.Generator().manual_seed(0)
    theta = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    reference = [torch.nn.Parameter(p.clone()) for p in theta.values()]
    factory = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    torch_optimizer: Any = factory[optimizer](reference, lr=outer.lr, weight_decay=0.1, **momentum)  # type: ignore[operator]
    update = OuterUpdate(theta, outer)
    for step in range(6):
        gradients = {n: torch.randn(p.shape, generator=generator) for n, p in theta.items()}
        update.step(update.layout.join(gradients))
        for parameter, gradient in zip(reference, gradients.values(), strict=True):
            parameter.grad = gradient
        torch_optimizer.step()
        if step == 2:
            restored = OuterUpdate(theta, outer)
            restored.restore(update.tensors(), update.scheduler_state())
            update = restored
    for ours, theirs in zip(update.theta.values(), reference, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
