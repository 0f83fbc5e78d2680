"""Measures what the driver itself does per iteration for many workers, Ray replaced by a stub.

    python benchmarks/bookkeeping.py

The stub answers at once and costs next to nothing, so what is left is the driver's own work: who
gets which block, what is answered, what is left, the sum. Workers are alone on their nodes, each
called itself, and answer one at a time or all together; or they are eight to a node, behind relays
that answer one at a time. Vectors are small, so that adding them does not count.
"""

from __future__ import annotations

import pickle
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


def reply_to(job: Any) -> Any:
    """What a worker answers."""
    from pipeline.cluster.messages import Reply
    from pipeline.worker.jobs import JobResult

    losses, finite = np.zeros(job.chunks.size, np.float32), (True,) * job.chunks.size
    vector = np.zeros(SIZE, np.float32)
    return Reply(JobResult(job, len(losses), vector, {"query_loss": losses}, 0, 0, finite))


def method(answer: Any) -> Any:
    """A method of an actor whose answers are there before they are asked for."""
    return SimpleNamespace(remote=lambda *arguments: STUB.put(answer(*arguments)))


class Worker:
    """The handle of a worker."""

    def __init__(self, number: int):
        from pipeline.cluster.channel import ChannelAddress
        from pipeline.cluster.messages import Ready

        node = f"node {number // STUB.per_node}"
        self.ready = method(lambda: Ready(number, node, []))
        self.attach = method(lambda memory: ChannelAddress("", b""))
        self.run = method(lambda theta, vector, job, place: reply_to(job))


class Relay:
    """The handle of a relay. It answers what it has answered before from memory."""

    def __init__(self) -> None:
        self.open, self.connect = method(lambda worker: None), method(lambda *_: True)
        self.close, self.exchange = method(lambda worker: None), method(self._exchange)
        self._known: dict[Any, Any] = {}

    def _exchange(self, places: Any, theta: Any, vector: Any, questions: Any, patient: Any) -> Any:
        from pipeline.cluster.messages import Answers
        from pipeline.worker.tree import TreeSum

        spans = tuple(question.addend.span for question in questions)
        if spans not in self._known:
            sums, contents = TreeSum(questions[0].addend.num_chunks), []
            for question in questions:
                reply = reply_to(pickle.loads(question.arguments)[2])
                sums.add(question.addend.span, reply.answer.gradient)
                contents.append(pickle.dumps(reply.parted()))
            self._known[spans] = contents, sums.nodes
        contents, nodes = self._known[spans]
        numbers = [question.number for question in questions]
        addend = questions[0].addend
        sums = [(addend._replace(span=span), vector) for span, vector in nodes.items()]
        return Answers(list(zip(numbers, contents, strict=True)), sums)


class Stub(ModuleType):
    """As much of Ray as a group of workers asks for."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayError, ActorDiedError=RayError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.at_once, self.per_node = 1, 1
        self._objects: dict[int, Any] = {}
        self._numbers, self._workers = count(), count()

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
        worker = actor.__name__ == "ChunkActor"
        make = (lambda *_: Worker(next(self._workers))) if worker else (lambda *_: Relay())
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

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


def milliseconds(workers: int, chunks: int, at_once: int, per_node: int) -> float:
    """Median time of an iteration."""
    from pipeline.cluster import roster
    from pipeline.cluster.dispatch import RayWorkers
    from pipeline.config.loading import load
    from pipeline.worker.jobs import GradientJob

    roster.restarts_of = lambda actor: 0
    STUB.at_once, STUB.per_node = at_once, per_node
    tasks = [f"outer.tasks_per_batch={chunks}", "outer.tasks_per_chunk=1"]
    experiment = load("sinusoid", [*tasks, f"cluster.workers={workers}"])
    group = RayWorkers(experiment, False, workers, print, SIZE)
    while group.ready < workers or (
        per_node > 1 and not all(w.at_home for w in group._roster.workers.values())
    ):
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
    scheduling = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
    sys.modules |= {"ray": STUB, "ray.util": STUB, "ray.util.scheduling_strategies": scheduling}
    print("| workers | chunks | alone, one at a time | alone, all together | behind relays |")
    print("|---|---|---|---|---|")
    for workers in WORKERS:
        for chunks in (workers, 4 * workers):
            ways = ((1, 1), (1 << 20, 1), (1, 8))
            times = [milliseconds(workers, chunks, *way) for way in ways]
            print(f"| {workers} | {chunks} | " + " | ".join(f"{t:.1f} ms" for t in times) + " |")


if __name__ == "__main__":
    main()
