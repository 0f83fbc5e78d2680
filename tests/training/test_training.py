"""The driver's promises: the same θ for any number of workers, however the batch is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cluster.rounds import total_of
from pipeline.maml.flat_vector import Layout
from pipeline.runs.folder import RunFolderError
from pipeline.training.aggregation import aggregate
from pipeline.training.loop import train
from pipeline.training.session import Watcher
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import Cut, GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tests.conftest import experiment_of
from tests.helpers import final_theta


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


def test_any_number_of_workers_gives_the_same_bits(
    either: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Chunks of 3, 3, 3 and 1 tasks, or of 4 and 2. All workers are on this machine: hardware does
    not vary. (Two of them are in most tests that have any.)"""
    train(experiment_of(either), tmp_path / "alone")
    for workers in (1, 3):
        folder = tmp_path / f"{workers} actors"
        train(experiment_of(either, cluster={"workers": workers}), folder)
        assert torch.equal(final_theta(tmp_path / "alone"), final_theta(folder)), workers


def test_compiled_workers_give_the_same_bits(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Each process compiles for itself, from the same program, for the same number of threads."""
    settings = {**quick, "compute": {**quick["compute"], "compile": "always"}}
    train(experiment_of(settings), tmp_path / "alone")
    train(experiment_of(settings, cluster={"workers": 2}), tmp_path / "actors")
    assert torch.equal(final_theta(tmp_path / "alone"), final_theta(tmp_path / "actors"))


def test_chunked_equals_whole(quick: dict[str, Any]) -> None:
    """Unequal chunks give the mean over all tasks, not the mean of means."""
    whole = experiment_of(quick, outer={"tasks_per_chunk": 10}, compute={"dtype": "float64"})
    chunked = experiment_of(quick, compute={"dtype": "float64"})
    gradients = []
    for experiment in (whole, chunked):
        computer = ChunkComputer(experiment, compile=False)
        theta = initial_parameters(experiment)
        flat = Layout.of(theta).join(theta).numpy()
        result = computer.run(flat, GradientJob(0, Span(0, computer.num_chunks)))
        cut = Cut(10, experiment.outer.tasks_per_chunk or 10)
        gradients.append(aggregate(total_of([result], result.gradient, 0.0), cut))
    assert len(gradients) == 2
    torch.testing.assert_close(gradients[0].gradient, gradients[1].gradient, rtol=1e-12, atol=1e-12)
    for name, value in gradients[0].metrics.items():
        assert value == pytest.approx(gradients[1].metrics[name], rel=1e-12)


def test_a_run_folder_is_not_overwritten(quick: dict[str, Any], tmp_path: Path) -> None:
    train(experiment_of(quick), tmp_path / "run")
    with pytest.raises(RunFolderError, match="--resume"):
        train(experiment_of(quick), tmp_path / "run")


class InterruptedAtStart(Watcher):
    """Somebody presses Ctrl-C while workers start."""

    def notice(self, message: str) -> None:
        assert message.startswith("workers: ")
        raise KeyboardInterrupt


def test_a_run_that_did_not_start_leaves_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    experiment = experiment_of(quick, cluster={"workers": "auto"})
    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "runs" / "new", watcher=InterruptedAtStart())
    assert list((tmp_path / "runs").iterdir()) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").touch()
    with pytest.raises(KeyboardInterrupt):
        train(experiment, mine, watcher=InterruptedAtStart())
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    train(experiment_of(quick), mine)
    before = sorted(mine.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        train(experiment, mine, watcher=InterruptedAtStart(), resume=True)
    assert sorted(mine.rglob("*")) == before


def test_a_run_folder_that_cannot_be_written(quick: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match="cannot write"):
        train(experiment_of(quick), tmp_path / "file" / "run")
