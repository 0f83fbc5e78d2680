"""Measures what the driver itself does per iteration for many workers, Ray replaced by a stub.

    python benchmarks/bookkeeping.py

The stub answers at once and costs next to nothing, so what is left is the driver's own work: who
gets which block, what is answered, what is left, the sum. Answers come one at a time, which costs
most, or all together. Vectors are small, so that adding them does not count.
"""

from __future__ import annotations

import statistics
import sys
import time
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

WORKERS, ITERATIONS, SIZE = (8, 64, 512), 30, 1000


class RayError(Exception):
    """As Ray's."""


class Handle:
    """The handle of an actor whose answers are there before they are asked for."""

    def __init__(self, number: int):
        from pipeline.cluster.messages import Ready, Reply
        from pipeline.worker.jobs import JobResult

        def answer(theta: Any, vector: Any, job: Any, place: Any) -> Any:
            losses = np.zeros(job.chunks.size, np.float32)
            finite = (True,) * job.chunks.size
            result = JobResult(
                job, len(losses), np.zeros(SIZE, np.float32), {"query_loss": losses}, 0, 0, finite
            )
            return STUB.put(Reply(result))

        self.run = SimpleNamespace(remote=answer)
        self.ready = SimpleNamespace(remote=lambda: STUB.put(Ready(number, "elsewhere", [])))


class Stub(ModuleType):
    """As much of Ray as a group of workers asks for."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayError, ActorDiedError=RayError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.at_once = 1
        self._objects: dict[int, Any] = {}
        self._numbers = count()

    def put(self, value: Any) -> int:
        number = next(self._numbers)
        self._objects[number] = value
        return number

    def get(self, references: list[int]) -> list[Any]:
        return [self._objects.pop(reference) for reference in references]

    def wait(
        self, references: list[int], num_returns: int, timeout: float
    ) -> tuple[list[int], list[int]]:
        number = (
            min(num_returns, self.at_once) if timeout else num_returns if self.at_once > 1 else 0
        )
        return references[:number], references[number:]

    def remote(self, actor: type) -> Any:
        made = SimpleNamespace(remote=lambda *_: Handle(next(self._numbers)))
        return SimpleNamespace(options=lambda **_: made)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1e6}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1e6}}]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")

    def kill(self, actor: Any) -> None:
        pass


STUB = Stub()


def milliseconds(workers: int, chunks: int, at_once: int) -> float:
    """Median time of an iteration."""
    from pipeline.cluster import roster
    from pipeline.cluster.dispatch import RayWorkers
    from pipeline.config.loading import load
    from pipeline.worker.jobs import GradientJob

    roster.restarts_of = lambda actor: 0
    STUB.at_once = at_once
    tasks = [f"outer.tasks_per_batch={chunks}", "outer.tasks_per_chunk=1"]
    experiment = load("sinusoid", [*tasks, f"cluster.workers={workers}"])
    group = RayWorkers(experiment, False, workers, print, SIZE)
    while group.ready < workers:
        group._wait()
    theta, times = np.zeros(SIZE, np.float32), []
    for iteration in range(ITERATIONS):
        theta = theta + 1
        began = time.perf_counter()
        group.total(theta, lambda span, i=iteration: GradientJob(i, span), chunks)
        times.append(time.perf_counter() - began)
    group.close()
    return 1e3 * statistics.median(times)


def main() -> None:
    """Print the table."""
    sys.modules["ray"] = STUB
    print("| workers | chunks | answers one at a time | all together |\n|---|---|---|---|")
    for workers in WORKERS:
        for chunks in (workers, 4 * workers):
            one, all_ = (milliseconds(workers, chunks, at_once) for at_once in (1, 1 << 20))
            print(f"| {workers} | {chunks} | {one:.1f} ms | {all_:.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
