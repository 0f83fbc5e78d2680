"""Measures how training scales with the number of actors: here, and on simulated GPU nodes.

    python benchmarks/scaling.py                        all of it (a quarter of an hour)
    python benchmarks/scaling.py --cases machine        conv4 on 1 and 2 actors of this machine
    python benchmarks/scaling.py --cases simulated      up to 64 actors that wait
    python benchmarks/scaling.py --profile 64 0.02 small   where the driver's time goes

machine: whole iterations of conv4 on drawn characters, the same meta-batch for 1 and 2 actors
(strong scaling) and 16 tasks per actor (weak scaling).

simulated: Ray nodes of 8 actors each on this machine. An actor samples its tasks, receives θ, and
returns a gradient as always; in place of the computation it waits, like one whose GPU is busy.
One chunk per actor and iteration. The driver's side - broadcast, collection, aggregation, update,
record - is the real one. Ideal is an iteration that takes as long as the wait. A process with torch
takes 230 MB, so the 8 actors of a node share one (`--actors-per-process 1` gives each its own). All
nodes share the cores of this machine: where those are exhausted, the figures say less about the
driver than about the machine, and both are in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import free_memory, loopback_bytes, machine_time, nodes_time
from scaling_model import fitted, page
from scaling_report import HEAD, Row, markdown_row, plot
from torch import Tensor

from pipeline.cluster.actor import ChunkActor
from pipeline.cluster.connection import INLINE_SETTING
from pipeline.cluster.dispatch import RayWorkers
from pipeline.cluster.messages import AHEAD
from pipeline.cluster.roster import Roster
from pipeline.config.experiment import Experiment
from pipeline.config.loading import load
from pipeline.config.phases import Phase
from pipeline.maml.flat_vector import flat_vector
from pipeline.maml.meta_gradient import ChunkFunction, Knobs
from pipeline.runs.checkpoint import CheckpointStore
from pipeline.training.loop import MetaLearning, meta_update
from pipeline.training.session import Session, Watcher
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.learner import initial_parameters
from tasks.base import TaskBatch

ACTORS = (1, 2, 4, 8, 16, 32, 64)
WAITS = (0.02, 0.05, 0.2)  # seconds per chunk
ACTORS_PER_NODE = 8
TASKS_PER_CHUNK = 4
FILTERS = {"small": 64, "large": 426}  # conv4 with 112 thousand and 5 million parameters
SECONDS = 6.0  # of measurement per row, and at least so many iterations
ITERATIONS = 5
TARGET = ("small", 0.2, 64, 0.75)


class WaitingComputer(ChunkComputer):
    """Does everything that a worker does, but waits instead of computing."""

    def __init__(self, experiment: Experiment, compile: bool):
        super().__init__(experiment, compile)
        self.wait = 0.0
        self._gradient: Tensor | None = None

    def _function(self, phase: Phase) -> ChunkFunction:
        return self._waited

    def _waited(
        self, theta: Tensor, batch: TaskBatch, knobs: Knobs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(self.wait)
        losses = torch.ones(batch.query.x.shape[0])
        if self._gradient is None:
            # Once: a worker with a GPU has memory for its answers, too.
            self._gradient = torch.full_like(theta, 1e-6)
        return self._gradient, {"query_loss": losses, "support_loss": losses}


class WaitingActor(ChunkActor):
    """An actor whose computation is simulated."""

    def _build(self) -> list[str]:
        if self._computer is None:
            self._computer = WaitingComputer(self._experiment, self._compile)
        return []

    def set_wait(self, seconds: float) -> None:
        """Set the seconds that a chunk takes from now on."""
        assert isinstance(self._computer, WaitingComputer)
        self._computer.wait = seconds


class Process:
    """A Ray actor that holds several of ours, each with its own computing thread."""

    def __init__(self, number: int, *arguments: Any):
        self._actors = [WaitingActor(*arguments) for _ in range(number)]

    def call(self, slot: int, method: str, *arguments: Any) -> Any:
        return getattr(self._actors[slot], method)(*arguments)

    def set_wait(self, seconds: float) -> None:
        for actor in self._actors:
            actor.set_wait(seconds)


class Slot:
    """One of the actors of a process, called as the handle of an actor of its own would be."""

    def __init__(self, process: Any, slot: int):
        self._process, self._slot, self._actor_id = process, slot, process._actor_id

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._process.call.remote, self._slot, method))


class WaitingWorkers(RayWorkers):
    """The real group of workers, with simulated actors behind its handles."""

    def __init__(self, experiment: Experiment, size: int, per_process: int):
        import ray

        remote = ray.remote(Process).options(
            num_cpus=per_process, max_concurrency=per_process * (AHEAD + 1)
        )
        self.processes = [
            remote.remote(per_process, f"process {number}", experiment, False, [])
            for number in range(-(-size // per_process))
        ]
        slots = iter([Slot(p, slot) for p in self.processes for slot in range(per_process)])
        Roster._new_actor = lambda self, number: next(slots)  # the one thing that is simulated
        theta = flat_vector(initial_parameters(experiment))
        super().__init__(experiment, False, size, print, theta.size)
        while len(self.pids()) < size or not all(w.at_home for w in self._roster.workers.values()):
            self._wait()

    def set_wait(self, seconds: float) -> None:
        """Change the wait of all actors."""
        import ray

        ray.get([process.set_wait.remote(seconds) for process in self.processes])

    def close(self) -> None:
        """The processes end with the nodes."""


class Metrics(Watcher):
    """Keeps the metrics of every iteration."""

    def __init__(self) -> None:
        self.all: list[dict[str, float]] = []

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        self.all.append(metrics)

    def median(self, name: str) -> float:
        return statistics.median(metrics[name] for metrics in self.all)


def experiment_of(size: str, actors: int, data: str) -> Experiment:
    """An endless experiment with one chunk per actor and without validation."""
    return load(
        "glyphs",
        [
            f"data.root={data}",
            f"model.filters={FILTERS[size]}",
            f"outer.tasks_per_batch={actors * TASKS_PER_CHUNK}",
            f"outer.tasks_per_chunk={TASKS_PER_CHUNK}",
            "outer.iterations=1000000",
            "compute.compile=never",
            "compute.device=cpu",
            "compute.threads=1",
            "cluster.cpus_per_worker=1",
            "tracking.enabled=false",
        ],
    )


def open_session(experiment: Experiment, folder: Path, workers: RayWorkers) -> Session:
    """A run as `maml train` opens it; its workers are given, and outlive it."""
    folder.mkdir(parents=True)
    store = CheckpointStore.of_run(experiment, folder)
    theta = initial_parameters(experiment)
    session = Session(
        experiment, folder, MetaLearning(), theta, None, store, Metrics(), compile=False
    )
    session.workers = workers
    return session


def iterate(session: Session, seconds: float, at_least: int) -> list[float]:
    """Run iterations, two of them to warm up; return the seconds of each of the others."""
    for _ in range(2):
        meta_update(session)
    session.watcher.all.clear()
    times: list[float] = []
    while sum(times) < seconds or len(times) < at_least:
        began = time.perf_counter()
        meta_update(session)
        times.append(time.perf_counter() - began)
    return times


def measured(size: str, wait: float, session: Session) -> Row:
    """Measure the iterations of a session."""
    actors = session.cut.num_chunks
    meta_update(session)
    clock, processor, ray_processor = time.perf_counter(), time.process_time(), nodes_time()
    busy, total = machine_time()
    carried = loopback_bytes()
    times = iterate(session, SECONDS, ITERATIONS)
    wall, iterations = time.perf_counter() - clock, len(times) + 2
    driver = time.process_time() - processor
    busy_after, total_after = machine_time()
    typical = statistics.median(times)
    watcher: Any = session.watcher
    return Row(
        size,
        session.optimizer.layout.size,
        wait,
        actors,
        actors * TASKS_PER_CHUNK,
        typical,
        wait / typical,
        driver / wall,
        driver / iterations,
        (nodes_time() - ray_processor) / iterations,
        (busy_after - busy) / (total_after - total),
        (loopback_bytes() - carried) / iterations / 1e6,
        watcher.median("seconds/waiting"),
        watcher.median("seconds/aggregating") + watcher.median("seconds/updating"),
    )


def simulated(arguments: argparse.Namespace, data: str, folder: Path) -> list[Row]:
    """Measure all rows; an iteration uses as many actors of the group as it has chunks."""
    rows = []
    for size in arguments.sizes:
        with simulated_nodes(
            size, arguments.actors[-1], data, arguments.actors_per_process
        ) as workers:
            for wait in arguments.waits:
                workers.set_wait(wait)
                for actors in arguments.actors:
                    run_dir = folder / f"{size}-{wait}-{actors}"
                    session = open_session(experiment_of(size, actors, data), run_dir, workers)
                    rows.append(measured(size, wait, session))
                    print(markdown_row(rows[-1]), flush=True)
    return rows


@contextlib.contextmanager
def simulated_nodes(
    size: str, actors: int, data: str, per_process: int
) -> Iterator[WaitingWorkers]:
    """Ray nodes with waiting actors, all on this machine; the driver's node has none."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ[INLINE_SETTING] = str(2**21)  # as in cluster.yaml
    large = size == "large"
    store = {"include_dashboard": False, "object_store_memory": (4000 if large else 300) << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
    try:
        store["object_store_memory"] = (800 if large else 100) << 20
        per_node = min(ACTORS_PER_NODE, actors)
        nodes = -(-actors // per_node)
        for _ in range(nodes):
            cluster.add_node(num_cpus=per_node, **store)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        began = time.perf_counter()
        experiment = experiment_of(size, actors, data)
        workers = WaitingWorkers(experiment, actors, min(per_process, actors))
        print(f"\n{actors} actors in {len(workers.processes)} processes on {nodes} nodes, ", end="")
        print(f"ready after {time.perf_counter() - began:.0f} s; ", end="")
        print(f"{free_memory() / 2**30:.1f} GiB of memory left\n", flush=True)
        yield workers
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def ready_actors(experiment: Experiment, number: int) -> Iterator[RayWorkers]:
    """Actors of this machine, once all of them are ready."""
    size = flat_vector(initial_parameters(experiment)).size
    workers = RayWorkers(experiment, False, number, print, size)
    try:
        while len(workers.pids()) < number:
            workers._wait()
        yield workers
    finally:
        workers.close()


def machine(data: str, folder: Path) -> list[str]:
    """Measure strong and weak scaling of conv4 on the cores of this machine."""
    times: dict[tuple[str, int], float] = {}
    for name, tasks in (("strong", (32, 32)), ("weak", (16, 32))):
        for actors in (1, 2):
            overrides = {"tasks_per_batch": tasks[actors - 1], "tasks_per_chunk": 8}
            base = experiment_of("small", 1, data)
            experiment = base.changed(outer=overrides)
            with ready_actors(experiment, actors) as workers:
                session = open_session(experiment, folder / f"{name}{actors}", workers)
                times[name, actors] = statistics.median(iterate(session, 20, 10))
    lines = []
    for name, tasks, factor in (("strong", (32, 32), 2), ("weak", (16, 32), 1)):
        one, two = times[name, 1], times[name, 2]
        lines.append(
            f"| {name}: {tasks[0]} and {tasks[1]} tasks | {1e3 * one:.0f} ms, "
            f"{tasks[0] / one:.1f} tasks/s | {1e3 * two:.0f} ms, {tasks[1] / two:.1f} tasks/s | "
            f"{100 * one / two / factor:.0f} % |"
        )
    return lines


def profile(actors: int, wait: float, size: str, data: str, folder: Path, per_process: int) -> None:
    """Print the driver's most expensive functions."""
    with simulated_nodes(size, actors, data, per_process) as workers:
        workers.set_wait(wait)
        session = open_session(experiment_of(size, actors, data), folder / "profile", workers)
        iterate(session, 2, 5)
        profiler = cProfile.Profile()
        profiler.enable()
        times = iterate(session, 15, 10)
        profiler.disable()
    print(f"{len(times) + 2} iterations of {1e3 * statistics.median(times):.1f} ms")
    for order in ("tottime", "cumtime"):
        pstats.Stats(profiler).sort_stats(order).print_stats(28)


def main() -> None:
    """Print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["machine", "simulated"])
    parser.add_argument("--sizes", nargs="+", default=list(FILTERS), choices=list(FILTERS))
    parser.add_argument("--waits", nargs="+", type=float, default=list(WAITS))
    parser.add_argument("--actors", nargs="+", type=int, default=list(ACTORS))
    parser.add_argument("--data", default=str(Path("data").absolute()), help="of the image stores")
    parser.add_argument("--profile", nargs=3, metavar=("ACTORS", "SECONDS", "SIZE"))
    parser.add_argument("--actors-per-process", type=int, default=ACTORS_PER_NODE)
    arguments = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    data = str(Path(arguments.data).absolute())
    experiment_of("small", 1, data).build_task().check("train")  # draws the characters once
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.profile:
            actors, wait, size = arguments.profile
            profile(int(actors), float(wait), size, data, folder, arguments.actors_per_process)
            return
        if "machine" in arguments.cases:
            print("| conv4, not compiled | 1 actor | 2 actors | efficiency |\n|---|---|---|---|")
            print(*machine(data, folder), sep="\n", flush=True)
        if "simulated" in arguments.cases:
            print(f"\n{HEAD}", flush=True)
            rows = simulated(arguments, data, folder)
            if {(row.wait, row.actors) for row in rows} == {(w, n) for w in WAITS for n in ACTORS}:
                plot(rows, Path(__file__).with_suffix(".png"))
                print(f"\n{page(*fitted(rows, ACTORS_PER_NODE))}")
            size, wait, actors, target = TARGET
            for row in rows:
                if (row.size, row.wait, row.actors) == (size, wait, actors):
                    verdict = "reached" if row.efficiency >= target else "missed"
                    print(
                        f"\n{actors} actors, {1e3 * wait:.0f} ms, {row.parameters:,} parameters: "
                        f"{100 * row.efficiency:.1f} % (target {100 * target:.0f} %): {verdict}"
                    )
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
