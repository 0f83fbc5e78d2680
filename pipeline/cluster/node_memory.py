"""What travels by the memory of nodes: θ to the workers that map it, and their sums from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from pipeline.cluster.actor import Attached
from pipeline.cluster.group import Notice
from pipeline.cluster.relay import Relay, Relays
from pipeline.cluster.remote_worker import RemoteWorker
from pipeline.cluster.replies import Replies
from pipeline.cluster.roster import in_words
from pipeline.cluster.rounds import ChunkSum, Round
from pipeline.cluster.shared_vectors import SharedVectors, shared_vectors
from pipeline.maml.flat_vector import FlatVector

_DIRECT_BYTES = 100_000  # a vector up to this size travels within the call


class Broadcast:
    """θ, and the vector that a question is about, on their way to the workers.

    Workers of this machine, and those of a relay, read them from shared memory, others from Ray's
    object store; each is sent once per value and node, however many questions follow.
    """

    def __init__(self, ray: Any, shared: SharedVectors | None):
        """`shared` has four slots of the size of θ: two for θ, two for the other vector."""
        self._ray, self._shared = ray, shared
        self._values: list[FlatVector | None] = [None, None]
        self._written = [0, 0]
        self._references: list[Any] = [None, None]

    def set(self, theta: FlatVector, vector: FlatVector | None, relays: Iterable[Relay]) -> None:
        """What the next calls are to be computed at and about."""
        for kind, value in enumerate((theta, vector)):
            before = self._values[kind]
            if value is None or (before is not None and np.array_equal(before, value)):
                continue
            # A copy, because θ is updated in place.
            self._values[kind], self._references[kind] = value.copy(), None
            self._written[kind] += 1
            if self._shared is not None:
                self._shared.write(*self._place(kind), value)
            for relay in relays:
                self._send(kind, relay)
        self._about = vector is not None

    def join(self, relay: Relay) -> None:
        """Send a new relay what the others have."""
        for kind, value in enumerate(self._values):
            if value is not None:
                self._send(kind, relay)

    def arguments(self, attached: bool) -> tuple[Any, Any]:
        """θ and the vector as a worker is told of them."""
        theta, vector = (self._place(k) if attached else self._sent(k) for k in (0, 1))
        return theta, vector if self._about else None

    def _send(self, kind: int, relay: Relay) -> None:
        # Nobody waits for it: who reads before it is there waits a moment.
        relay.handle.set.remote(*self._place(kind), self._sent(kind))

    def _sent(self, kind: int) -> Any:
        """A vector as an argument of a call."""
        value = self._values[kind]
        if value is not None and self._references[kind] is None:
            small = value.nbytes <= _DIRECT_BYTES
            self._references[kind] = value if small else self._ray.put(value)
        return self._references[kind]

    def _place(self, kind: int) -> tuple[int, int]:
        """A vector by its slot and number. Slots take turns, so that who still reads the value
        before is not disturbed."""
        return 2 * kind + self._written[kind] % 2, self._written[kind]


class NodeMemory:
    """The memory of all nodes: this process's own, and that of relays."""

    def __init__(
        self,
        ray: Any,
        replies: Replies,
        workers: Mapping[int, RemoteWorker],
        size: int,
        dtype: str,
        notice: Notice,
    ):
        """`size`: the numbers in a vector; `workers` changes as workers come and go."""
        self._replies, self._workers, self._notice = replies, workers, notice
        self._relays = Relays(ray, size, dtype)
        self._shared = shared_vectors(4, size, dtype)
        """θ and another vector, twice each, for the workers of this node."""
        self._broadcast = Broadcast(ray, self._shared)
        self._round: ChunkSum | None = None
        """Whose sums are to be fetched."""

    def set(self, theta: FlatVector, vector: FlatVector | None) -> None:
        """What the calls of the next round are to be computed at and about."""
        self._broadcast.set(theta, vector, self._relays)
        for relay in self._relays:
            relay.under_way.clear()
            relay.kept.clear()

    def arguments(self, worker: RemoteWorker) -> tuple[Any, Any]:
        """θ and the vector as a worker is told of them."""
        return self._broadcast.arguments(worker.attached)

    def fetch_sums(self, round: Round) -> None:
        """Have relays send what their workers have added up, once there is no more to come."""
        self._round = round if isinstance(round, ChunkSum) else None
        if self._round is None:
            return
        for relay in self._relays:
            if relay.due(round.covered):
                ref = relay.fetch(self._round.num_chunks)
                self._replies.expect(ref, partial(self._fetched, self._round, relay))

    def _fetched(self, round: ChunkSum, relay: Relay, reply: Any) -> None:
        asked, relay.asked = relay.asked, []
        if isinstance(reply, BaseException):
            relay.kept += asked  # they are lost with it
            self._lost(relay, reply)
            return
        for span, vector in reply:
            round.add(span, vector)
        for kept in asked:
            round.lost(kept.span)  # unless it is part of what came

    def share(self, worker: RemoteWorker) -> None:
        """Have a worker that is ready map the memory of its node."""
        relay, new = self._relays.of(worker.node)
        if relay is not None and new:
            self._broadcast.join(relay)
        own = self._shared if worker.node == self._relays.here else None
        ref = worker.share(relay, own)
        if ref is not None:
            self._replies.expect(ref, partial(self._shares, worker, worker.pid, relay))

    def share_again(self, worker: RemoteWorker) -> None:
        """A worker has not found θ in its relay's memory: until it has mapped that anew, which
        shows whether the relay lives, vectors travel with its calls."""
        worker.leave()
        self.share(worker)

    def _shares(
        self, worker: RemoteWorker, pid: int | None, relay: Relay | None, reply: Any
    ) -> None:
        if worker.pid != pid:
            return  # that process has ended
        if isinstance(reply, Attached) and (relay is None or relay in self._relays):
            worker.attached, worker.relay = True, relay
            worker.talk(reply.channel)
        elif isinstance(reply, BaseException) and relay is not None:
            self._lost(relay, reply)

    def _lost(self, relay: Relay, error: BaseException) -> None:
        """A relay ended: its workers send vectors with their calls, until there is another one."""
        if relay not in self._relays:
            return
        self._relays.drop(relay)
        self._notice(f"the relay of a node was lost ({in_words(error)}); its sums are made again")
        for kept in relay.kept:
            if self._round is not None:
                self._round.lost(kept.span)
        for worker in self._workers.values():
            if worker.relay is relay:
                worker.leave()
            if worker.node == relay.node and worker.pid is not None:
                self.share(worker)

    def close(self) -> None:
        """Give everything back."""
        self._relays.close()
        if self._shared is not None:
            self._shared.close()
