"""One place per node where its workers are asked and answer: memory that they share, and channels.

The driver has the hub of its own node; on other nodes a relay has it. A question says where in
shared memory θ lies and where the vector of the answer is to be put: each vector is written once
and read once, and no call of Ray is made per worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.cluster.channel import ChannelAddress, connect_to
from pipeline.cluster.messages import AHEAD, Content, InMemory
from pipeline.cluster.shared_vectors import Address, SharedVectors

if TYPE_CHECKING:
    from pipeline.maml.flat_vector import FlatVector


class Arrived(NamedTuple):
    """An answer."""

    name: Any
    """Of the question, as the caller gave it."""
    content: Content
    vector: FlatVector | None = None
    """Its vector, where that was in memory; a copy."""


@dataclass(eq=False)
class _Worker:
    """A worker of this node."""

    vectors: SharedVectors
    """For its answers: a slot for each question that it may have at once."""
    channel: Connection[Any, Any] | None = None
    under_way: dict[int, tuple[Any, int | None]] = field(default_factory=dict)
    """Questions by number: the caller's name for each, and the slot for the answer."""


class Hub:
    """The workers of a node, by numbers that the caller gives them; for one thread."""

    def __init__(self, size: int, dtype: str):
        """`size`: the numbers in a vector. Raises OSError where there is no memory to share."""
        self._size, self._dtype = size, dtype
        self._questions = SharedVectors.create(4, size, dtype)
        """θ and the vector that a question is about, twice each."""
        self._workers: dict[int, _Worker] = {}
        self._unheard: list[Arrived] = []
        """Questions that could not be put."""

    def open(self, worker: int) -> tuple[Address, Address]:
        """Make memory for a worker; for `ChunkActor.attach`. Raises OSError, as above."""
        self.close(worker)
        vectors = SharedVectors.create(AHEAD, self._size, self._dtype)
        self._workers[worker] = _Worker(vectors)
        return self._questions.address, vectors.address

    def connect(self, worker: int, address: ChannelAddress) -> bool:
        """Connect to a worker that has mapped its memory; False where that is not possible."""
        known = self._workers.get(worker)
        if known is None:
            return False
        known.channel = connect_to(address)
        return known.channel is not None

    def channel(self, worker: int) -> Connection[Any, Any] | None:
        """What can be read once a worker has answered, or its process has ended."""
        known = self._workers.get(worker)
        return None if known is None else known.channel

    def close(self, worker: int) -> None:
        """Forget a worker, and what it was asked."""
        known = self._workers.pop(worker, None)
        if known is not None:
            known.vectors.close()
            if known.channel is not None:
                known.channel.close()

    def write(self, place: InMemory, vector: FlatVector) -> None:
        """Put θ, or the vector of a question, where the workers read it."""
        self._questions.write(*place, vector)

    def ask(self, worker: int, number: int, name: Any, arguments: bytes, apart: bool) -> None:
        """Ask a worker: `name` comes back with the answer; no other question has the `number`;
        `arguments` are those of `ChunkActor.run` but the last, pickled; `apart`: whether the vector
        of the answer may be put into memory."""
        known = self._workers.get(worker)
        if known is None or known.channel is None:
            error: EOFError | OSError = EOFError(f"worker {worker} is not connected")
            self._unheard.append(Arrived(name, error))
            return
        taken = {slot for _, slot in known.under_way.values()}
        free = [slot for slot in range(AHEAD) if slot not in taken]
        slot = free[0] if apart and free else None
        place = None if slot is None else (slot, number)
        try:
            known.channel.send((number, place, arguments))
        except OSError as error:
            self._unheard.append(Arrived(name, error))
            return
        known.under_way[number] = name, slot

    @property
    def busy(self) -> bool:
        """Whether anything is not answered."""
        return bool(self._unheard) or any(w.under_way for w in self._workers.values())

    def arrived(self, timeout: float) -> list[Arrived]:
        """Answers, once there are any; none after `timeout` seconds."""
        if self._unheard:
            return self.unheard()
        channels = {w.channel: n for n, w in self._workers.items() if w.channel and w.under_way}
        found: list[Arrived] = []
        for channel in wait(list(channels), timeout):
            assert isinstance(channel, Connection)
            found += self.heard(channels[channel])
        return found

    def unheard(self) -> list[Arrived]:
        """Questions that could not be put, each with the error."""
        unheard, self._unheard = self._unheard, []
        return unheard

    def heard(self, worker: int) -> list[Arrived]:
        """The next answer of a worker whose channel can be read; where its process has ended, an
        error for every question: then it is connected no more."""
        known = self._workers.get(worker)
        if known is None or known.channel is None:
            return []
        try:
            number, apart, content = known.channel.recv()
        except (EOFError, OSError) as error:
            lost = [Arrived(name, error) for name, _ in known.under_way.values()]
            known.under_way.clear()
            known.channel.close()
            known.channel = None
            return lost
        name, slot = known.under_way.pop(number)
        if not apart:
            return [Arrived(name, content)]
        assert slot is not None
        return [Arrived(name, content, known.vectors.read(slot, number))]
