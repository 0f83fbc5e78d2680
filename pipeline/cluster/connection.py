"""Connects to a running Ray cluster, or starts Ray on this machine."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np

from pipeline.cluster.group import WorkersLost
from pipeline.config.experiment import Experiment
from pipeline.worker.cpus import available_cpus

# Answers up to this size travel with the message instead of through the object store (Ray's default
# is 100 kB): a gradient of conv4 is 450 kB. A cluster has its own setting (see cluster.yaml).
_INLINE_BYTES = 2**21
_RAYS_INLINE_BYTES = 100 * 1024
INLINE_SETTING = "RAY_max_direct_call_object_size"
"""The environment variable that sets it for the nodes of a cluster, and tells it to a driver."""


def cluster_address(experiment: Experiment) -> str | None:
    """The address of a running Ray cluster, or None for a local one."""
    address = experiment.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def bytes_in_calls(experiment: Experiment) -> int:
    """Up to which size an array travels within a call, and not through the object store."""
    if cluster_address(experiment) is None:
        return _INLINE_BYTES
    return int(os.environ.get(INLINE_SETTING, _RAYS_INLINE_BYTES))


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
