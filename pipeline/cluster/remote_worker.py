"""A worker as the driver knows it: an actor, what it was asked, and the memory they share."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from pipeline.cluster.actor import Ready, Reply
from pipeline.cluster.channel import ChannelAddress, connect_to
from pipeline.cluster.relay import Relay
from pipeline.cluster.replies import Replies
from pipeline.cluster.rounds import Piece, Round
from pipeline.cluster.shared_vectors import SharedVectors, StaleVector, shared_vectors
from pipeline.worker.jobs import JobResult

AHEAD = 2
"""Calls that a worker has at once: it goes on with the second while the answer to the first
travels."""
SLOTS = AHEAD + 1
"""Answers that the memory of a worker holds: those to its calls, and one that a relay keeps."""

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
    slot: int | None = None
    """Where in memory the answer is to be put; None: it comes with its vector."""
    relay: Relay | None = None
    """In whose memory; None: in that of this process."""
    number: int = field(default_factory=lambda: next(_numbers))
    issued_again: bool = False


class RemoteWorker:
    """An actor, and the calls that it has."""

    def __init__(self, number: int, handle: Any):
        self.number, self.handle, self.memory = number, handle, next(_numbers)
        """`memory`: a number for its memory at a relay; unlike `number` no successor has it."""
        self.pid: int | None = None
        """None until it answered that it is ready."""
        self.node = ""
        """Ray's id of the node that it is on."""
        self.attached = False
        """Whether it has mapped the memory of this process, or of its relay."""
        self.relay: Relay | None = None
        """Whose memory it has mapped; None: that of this process, or none."""
        self.ready_again = 0.0
        """When to ask a restarting worker next (time.monotonic)."""
        self.restarts_when_ready = -1
        """How often Ray had restarted it when it was ready last; -1 before it was."""
        self.calls: list[Call] = []
        """What it has been asked and not answered yet, in this order."""
        self._vectors: SharedVectors | None = None
        """Memory of this process for its answers, a slot for each call it may have."""
        self._channel: Connection[Any, Any] | None = None
        """The way to ask a worker of this machine."""

    def __str__(self) -> str:
        process = "" if self.pid is None else f" (process {self.pid})"
        return f"worker {self.number}{process}"

    def ask_ready(self, replies: Replies, now: float) -> None:
        """Ask whether it is ready; its first answer comes when everything is compiled."""
        call = Call(self, now)
        self.calls.append(call)
        replies.expect(self.handle.ready.remote(), call)

    def share(self, relay: Relay | None, broadcast: SharedVectors | None) -> Any:
        """Have it map the memory of its relay, or else of this process, whose `broadcast` has θ.

        Returns the reference of the answer (`Attached`, or None where it could not); None where
        there is no memory to share.
        """
        if relay is not None:
            return self.handle.attach.remote(relay.handle.open.remote(self.memory, SLOTS), False)
        if broadcast is None:
            return None
        if self._vectors is None:
            size, dtype = broadcast.address.size, broadcast.address.dtype
            self._vectors = shared_vectors(AHEAD, size, dtype)
        if self._vectors is None:
            return None
        return self.handle.attach.remote((broadcast.address, self._vectors.address), True)

    def talk(self, address: ChannelAddress | None) -> None:
        """From now on ask through a channel, if there is one, instead of through Ray."""
        self._channel = connect_to(address) if address is not None else None

    def ask(
        self, round: Round, piece: Piece, vectors: tuple[Any, Any], replies: Replies, now: float
    ) -> Call:
        """Give it a piece of a round; `vectors` are θ and what it is about, for
        `ChunkActor.run`."""
        call = Call(self, now, round, piece, self._free_slot(round), self.relay)
        self.calls.append(call)
        if self.relay is not None:
            self.relay.under_way.add(call.number)
            self.relay.full |= call.slot is None
        place = None if call.slot is None else (call.slot, call.number)
        arguments = (*vectors, piece.job, place)
        if self._channel is None:
            replies.expect(self.handle.run.remote(*arguments), call)
            return call
        replies.expect(call.number, call, self._channel)
        with contextlib.suppress(OSError):  # its end is noticed where answers are waited for
            self._channel.send((call.number, arguments))
        return call

    def answered(self, call: Call, now: float) -> None:
        """A call has ended; the next one begins."""
        self.calls.remove(call)
        if call.relay is not None:
            call.relay.under_way.discard(call.number)
        for following in self.calls[:1]:
            following.started = now

    def is_ready(self, ready: Ready) -> None:
        """Take in the answer to `ask_ready`."""
        self.pid, self.node = ready.pid, ready.node
        self.leave()

    def leave(self) -> None:
        """From now on vectors travel with Ray's calls."""
        self.attached, self.relay = False, None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def answer_of(self, call: Call, reply: Reply) -> JobResult | None:
        """The answer with its vector, unless that is in a relay's memory; None where what was
        asked about, or the vector, has gone meanwhile."""
        if reply.answer is None or not reply.in_slot:
            return reply.answer
        if call.relay is not None:
            return reply.answer if call.relay is self.relay else None
        assert self._vectors is not None
        assert call.slot is not None
        try:
            vector = self._vectors.read(call.slot, call.number)
        except StaleVector:
            return None
        return reply.answer.with_gradient(vector)

    def close(self) -> None:
        """Give back the memory of its answers, here or at its relay, and the channel."""
        if self.relay is not None:
            self.relay.handle.close.remote(self.memory)
        self.leave()
        if self._vectors is not None:
            self._vectors.close()

    def _free_slot(self, round: Round) -> int | None:
        """A slot that no call is to answer into, and nothing that is to be fetched lies in."""
        if not self.attached or (self.relay is not None and not round.adds):
            return None
        taken = {call.slot for call in self.calls}
        for slot in range(AHEAD if self.relay is None else SLOTS):
            kept = self.relay is not None and self.relay.holds(self.memory, slot)
            if slot not in taken and not kept:
                return slot
        return None
