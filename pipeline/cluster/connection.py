"""Connects to a running Ray cluster or starts Ray on this machine; tells whether it has room."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cluster.group import WorkersLost
from pipeline.config.experiment import Experiment
from pipeline.worker.cpus import available_cpus

# Answers up to this size travel with the message instead of through the object store (Ray's default
# is 100 kB): a gradient of conv4 is 450 kB. A cluster has its own setting (see cluster.yaml).
_INLINE_BYTES = 2**21


def cluster_address(experiment: Experiment) -> str | None:
    """The address of a running Ray cluster, or None for a local one."""
    address = experiment.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def connect(experiment: Experiment, size: int) -> bool:
    """Connect this process to Ray, for `size` workers. Returns whether it was not connected before,
    so that the caller must shut Ray down again. Raises WorkersLost where Ray does not start."""
    import ray

    if ray.is_initialized():
        return False
    address = cluster_address(experiment)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray would take SIGTERM for itself, and end a run without a checkpoint.
    before = signal.getsignal(signal.SIGTERM)
    try:
        _start_or_join(experiment, size, address, quiet)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return True


def worker_bundle(experiment: Experiment) -> dict[str, float]:
    """The resources of a worker by Ray's names, 'CPU' and 'GPU'; those that it takes none of are
    left out."""
    cluster = experiment.cluster
    amounts = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return {kind: amount for kind, amount in amounts.items() if amount}


def lacking(who: str, bundles: Sequence[Mapping[str, float]]) -> str:
    """What Ray has too little of for all bundles at once, in words; '' if it has enough.

    Resources that others use now count as there. The last bundle is that of a worker; `who` begins
    the sentence, as "a trial takes 2 workers of" does.
    """
    import ray

    there = ray.cluster_resources()
    total = {kind: sum(b.get(kind, 0.0) for b in bundles) for kind in ("CPU", "GPU")}
    short = {kind: amount for kind, amount in total.items() if amount > there.get(kind, 0.0)}
    each = as_text(bundles[-1])
    if short:
        together = f", together {as_text(short)}" if len(bundles) > 1 else ""
        return (
            f"cluster.workers: {who} {each}{together}, and Ray has "
            f"{as_text({kind: there.get(kind, 0.0) for kind in short})}: lower "
            "cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(n <= node.get(kind, 0.0) for kind, n in bundles[-1].items()) for node in nodes):
        return ""
    return f"cluster.cpus_per_worker: no node of the Ray cluster has {each}"


def refuse_or_wait(experiment: Experiment, missing: str, notice: Callable[[str], None]) -> None:
    """Act on the answer of `lacking`: where something is missing, tell that the run waits for a
    cluster to grow. Raises ValueError where Ray is this machine alone, which cannot grow."""
    if missing and cluster_address(experiment) is None:
        raise ValueError(missing)
    if missing:
        notice(f"{missing}; waiting for the cluster to grow")


def has_room(experiment: Experiment) -> bool:
    """Whether Ray has room for a worker right now. Only to be asked before the first one starts,
    because that one takes the room."""
    import ray

    if cluster_address(experiment) is None:
        return True  # nobody else is there
    if ray.util.get_current_placement_group() is not None:
        return True  # reserved for us, as for a trial
    free = ray.available_resources()
    wanted = worker_bundle(experiment)
    return all(amount <= free.get(kind, 0.0) for kind, amount in wanted.items())


def waiting_for_room(workers: str, bundle: Mapping[str, float], seconds: float) -> str:
    """Why no worker has started after so many seconds, where others use the cluster; in words."""
    import ray

    free = ray.available_resources()
    return (
        f"waiting for room, for {seconds:.0f} s now: {workers} takes {as_text(bundle)}, and others "
        f"hold what Ray has (free are {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU)"
    )


def as_text(amounts: Mapping[str, float]) -> str:
    """Resources in words: '1 CPU, 0.5 GPU'."""
    return ", ".join(f"{amount:g} {kind}" for kind, amount in amounts.items())


def _start_or_join(
    experiment: Experiment, size: int, address: str | None, quiet: dict[str, Any]
) -> None:
    import ray

    if address is not None:
        # A running cluster has its own resources; naming any here would be an error.
        ray.init(address=address, **quiet)
        return
    needed = int(np.ceil(size * experiment.cluster.cpus_per_worker))
    # Workers are what this Ray is for; at Ray's 15 whatever else runs would come before them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            address="local",
            num_cpus=max(available_cpus(), needed),
            include_dashboard=False,
            _system_config={"max_direct_call_object_size": _INLINE_BYTES},
            **quiet,
        )
    except Exception as error:  # Ray has no type of its own for this
        raise WorkersLost(
            "Ray did not start on this machine, which may be too busy: try again, or train in this "
            f"process with cluster.workers=0 ({error})"
        ) from error
