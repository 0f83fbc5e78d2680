"""One process per node of a cluster: what goes to the node's workers, and comes from them, as one.

    driver ── θ and questions, one call ──▶ relay ══ hub ══▶ workers of the node
    driver ◀── answers, one vector ──────── relay ◀══ hub ══ their answers and vectors

Without it θ would be sent to each worker, and each worker's sum to the driver, a call each. The
relay adds by the same tree as everybody (`worker.tree`), so that bits do not depend on who is on
which node. It takes no CPU of the cluster, keeps nothing that could not be computed again, and
imports no torch. Where a node has none, or has lost it, the workers are called themselves.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pipeline.cluster.hub import Arrived, Hub
from pipeline.cluster.messages import Addend, Answers, Content, InMemory, Question
from pipeline.worker.tree import TreeSum

if TYPE_CHECKING:
    from pipeline.cluster.channel import ChannelAddress
    from pipeline.cluster.shared_vectors import Address
    from pipeline.maml.flat_vector import FlatVector

_TOGETHER = 0.25  # of the time that the first answer took: so long the others are waited for,
_PATIENT = 3.0  # or so long, where there is no work for who is early; a vector less goes out
_AT_LEAST = 0.004  # seconds; another call costs about as much


class RelayActor:
    """The Ray actor. All of it runs in one thread, that of asyncio."""

    def __init__(self, size: int, dtype: str):
        """`size`: the numbers in a vector."""
        self._hub = Hub(size, dtype)
        self._waiting: asyncio.Future[Answers] | None = None
        """Of the call of `exchange` that will bring the next answers."""
        self._timer: asyncio.TimerHandle | None = None
        """Runs since the first answer that is to be brought."""
        self._contents: list[tuple[int, Content]] = []
        self._sums: dict[tuple[int, int], TreeSum] = {}
        """By round and number of chunks."""
        self._together = _TOGETHER

    async def open(self, worker: int) -> tuple[Address, Address]:
        """As `Hub.open`."""
        await self.close(worker)
        return self._hub.open(worker)

    async def connect(self, worker: int, address: ChannelAddress) -> bool:
        """As `Hub.connect`."""
        connected = self._hub.connect(worker, address)
        channel = self._hub.channel(worker)
        if channel is not None:
            descriptor = channel.fileno()
            asyncio.get_running_loop().add_reader(descriptor, self._heard, worker, descriptor)
        return connected

    async def close(self, worker: int) -> None:
        """As `Hub.close`."""
        self._stop_listening(worker)
        self._hub.close(worker)
        self._take_in([])  # others may have been waiting for it

    async def exchange(
        self,
        places: tuple[InMemory, InMemory],
        theta: FlatVector | None,
        vector: FlatVector | None,
        questions: list[Question],
        patient: bool,
    ) -> Answers:
        """Ask, and return what has been answered, to these questions and to earlier ones.

        `theta` and `vector` are given where they are new on this node, and put in their places.
        Returns when all is answered; when a worker's process has ended; when others take a quarter
        longer than the first one, or, to be `patient`, four times as long; or, with whatever there
        is, when it is called again.
        """
        self._together = _PATIENT if patient else _TOGETHER
        for place, value in zip(places, (theta, vector), strict=True):
            if value is not None:
                self._hub.write(place, value)
        now = time.monotonic()
        for each in questions:
            adds = each.addend is not None
            self._hub.ask(each.worker, each.number, (each, now), each.arguments, adds)
        self._return()
        self._waiting = asyncio.get_running_loop().create_future()
        self._take_in(self._hub.unheard())
        return await self._waiting

    def _heard(self, worker: int, channel: int) -> None:
        """A worker's channel, by its descriptor, can be read."""
        found = self._hub.heard(worker)
        if self._hub.channel(worker) is None:
            asyncio.get_running_loop().remove_reader(channel)
        self._take_in(found)

    def _stop_listening(self, worker: int) -> None:
        channel = self._hub.channel(worker)
        if channel is not None:
            asyncio.get_running_loop().remove_reader(channel)

    def _take_in(self, found: list[Arrived]) -> None:
        """Take in answers, and see whether to return what there is."""
        for arrived in found:
            self._keep(arrived)
        lost = any(not isinstance(arrived.content, bytes) for arrived in found)
        if lost or not self._hub.busy:
            self._return()
        elif self._contents and self._timer is None:
            _, asked = found[0].name if found else (None, time.monotonic())
            delay = max(_AT_LEAST, self._together * (time.monotonic() - asked))
            self._timer = asyncio.get_running_loop().call_later(delay, self._return)

    def _keep(self, arrived: Arrived) -> None:
        question, _ = arrived.name
        self._contents.append((question.number, arrived.content))
        if arrived.vector is not None:
            round, num_chunks, span = question.addend
            sums = self._sums.setdefault((round, num_chunks), TreeSum(num_chunks))
            sums.add(span, arrived.vector)

    def _return(self) -> None:
        """Return what there is, if anybody waits for it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting is None or self._waiting.done():
            return
        sums = [
            (Addend(round, num_chunks, span), vector)
            for (round, num_chunks), tree in self._sums.items()
            for span, vector in tree.nodes.items()
        ]
        self._waiting.set_result(Answers(self._contents, sums))
        self._contents, self._sums = [], {}
