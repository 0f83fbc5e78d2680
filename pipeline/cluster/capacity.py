"""What there is room for: how many workers fit, what is lacking, what a start waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pipeline.cluster.connection import cluster_address, connect
from pipeline.cluster.ray_state import free_resources, resources_to_grow_to
from pipeline.config.experiment import Experiment
from pipeline.config.wording import counted
from pipeline.worker.cpus import available_cpus

_MOST_PER_CPU = 8  # workers that a machine of its own may start, however little each asks for


def worker_bundle(experiment: Experiment) -> dict[str, float]:
    """The resources of a worker by Ray's names, 'CPU', 'GPU' and the cluster's own; those that it
    takes none of are left out."""
    cluster = experiment.cluster
    amounts = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker or 0.0}
    amounts |= cluster.resources_per_worker
    return {kind: amount for kind, amount in amounts.items() if amount}


def actor_options(experiment: Experiment) -> dict[str, Any]:
    """What Ray is told of where a worker may be, and what it takes there."""
    cluster = experiment.cluster
    return {
        "num_cpus": cluster.cpus_per_worker,
        "num_gpus": cluster.gpus_per_worker,
        "resources": cluster.resources_per_worker,
        "accelerator_type": cluster.accelerator,
        "label_selector": cluster.labels,
        "scheduling_strategy": "SPREAD" if cluster.spread else None,
    }


def lacking(who: str, bundles: Sequence[Mapping[str, float]]) -> str:
    """What Ray has too little of for all bundles at once, in words; '' if it has enough.

    Resources that others use now count as there. The last bundle is that of a worker; `who` begins
    the sentence, as "a trial takes 2 workers of" does.
    """
    import ray

    there = ray.cluster_resources()
    kinds = sorted({kind for bundle in bundles for kind in bundle})
    total = {kind: sum(b.get(kind, 0.0) for b in bundles) for kind in kinds}
    short = {kind: amount for kind, amount in total.items() if amount > there.get(kind, 0.0)}
    each = as_text(bundles[-1])
    if short:
        together = f", together {as_text(short)}" if len(bundles) > 1 else ""
        return (
            f"cluster.workers: {who} {each}{together}, and Ray has "
            f"{as_text({kind: there.get(kind, 0.0) for kind in short})}: lower "
            "cluster.workers or what each takes (cluster.cpus_per_worker, ...)"
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(n <= node.get(kind, 0.0) for kind, n in bundles[-1].items()) for node in nodes):
        return ""
    return f"cluster.cpus_per_worker: no node of the Ray cluster has {each}"


def too_many_workers(experiment: Experiment, workers: int) -> str:
    """That a local Ray is to have more workers than this machine has CPUs for, in words, or ''."""
    cpus, each = available_cpus(), experiment.cluster.cpus_per_worker
    if ray_knows(experiment) or workers * each <= cpus:
        return ""
    return (
        f"cluster.workers: {workers} workers of {each:g} CPU share {cpus} CPUs of this machine: "
        f"more than {max(1, int(cpus / each))} do not help, and each takes some 300 MB of memory"
    )


def refuse_crowd(experiment: Experiment) -> None:
    """Raise ValueError where this machine alone is to start far more workers than it has CPUs; each
    is a process of its own, whatever share of a CPU it asks for.

    A Ray that runs already starts no more than it has room for.
    """
    wanted, cpus = experiment.cluster.workers, available_cpus()
    most = _MOST_PER_CPU * cpus
    if wanted == "auto" or wanted <= most or cluster_address(experiment) is not None:
        return
    import ray

    if not ray.is_initialized():
        raise ValueError(
            f"cluster.workers: {wanted} workers on the {counted(cpus, 'CPU')} of this machine "
            f"would wait for each other, and each takes some 300 MB of memory: ask for {most} at "
            "most, or name a Ray cluster with cluster.address"
        )


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


class Room(NamedTuple):
    """For how many workers there is room, counted node by node."""

    now: int
    """On what nobody holds."""
    to_come: int
    """On nodes that the cluster may start."""


def room_for_workers(experiment: Experiment) -> Room:
    """Room in the Ray cluster, or on this machine where there is no cluster."""
    import ray

    bundle = worker_bundle(experiment)
    if not ray_knows(experiment):
        return Room(_fitting(bundle, {"CPU": float(available_cpus())}), 0)
    started = connect(experiment, 1)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        free, grown = free_resources(), resources_to_grow_to()
    finally:
        if started:
            ray.shutdown()
    there = sum(_fitting(bundle, node) for node in nodes)
    return Room(sum(_fitting(bundle, n) for n in free), max(0, _fitting(bundle, grown) - there))


def gpus_there(experiment: Experiment) -> int:
    """GPUs of the Ray cluster, or of this machine where there is no cluster."""
    import ray

    if cluster_address(experiment) is None:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    started = connect(experiment, 1)
    try:
        return int(ray.cluster_resources().get("GPU", 0))
    finally:
        if started:
            ray.shutdown()


def ray_knows(experiment: Experiment) -> bool:
    """Whether Ray knows the resources: in a cluster, and for GPUs, which Ray detects itself."""
    return cluster_address(experiment) is not None or bool(experiment.cluster.gpus_per_worker)


def _fitting(bundle: Mapping[str, float], there: Mapping[str, float]) -> int:
    """How many bundles fit into the resources of a node."""
    return int(min((there.get(k, 0.0) / n for k, n in bundle.items()), default=there.get("CPU", 1)))
