"""Measures what an iteration costs beyond the meta-gradient: sampling, transfer, update.

    python benchmarks/iteration.py                    all of it (minutes, mostly compiling)
    python benchmarks/iteration.py --cases sinusoid   the sinusoid alone

Four cases, as in benchmarks/README.md. Times are medians over iterations of a real training run,
through the functions that `maml train` calls, MLflow included; ratios are within one process.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.config.experiment import Experiment
from pipeline.config.loading import load
from pipeline.maml.flat_vector import FlatVector, Layout
from pipeline.training.loop import MetaLearning, meta_update, train
from pipeline.training.opening import open_session
from pipeline.training.session import Watcher
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.cpus import available_cpus
from pipeline.worker.learner import initial_parameters

TURNS, ITERATIONS_PER_TURN = 8, 12


class Stopwatch(Watcher):
    """Keeps the time and the metrics of every iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self._last = 0.0

    def started(self, session: Any) -> None:
        self._last = time.perf_counter()

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        self.times.append(now - self._last)
        self.metrics.append(metrics)
        self._last = time.perf_counter()

    def drop_last(self) -> None:
        """Forget an iteration that should not count."""
        self.times.pop()
        self.metrics.pop()

    def median_ms(self, skip: int) -> float:
        """Median time of an iteration, the first ones left out."""
        return 1e3 * statistics.median(self.times[skip:])


def run(name: str, *overrides: str) -> Stopwatch:
    """Train in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch()
        experiment = load(name, [f"run_dir={folder}/runs/run", *SHORT, *overrides])
        train(experiment, Path(folder) / "runs" / "run", watcher=watch)
        return watch


SHORT = [
    "compute.compile=always",
    "evaluation.tasks=2",
    "evaluation.validation_tasks=2",
    "evaluation.variants={}",
    "evaluation.every=1000000",
]


def bare_ms(experiment: Experiment, repeats: int) -> float:
    """Milliseconds of the compiled meta-gradient of one meta-batch, sampling left out."""
    torch.set_num_threads(experiment.compute.threads or available_cpus())
    computer = ChunkComputer(experiment, compile=True)
    theta = initial_parameters(experiment)
    flat = Layout.of(theta).join(theta)
    function, batch, knobs = computer.program()
    for _ in range(20):
        function(flat, batch, knobs)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(flat, batch, knobs)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def sinusoid() -> list[str]:
    """Time a whole iteration in process against the bare compiled meta-gradient."""
    watch = run("sinusoid-paper", "outer.iterations=20000")
    bare = bare_ms(load("sinusoid-paper", SHORT), 4000)
    whole = watch.median_ms(500)
    mean = 1e3 * statistics.mean(watch.times[500:])
    return [
        "sinusoid, 25 tasks, in process: whole iteration / bare meta-gradient | "
        f"{whole:.2f} ms (mean {mean:.2f}) / {bare:.2f} ms | {whole / bare:.2f}x | at most 2x"
    ]


class Echo:
    """A Ray actor that returns an array as large as the one that it gets."""

    def run(self, theta: FlatVector) -> FlatVector:
        return theta + 1


class PlainRay:
    """What a round trip costs that uses Ray in the plain way: `put`, a call per actor, `get`."""

    def __init__(self, theta: FlatVector, actors: int = 2):
        import ray

        self._ray, self._theta = ray, theta
        self._actors = [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(actors)]
        self.seconds: list[float] = []
        for _ in range(20):
            self.measure()
        self.seconds.clear()

    def measure(self) -> None:
        """One round trip."""
        began = time.perf_counter()
        reference = self._ray.put(self._theta)
        self._ray.get([actor.run.remote(reference) for actor in self._actors])
        self.seconds.append(time.perf_counter() - began)

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)


def two_actors() -> list[str]:
    """Time whole iterations of the README's first command, in turns with plain round trips."""
    experiment = load("sinusoid", [*SHORT, "cluster.workers=2", "outer.iterations=1000000"])
    watch, seconds = Stopwatch(), list[float]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = stack.enter_context(
            open_session(experiment, folder / "run", MetaLearning(), False, watch)
        )
        plain = PlainRay(session.theta.copy())
        for _ in range(TURNS):
            for _ in range(10):
                meta_update(session)  # both actors are there, and prepare tasks ahead
            began = time.perf_counter()
            for _ in range(100):
                meta_update(session)
            seconds.append((time.perf_counter() - began) / 100)
            for _ in range(50):
                plain.measure()
    whole = 1e3 * statistics.median(seconds)
    return [
        "sinusoid, 25 tasks, 2 actors: whole iteration / a plain Ray round trip of its θ | "
        f"{whole:.1f} ms / {plain.median_ms:.1f} ms | {whole / plain.median_ms:.2f}x | "
        "at most 0.7x"
    ]


def omniglot(data: str) -> list[str]:
    """Time conv4 on Omniglot: two actors of one thread against two threads here, in turns."""
    common = [*SHORT, f"data.root={data}", "outer.tasks_per_chunk=8"]
    here = load("omniglot-5w1s", [*common, "cluster.workers=0", "compute.threads=2"])
    actors = load("omniglot-5w1s", [*common, "cluster.workers=2", "compute.threads=1"])
    watches = Stopwatch(), Stopwatch()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sessions = [
            stack.enter_context(
                open_session(experiment, folder / kind, MetaLearning(), False, watch)
            )
            for experiment, kind, watch in zip((here, actors), "ab", watches, strict=True)
        ]
        plain = PlainRay(sessions[1].theta.copy())
        for _ in range(TURNS):
            for _ in range(20):
                plain.measure()
            for session, watch in zip(sessions, watches, strict=True):
                meta_update(session)  # its time includes the turn of the other session
                watch.drop_last()
                for _ in range(ITERATIONS_PER_TURN):
                    meta_update(session)
    in_process, with_actors = (watch.median_ms(0) for watch in watches)
    # Waiting is the time beyond the busiest worker's sampling and computing.
    beyond = [
        1e3 * sum(m[f"seconds/{part}"] for part in ("waiting", "aggregating", "updating"))
        for m in watches[1].metrics
    ]
    return [
        "conv4, 112k parameters, 2 actors: driver beyond the slowest worker's work / a plain Ray "
        f"round trip of the same arrays | {statistics.median(beyond):.1f} ms / "
        f"{plain.median_ms:.1f} ms | {statistics.median(beyond) / plain.median_ms:.2f}x | "
        "at most 0.5x",
        "Omniglot 5w1s, 32 tasks: 2 actors of 1 thread / in process, 2 threads | "
        f"{with_actors:.0f} ms / {in_process:.0f} ms | "
        f"{with_actors / in_process:.2f}x | at most 1.1x",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["sinusoid", "actors", "omniglot"])
    parser.add_argument("--data", default=str(Path("data").absolute()), help="of the image stores")
    arguments = parser.parse_args()
    print("| measure | measured | ratio | target |\n|---|---|---|---|")
    if "sinusoid" in arguments.cases:
        print(*(f"| {row} |" for row in sinusoid()), sep="\n", flush=True)
    if "actors" in arguments.cases:
        print(*(f"| {row} |" for row in two_actors()), sep="\n", flush=True)
    if "omniglot" in arguments.cases:
        print(*(f"| {row} |" for row in omniglot(arguments.data)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
