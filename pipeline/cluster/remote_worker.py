"""A worker as the driver knows it: an actor, what it was asked, and the memory they share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.cluster.actor import Ready, Reply
from pipeline.cluster.rounds import Piece, Round
from pipeline.cluster.shared_vectors import SharedVectors, StaleVector
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.jobs import JobResult

AHEAD = 2
"""Calls that a worker has at once: it goes on with the second while the answer to the first
travels."""
_DIRECT_BYTES = 100_000  # a vector up to this size travels within the call

_numbers = itertools.count(1)


@dataclass(eq=False)
class Call:
    """A question to a worker that is not answered yet."""

    worker: RemoteWorker
    started: float
    """When it began to be computed, as far as the driver can know (time.monotonic)."""
    round: Round | None = None
    """None: the question whether the worker is ready."""
    piece: Piece | None = None
    slot: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    issued_again: bool = False


class Broadcast:
    """θ, and the vector that a question is about, on their way to the workers.

    Workers of this machine read them from shared memory, others from Ray's object store; each is
    written once per value, however many questions follow.
    """

    def __init__(self, ray: Any, shared: SharedVectors | None):
        """`shared` has four slots of the size of θ: two for θ, two for the other vector."""
        self._ray, self._shared = ray, shared
        self._values: list[FlatVector | None] = [None, None]
        self._written = [0, 0]
        self._references: list[Any] = [None, None]

    def set(self, theta: FlatVector, vector: FlatVector | None) -> None:
        """What the next calls are to be computed at and about."""
        for kind, value in enumerate((theta, vector)):
            before = self._values[kind]
            if value is None or (before is not None and np.array_equal(before, value)):
                continue
            # A copy, because θ is updated in place.
            self._values[kind], self._references[kind] = value.copy(), None
            self._written[kind] += 1
            if self._shared is not None:
                self._shared.write(self._slot(kind), self._written[kind], value)
        self._about = vector is not None

    def arguments(self, attached: bool) -> tuple[Any, Any]:
        """θ and the vector as a worker is told of them."""
        return self._one(0, attached), self._one(1, attached) if self._about else None

    def _one(self, kind: int, attached: bool) -> Any:
        if attached:
            return self._slot(kind), self._written[kind]
        if self._references[kind] is None:
            value = self._values[kind]
            assert value is not None
            small = value.nbytes <= _DIRECT_BYTES
            self._references[kind] = value if small else self._ray.put(value)
        return self._references[kind]

    def _slot(self, kind: int) -> int:
        # In turns, so that who still reads the value before is not disturbed.
        return 2 * kind + self._written[kind] % 2


class RemoteWorker:
    """An actor, and the calls that it has."""

    def __init__(self, number: int, handle: Any, vectors: SharedVectors | None):
        """`vectors`: memory for the answers of this worker, a slot for each call it may have."""
        self.number, self.handle = number, handle
        self.pid: int | None = None
        """None until it answered that it is ready."""
        self.attached = False
        """Whether it has mapped the memory of this process."""
        self.ready_again = 0.0
        """When to ask a restarting worker next (time.monotonic)."""
        self.failed_starts = 0
        """How often its process ended before it was ready, in a row."""
        self.calls: list[Call] = []
        """What it has been asked and not answered yet, in this order."""
        self._vectors = vectors

    def __str__(self) -> str:
        process = "" if self.pid is None else f" (process {self.pid})"
        return f"worker {self.number}{process}"

    def ask_ready(self, broadcast: SharedVectors | None, now: float) -> tuple[Any, Call]:
        """Ask whether it is ready; its first answer comes when everything is compiled."""
        call = Call(self, now)
        addresses = [v.address if v is not None else None for v in (broadcast, self._vectors)]
        self.calls.append(call)
        return self.handle.ready.remote(*addresses), call

    def ask(self, round: Round, piece: Piece, broadcast: Broadcast, now: float) -> tuple[Any, Call]:
        """Give it a piece of a round."""
        call = Call(self, now, round, piece, self._free_slot())
        self.calls.append(call)
        theta, vector = broadcast.arguments(self.attached)
        slot = (call.slot, call.number) if self.attached else None
        return self.handle.run.remote(theta, vector, piece.job, slot), call

    def answered(self, call: Call, now: float) -> None:
        """A call has ended; the next one begins."""
        self.calls.remove(call)
        for following in self.calls[:1]:
            following.started = now

    def is_ready(self, ready: Ready) -> None:
        """Take in the answer to `ask_ready`."""
        self.pid, self.attached, self.failed_starts = ready.pid, ready.attached, 0

    def answer_of(self, call: Call, reply: Reply) -> JobResult | None:
        """The answer with its vector; None where what was asked about had gone meanwhile."""
        if reply.answer is None or not reply.in_slot:
            return reply.answer
        assert self._vectors is not None
        try:
            vector = self._vectors.read(call.slot, call.number)
        except StaleVector:
            return None
        return reply.answer.with_gradient(vector)

    def _free_slot(self) -> int:
        taken = {call.slot for call in self.calls if call.round is not None}
        return next(slot for slot in range(AHEAD) if slot not in taken)

    def close(self) -> None:
        """Let go of its memory."""
        if self._vectors is not None:
            self._vectors.close()
