"""A relay asks the workers of its node, adds by the tree, and tells what was lost; no Ray."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from pipeline.cluster import relay as relays
from pipeline.cluster.channel import listen
from pipeline.cluster.messages import Addend, Answers, InMemory, Question, Reply, opened
from pipeline.cluster.relay import RelayActor
from pipeline.cluster.shared_vectors import SharedVectors
from pipeline.worker.jobs import GradientJob, JobResult
from pipeline.worker.tree import Span, TreeSum
from tests.helpers import silent_listener
from tests.places import ROOT

CHUNKS, SIZE = 4, 5
VECTORS = np.random.default_rng(0).standard_normal((CHUNKS, SIZE)).astype(np.float32)
PLACES = (0, 1), (2, 1)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are there at once come together, also on a busy machine."""
    monkeypatch.setattr(relays, "_AT_LEAST", 0.4)


class Worker:
    """As a `ChunkActor`: the vector of chunk c is θ + VECTORS[c]."""

    def __init__(self, memory: tuple[Any, Any]):
        broadcast, results = (SharedVectors.attach(each) for each in memory)
        assert broadcast is not None
        assert results is not None
        self._broadcast, self._results = broadcast, results
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.address = listen(self._asked)

    def _asked(
        self, theta: InMemory, vector: InMemory | None, job: GradientJob, place: InMemory | None
    ) -> Future[Reply]:
        future: Future[Reply] = Future()

        def answer() -> None:
            self.may_answer.wait(20)
            gradient = self._broadcast.read(*theta) + VECTORS[job.chunks.first]
            reply = Reply(JobResult(job, 1, gradient, {}, 0.0, 0.0, (True,)))
            if place is not None:
                self._results.write(*place, gradient)
                reply = reply.parted()
            future.set_result(reply)

        threading.Thread(target=answer, daemon=True).start()
        return future


def question(worker: int, chunk: int, adds: bool = True) -> Question:
    """Number 10 + chunk."""
    span = Span(chunk, chunk + 1)
    arguments = pickle.dumps((PLACES[0], None, GradientJob(0, span)))
    return Question(worker, 10 + chunk, arguments, Addend(7, CHUNKS, span) if adds else None)


async def two_workers() -> tuple[RelayActor, list[Worker]]:
    relay = RelayActor(SIZE, "float32")
    workers = [Worker(await relay.open(number)) for number in range(2)]
    for number, worker in enumerate(workers):
        assert await relay.connect(number, worker.address)
    return relay, workers


def numbers(answers: Answers) -> list[int]:
    return sorted(number for number, _ in answers.contents)


THETA = np.arange(SIZE, dtype=np.float32)


def expected(*chunks: int) -> np.ndarray[Any, Any]:
    tree = TreeSum(CHUNKS)
    for chunk in chunks:
        tree.add(Span(chunk, chunk + 1), THETA + VECTORS[chunk])
    ((_, value),) = tree.nodes.items()
    return value


def test_one_call_one_vector() -> None:
    """θ goes there with the questions; what comes back is added as everybody adds."""

    async def scenario() -> Answers:
        relay, _ = await two_workers()
        asked = [question(worker, chunk) for worker, chunk in ((0, 3), (0, 0), (1, 2), (1, 1))]
        return await relay.exchange(PLACES, THETA, None, asked, False)

    answers = asyncio.run(scenario())
    assert numbers(answers) == [10, 11, 12, 13]
    ((addend, total),) = answers.sums
    assert addend == Addend(7, CHUNKS, Span(0, CHUNKS))
    assert np.array_equal(total, expected(0, 1, 2, 3))
    for _, content in answers.contents:
        reply = opened(content)
        assert isinstance(reply, Reply)
        assert reply.apart
        assert reply.answer is not None
        assert reply.answer.gradient is None


def test_who_is_read_beside_another_is_heard_again() -> None:
    async def scenario() -> None:
        relay, workers = await two_workers()
        for worker in workers:
            worker.may_answer.clear()
        asked = [question(0, 0), question(1, 1)]
        answering = asyncio.create_task(relay.exchange(PLACES, THETA, None, asked, False))
        await asyncio.sleep(0)
        for worker in workers:
            worker.may_answer.set()
        time.sleep(0.1)  # both have answered before the relay looks
        assert numbers(await asyncio.wait_for(answering, 5)) == [10, 11]
        for number in range(2):
            alone = relay.exchange(PLACES, None, None, [question(number, 2)], False)
            assert numbers(await asyncio.wait_for(alone, 5)) == [12]

    asyncio.run(scenario())


def test_answers_that_are_not_added_come_whole() -> None:
    async def scenario() -> Answers:
        relay, _ = await two_workers()
        return await relay.exchange(PLACES, THETA, None, [question(0, 2, adds=False)], False)

    answers = asyncio.run(scenario())
    assert answers.sums == []
    reply = opened(answers.contents[0][1])
    assert isinstance(reply, Reply)
    assert reply.answer is not None
    assert np.array_equal(reply.answer.gradient, THETA + VECTORS[2])


def test_others_are_waited_for_a_while() -> None:
    """The first answers return without a slow worker's; its answer is that of the next call."""

    async def scenario() -> tuple[Answers, Answers]:
        relay, workers = await two_workers()
        workers[1].may_answer.clear()
        asked = [question(0, 0), question(1, 1), question(0, 2)]
        first = await relay.exchange(PLACES, THETA, None, asked, False)
        rest = asyncio.create_task(relay.exchange(PLACES, None, None, [], False))
        await asyncio.sleep(0.05)
        assert not rest.done()
        workers[1].may_answer.set()
        return first, await rest

    first, rest = asyncio.run(scenario())
    assert numbers(first) == [10, 12]
    assert sorted(addend.span for addend, _ in first.sums) == [Span(0, 1), Span(2, 3)]
    assert numbers(rest) == [11]


def test_a_later_call_takes_over() -> None:
    """No more than one call waits: the one before returns with what there is."""

    async def scenario() -> tuple[Answers, Answers]:
        relay, workers = await two_workers()
        workers[0].may_answer.clear()
        first = asyncio.create_task(relay.exchange(PLACES, THETA, None, [question(0, 0)], False))
        await asyncio.sleep(0)
        second = asyncio.create_task(relay.exchange(PLACES, None, None, [question(1, 1)], False))
        before = await first
        workers[0].may_answer.set()
        return before, await second

    before, after = asyncio.run(scenario())
    assert before == Answers([], [])
    assert numbers(after) == [10, 11]


def test_what_is_lost_is_said() -> None:
    """A worker that ends while it computes; that has ended before; that nobody knows."""

    async def scenario() -> list[Answers]:
        relay, _ = await two_workers()
        with silent_listener() as (process, address):
            await relay.open(2)
            assert await relay.connect(2, address)
            dying = asyncio.create_task(
                relay.exchange(PLACES, THETA, None, [question(2, 0), question(0, 1)], False)
            )
            await asyncio.sleep(0.1)
            process.kill()
            found = [await dying]
        if len(found[0].contents) == 1:  # the other one came earlier
            found.append(await relay.exchange(PLACES, None, None, [], False))
        found.append(
            await relay.exchange(PLACES, None, None, [question(2, 2), question(9, 3)], False)
        )
        return found

    contents = dict(pair for answers in asyncio.run(scenario()) for pair in answers.contents)
    assert isinstance(opened(contents[11]), Reply)
    for number in (10, 12, 13):
        assert isinstance(contents[number], EOFError | OSError), number


def test_what_is_lost_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others still compute; but somebody must do the work again."""
    monkeypatch.setattr(relays, "_AT_LEAST", 60)

    async def scenario() -> Answers:
        relay, workers = await two_workers()
        workers[0].may_answer.clear()
        with silent_listener() as (process, address):
            await relay.open(2)
            assert await relay.connect(2, address)
            asked = [question(0, 0), question(1, 1), question(2, 2)]
            waiting = asyncio.create_task(relay.exchange(PLACES, THETA, None, asked, True))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            process.kill()
            return await asyncio.wait_for(waiting, 10)

    answers = asyncio.run(scenario())
    assert numbers(answers) == [11, 12]
    assert isinstance(answers.contents[-1][1], EOFError | OSError)


def test_nobody_waits_for_a_worker_that_was_closed() -> None:
    async def scenario() -> Answers:
        relay, workers = await two_workers()
        workers[0].may_answer.clear()
        waiting = asyncio.create_task(relay.exchange(PLACES, THETA, None, [question(0, 0)], False))
        await asyncio.sleep(0)
        await relay.close(0)
        return await asyncio.wait_for(waiting, 5)

    assert asyncio.run(scenario()) == Answers([], [])


def test_it_needs_no_torch() -> None:
    """There is one on every node, beside the workers: it must be small."""
    code = "import sys, pipeline.cluster.relay; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
