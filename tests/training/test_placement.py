"""Where chunks are computed: GPUs that are there are used, small models have one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pipeline.cluster import capacity, group
from pipeline.training.loop import train
from pipeline.training.placement import decide_workers, gpu_share
from pipeline.training.session import Session, Watcher
from tests.conftest import experiment_of
from tests.helpers import final_theta


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """This process sees so many GPUs. It must not compute on one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.fixture
def one_gpu(no_ray: None) -> None:
    """A Ray that believes in one."""
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="ERROR"
    )


@pytest.mark.parametrize(
    ("workers", "gpus", "share"),
    [
        ("auto", 0, 0),
        ("auto", 1, 1),
        (0, 1, 0),  # in process, on the GPU
        (1, 1, 1),
        (2, 1, 0.5),
        (3, 1, 0.3333),
        (3, 2, 0.5),  # one alone, two together: a share is of one GPU
        (4, 8, 1),
    ],
)
def test_actors_share_what_is_there(
    quick: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    workers: int | str,
    gpus: int,
    share: float,
) -> None:
    pretend(monkeypatch, gpus)
    settings = {"cluster": {"workers": workers}, "compute": {"device": "auto"}}
    assert gpu_share(experiment_of(quick, **settings)) == share
    settings["compute"]["device"] = "cpu"
    assert gpu_share(experiment_of(quick, **settings)) == 0
    settings["cluster"]["gpus_per_worker"] = 0.25
    assert gpu_share(experiment_of(quick, **settings)) == 0.25


def test_one_gpu_computes_in_process(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 1)
    settings = {"cluster": {"workers": "auto"}, "compute": {"device": "auto"}}
    placement = decide_workers(experiment_of(quick, **settings), compile=False)
    assert (placement.workers, placement.reason) == (0, "on the GPU of this machine")


@pytest.mark.long
def test_two_actors_share_one_gpu(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, one_gpu: None, tmp_path: Path
) -> None:
    """Nobody asked for a share. Results are those of any other run."""
    pretend(monkeypatch, 1)
    free: list[float] = []

    class Look(Watcher):
        def started(self, session: Session) -> None:
            free.append(ray.available_resources().get("GPU", 0.0))
            assert "2 Ray actors with 0.5 GPU each" in session.method.describe(session)

    settings = {"cluster": {"workers": 2}, "compute": {"device": "auto"}}
    train(experiment_of(quick, **settings), tmp_path / "shared", watcher=Look())
    assert free[0] <= 0.5  # the second may still be starting
    monkeypatch.undo()
    train(experiment_of(quick), tmp_path / "calm")
    assert torch.equal(final_theta(tmp_path / "calm"), final_theta(tmp_path / "shared"))


@pytest.mark.parametrize("sections", [{}, {"pretraining": {"batch_size": 12, "part_size": 4}}])
def test_a_crowd_is_refused_before_anything_starts(
    quick: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    tmp_path: Path,
    no_ray: None,
) -> None:
    """Also where each asks for next to nothing of a CPU: it is a process all the same."""
    monkeypatch.setattr(capacity, "available_cpus", lambda: 2)
    crowd = experiment_of(quick, **sections, cluster={"workers": 17, "cpus_per_worker": 0.01})
    with pytest.raises(ValueError, match=r"^cluster\.workers: 17 workers on the 2 CPUs of this"):
        train(crowd, tmp_path / "run")
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()
    capacity.refuse_crowd(experiment_of(quick, cluster={"workers": 16}))
    far = {"workers": 500, "address": "ray://somewhere"}
    capacity.refuse_crowd(experiment_of(quick, cluster=far))


def test_no_more_actors_than_chunks(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta-batch of `quick` has four. A cluster has the last word about its own workers."""
    pretend(monkeypatch, 1)
    for asked, started, share in ((1, 1, 1), (3, 3, 0.3333), (4, 4, 0.25), (9, 4, 0.25)):
        settings = {"cluster": {"workers": asked}, "compute": {"device": "auto"}}
        placement = decide_workers(experiment_of(quick, **settings), compile=False)
        assert (placement.workers, placement.gpus_per_worker) == (started, share)
    far = {"workers": 9, "address": "ray://somewhere", "gpus_per_worker": 0}
    assert decide_workers(experiment_of(quick, cluster=far), compile=False).workers == 9


def test_small_models_have_one_thread(
    quick: dict[str, Any], moving: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trajectories are many examples at once, so a small policy is more work than it seems."""
    monkeypatch.setattr(group, "available_cpus", lambda: 4)
    ours = {"compute": {"threads": None}, "cluster": {"cpus_per_worker": 3}}
    large = {**ours, "model": {"kind": "mlp", "hidden": [150, 150]}}
    small, wide, policy = (
        experiment_of(quick, **ours),
        experiment_of(quick, **large),
        experiment_of(moving, **ours),
    )
    for workers, many in ((0, 4), (1, 3)):
        assert group.threads_per_chunk(small, workers) == 1
        assert group.threads_per_chunk(wide, workers) == many
        assert group.threads_per_chunk(policy, workers) == many
    assert group.threads_per_chunk(experiment_of(quick, compute={"threads": 5}), 0) == 5
