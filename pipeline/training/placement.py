"""Decides what `auto` means before a run starts: whether to compile, and how many workers to use.

Compilation changes the last bits of the results, so the configuration alone decides it. The number
of workers does not change them, so a measurement on this machine decides it. (The threads of each
worker do change them: a resumed run keeps its number of threads.)
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from pipeline.cluster.capacity import gpus_there, ray_knows, room_for_workers
from pipeline.cluster.connection import cluster_address
from pipeline.cluster.group import on_driver, threads_per_chunk
from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector, flat_vector
from pipeline.training.outer_step import outer_step_of
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import ChunkJob, Cut, GradientJob, tasks_per_chunk
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span

_RAY_START_SECONDS = 8.0
_ROUND_TRIP_SECONDS = 0.004
_MEASURED = 4  # iterations that are timed at most
_LONG_ENOUGH = 10.0  # seconds after which no further iteration is timed


class Placement(NamedTuple):
    """Who computes chunks, and why, in words."""

    workers: int
    """Actors; 0: the chunks are computed in this process."""
    reason: str
    gpus_per_worker: float = 0.0


def decide_compile(experiment: Experiment) -> bool:
    """Resolve `compute.compile`. The answer follows from the configuration alone."""
    wanted = experiment.compute.compile
    if wanted != "auto":
        return wanted == "always"
    computer = ChunkComputer(on_driver(experiment), compile=False)
    return computer.worth_compiling(experiment.outer.iterations * computer.num_chunks)


def decide_workers(experiment: Experiment, compile: bool) -> Placement:
    """Resolve `cluster.workers` and `cluster.gpus_per_worker`; `compile`: whether chunks will be
    compiled.

    GPUs that are there are used: one of this machine in this process, several by an actor each.
    Where there is none, `auto` times a chunk here, with the threads of each placement.
    """
    numbers = flat_vector(initial_parameters(experiment)).size
    per_chunk = tasks_per_chunk(experiment, numbers, compile)
    experiment = experiment.changed(outer={"tasks_per_chunk": per_chunk})
    if experiment.cluster.workers != "auto":
        workers = experiment.cluster.workers
        if cluster_address(experiment) is None:
            # Others would never get a chunk. What a cluster starts its user decides.
            workers = min(workers, Cut(experiment.outer.tasks_per_batch, per_chunk).num_chunks)
        share = gpu_share(experiment.changed(cluster={"workers": workers}))
        return Placement(workers, "as configured", share)
    share = gpu_share(experiment)
    ours = cluster_address(experiment) is None and experiment.cluster.gpus_per_worker is None
    experiment = experiment.changed(cluster={"gpus_per_worker": share})
    computer = ChunkComputer(on_driver(experiment), compile=False)
    chunks = computer.num_chunks
    if share and ours and min(chunks, gpus_there(experiment)) == 1:
        return Placement(0, "on the GPU of this machine")
    room = room_for_workers(experiment)
    if ray_knows(experiment):
        # Workers that wait are what makes a cluster grow.
        workers = max(1, min(chunks, room.now + room.to_come))
        grows = f" and may grow by {room.to_come}" if room.to_come else ""
        has = f"there is room for {room.now}{grows}"
        return Placement(workers, f"{has}, a meta-batch has {chunks} chunks", share)
    # An actor without a share of a GPU computes on the CPU.
    on_cpu = ChunkComputer(experiment.without_gpu(), compile=False)
    workers = min(chunks, room.now)
    if workers < 2:
        return Placement(0, f"{chunks} chunk(s) per meta-batch and room for {room.now} actor(s)")
    alone, actor = (
        _iteration_seconds(each, experiment, threads_per_chunk(experiment, size))
        for each, size in ((computer, 0), (on_cpu, workers))
    )
    here = chunks * alone.per_chunk
    actors = -(-chunks // workers) * actor.per_chunk + actor.rounds * _ROUND_TRIP_SECONDS
    saved = (here - actors) * experiment.outer.iterations
    measured = (
        f"an uncompiled iteration takes about {_as_text(here)} in process, "
        f"{_as_text(actors)} with {workers} actors"
    )
    if saved > _RAY_START_SECONDS:
        return Placement(workers, measured)
    return Placement(0, f"{measured}: not worth starting Ray")


def gpu_share(experiment: Experiment) -> float:
    """GPUs for each actor: `cluster.gpus_per_worker` where it is set; else, of those that are
    there, one for each, or such a share that all actors have one. 0 where there are none, or the
    CPU is asked for, or there are no actors."""
    cluster = experiment.cluster
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    if cluster.workers == 0 or experiment.compute.device == "cpu":
        return 0.0
    gpus = gpus_there(experiment)
    if gpus == 0 or cluster.workers == "auto":
        return float(gpus > 0)
    # Ray counts in ten thousandths, and a share is of one GPU.
    return math.floor(1e4 / math.ceil(cluster.workers / gpus)) / 1e4


def _as_text(seconds: float) -> str:
    """1.2 s or 3.4 ms."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


class _Measured(NamedTuple):
    """The cost of one iteration's jobs for one chunk."""

    per_chunk: float
    """Seconds of computation."""
    rounds: int
    """How often the driver sends a job and waits for the answer."""


def _iteration_seconds(computer: ChunkComputer, experiment: Experiment, threads: int) -> _Measured:
    """Time the jobs of an iteration for one chunk; the fastest of a few iterations."""
    theta, step = flat_vector(initial_parameters(experiment)), outer_step_of(experiment)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        began = time.perf_counter()
        for iteration in range(_MEASURED):  # the first one warms up
            # Each of other tasks: what is asked again is answered from what was kept.
            asked: list[tuple[ChunkJob, int]] = [(GradientJob(iteration, Span(0, 1)), 1)]
            asked += step.usual_jobs(iteration)
            seconds = sum(count * _seconds(computer, theta, job) for job, count in asked)
            found.append(_Measured(seconds, sum(count for _, count in asked)))
            if time.perf_counter() - began > _LONG_ENOUGH:
                break
        return min(found)
    finally:
        torch.set_num_threads(before)


def _seconds(computer: ChunkComputer, theta: FlatVector, job: ChunkJob) -> float:
    started = time.perf_counter()
    computer.run(theta, job, theta)  # any vector takes as long
    return time.perf_counter() - started
