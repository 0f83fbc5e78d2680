"""The nodes of the workers, as the driver knows them: by which way each worker is asked.

own node            through the hub of this process
another node        through its relay, one call for all its workers, which has θ once
no hub, no relay    by calls of Ray to the worker itself, which always works
"""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from pipeline.cluster.channel import ChannelAddress
from pipeline.cluster.group import Notice
from pipeline.cluster.hub import Hub
from pipeline.cluster.messages import Addend, Answers, InMemory, Question, Reply, opened
from pipeline.cluster.relay import RelayActor
from pipeline.cluster.remote_worker import Call, RemoteWorker
from pipeline.cluster.replies import Replies
from pipeline.cluster.roster import in_words
from pipeline.cluster.rounds import ChunkSum, Round, span_of
from pipeline.maml.flat_vector import FlatVector

_TRIES = 3  # relays of a node that may fail


class Vectors:
    """θ, and the vector that the questions of a round are about, on their way to the workers. Each
    is sent once per value and node, however many questions follow."""

    def __init__(self, ray: Any, in_calls: int):
        """`in_calls`: bytes up to which a value travels within a call."""
        self._ray, self._in_calls = ray, in_calls
        self._values: list[FlatVector | None] = [None, None]
        self._numbers = [0, 0]
        self._sent: list[Any] = [None, None]
        self._about = False

    def set(self, theta: FlatVector, vector: FlatVector | None) -> None:
        """What the next questions are to be computed at and about."""
        for kind, value in enumerate((theta, vector)):
            before = self._values[kind]
            if value is None or (before is not None and np.array_equal(before, value)):
                continue
            # A copy, because θ is updated in place.
            self._values[kind], self._sent[kind] = value.copy(), None
            self._numbers[kind] += 1
        self._about = vector is not None

    @property
    def places(self) -> tuple[InMemory, InMemory]:
        """Where the two are in memory. Slots take turns, so that who still reads the value before
        is not disturbed."""
        theta, vector = ((2 * k + self._numbers[k] % 2, self._numbers[k]) for k in (0, 1))
        return theta, vector

    def news(self, known: list[int]) -> list[FlatVector | None]:
        """The two as they are to be told to a node that knows those of these numbers, None where it
        knows them; the numbers are brought up to date."""
        new = [self._values[k] if known[k] != self._numbers[k] else None for k in (0, 1)]
        known[:] = self._numbers
        return new

    def as_argument(self, value: FlatVector | None) -> Any:
        """A value as an argument of a call of Ray."""
        if value is None or value.nbytes < self._in_calls:
            return value
        kind = next(k for k in (0, 1) if self._values[k] is value)
        if self._sent[kind] is None:
            self._sent[kind] = self._ray.put(value)
        return self._sent[kind]

    def told(self, memory: bool) -> tuple[Any, Any]:
        """The two as arguments of `ChunkActor.run`."""
        theta, vector = self.places if memory else map(self.as_argument, self._values)
        return theta, vector if self._about else None


class OwnNode:
    """The node of this process."""

    def __init__(self, hub: Hub, vectors: Vectors, replies: Replies):
        self._hub, self._vectors, self._replies = hub, vectors, replies
        self._known = [0, 0]

    def attach(self, worker: RemoteWorker) -> None:
        """Have a worker share memory, and listen."""
        try:
            memory = self._hub.open(worker.identity)
        except OSError:
            return  # none left
        worker.home = self
        reference = worker.handle.attach.remote(memory)
        self._replies.expect(reference, partial(self._attached, worker, worker.pid))

    def _attached(self, worker: RemoteWorker, pid: int | None, address: Any) -> None:
        if isinstance(address, ChannelAddress) and worker.pid == pid and worker.home is self:
            worker.at_home = self._hub.connect(worker.identity, address)

    def ask(self, call: Call, arguments: bytes, addend: Addend | None) -> None:
        for place, value in zip(self._vectors.places, self._vectors.news(self._known), strict=True):
            if value is not None:
                self._hub.write(place, value)
        self._hub.ask(call.worker.identity, call.number, call, arguments, apart=True)

    def leave(self, worker: RemoteWorker) -> None:
        self._hub.close(worker.identity)


class RelayedNode:
    """A node that has a relay."""

    def __init__(self, name: str, handle: Any, nodes: Nodes):
        self.name, self.handle, self._nodes = name, handle, nodes
        self._known = [0, 0]
        self._questions: list[Question] = []
        self._calls: dict[int, Call] = {}
        """That are not answered, by number."""
        self._exchanges = 0
        """Calls of the relay that have not returned."""

    def attach(self, worker: RemoteWorker) -> None:
        """Have a worker share the relay's memory, and listen to it."""
        worker.home = self
        self._expect(self.handle.open.remote(worker.identity), self._opened, worker)

    def _opened(self, worker: RemoteWorker, memory: Any) -> None:
        pid = worker.pid

        def attached(address: Any) -> None:
            # An error is that of the worker, which is noticed elsewhere.
            if isinstance(address, ChannelAddress) and worker.pid == pid and worker.home is self:
                reference = self.handle.connect.remote(worker.identity, address)
                self._expect(reference, self._connected, worker)

        self._nodes.replies.expect(worker.handle.attach.remote(memory), attached)

    def _connected(self, worker: RemoteWorker, connected: Any) -> None:
        worker.at_home = connected

    def _expect(self, reference: Any, then: Any, worker: RemoteWorker) -> None:
        """Go on with the relay's answer about a worker, unless either has ended meanwhile."""
        pid = worker.pid

        def arrived(reply: Any) -> list[tuple[Call, Any]]:
            if isinstance(reply, BaseException):
                return self._nodes.lost(self, reply)
            if worker.pid == pid and worker.home is self:
                then(worker, reply)
            return []

        self._nodes.replies.expect(reference, arrived)

    def ask(self, call: Call, arguments: bytes, addend: Addend | None) -> None:
        self._calls[call.number] = call
        self._nodes.to_flush.add(self)
        self._questions.append(Question(call.worker.identity, call.number, arguments, addend))

    def flush(self, patient: bool) -> None:
        """As `Nodes.flush`, to this node."""
        if not self._questions and (self._exchanges or not self._calls):
            return
        vectors = self._nodes.vectors
        new = [vectors.as_argument(value) for value in vectors.news(self._known)]
        # A worker with two questions could give one away.
        patient &= len({call.worker.number for call in self._calls.values()}) == len(self._calls)
        reference = self.handle.exchange.remote(vectors.places, *new, self._questions, patient)
        self._questions = []
        self._exchanges += 1
        self._nodes.replies.expect(reference, self._exchanged)

    def _exchanged(self, answers: Answers | BaseException) -> list[tuple[Call, Any]]:
        """Calls that have been answered, each with its answer."""
        self._exchanges -= 1
        if isinstance(answers, BaseException):
            return self._nodes.lost(self, answers)
        for addend, vector in answers.sums:
            self._nodes.add(addend, vector)
        known = [(self._calls.pop(number, None), content) for number, content in answers.contents]
        self._nodes.to_flush.add(self)
        return [(call, opened(content)) for call, content in known if call is not None]

    def leave(self, worker: RemoteWorker) -> None:
        self._calls = {n: call for n, call in self._calls.items() if call.worker is not worker}
        self.handle.close.remote(worker.identity)

    def ended(self) -> list[tuple[Call, Any]]:
        """The calls that the relay has taken with it, with answers that say so."""
        lost, self._calls = list(self._calls.values()), {}
        return [(call, Reply(None)) for call in lost]


class Nodes:
    """The nodes of a group of workers."""

    def __init__(
        self,
        ray: Any,
        workers: Mapping[int, RemoteWorker],
        size: int,
        dtype: str,
        in_calls: int,
        notice: Notice,
    ):
        """`size`: the numbers in a vector; `in_calls`: bytes that travel within a call of Ray;
        `workers` changes as workers come and go."""
        self._ray, self._workers, self._notice = ray, workers, notice
        self._size, self._dtype = size, dtype
        own = _hub(size, dtype)
        self.replies = Replies(ray, own)
        self.vectors = Vectors(ray, in_calls)
        self._here = ray.get_runtime_context().get_node_id()
        self._own = OwnNode(own, self.vectors, self.replies) if own is not None else None
        self._relayed: dict[str, RelayedNode] = {}
        self.to_flush: set[RelayedNode] = set()
        """Those that may have questions to send, or answers to wait for."""
        self._failures: Counter[str] = Counter()
        self._rounds = itertools.count(1)
        self._round: tuple[int, Round] | None = None

    def begin(self, round: Round, theta: FlatVector, vector: FlatVector | None) -> None:
        """A round begins, at θ and about a vector."""
        self._round = next(self._rounds), round
        self.vectors.set(theta, vector)

    def ask(self, call: Call) -> None:
        """Put the question of a call, which is one of this round, to its worker."""
        assert self._round is not None
        assert call.piece is not None
        number, round = self._round
        job, home = call.piece.job, call.worker.home
        if home is None or not call.worker.at_home:
            theta, vector = self.vectors.told(memory=False)
            self.replies.expect(call.worker.handle.run.remote(theta, vector, job, None), call)
            return
        addend = None
        if isinstance(round, ChunkSum):
            addend = Addend(number, round.num_chunks, span_of(call.piece))
        home.ask(call, pickle.dumps((*self.vectors.told(memory=True), job)), addend)

    def flush(self, patient: bool) -> None:
        """Send all questions that were put, and wait for those that are not answered; `patient`:
        there are no more for who is early."""
        while self.to_flush:
            self.to_flush.pop().flush(patient)

    def add(self, addend: Addend, vector: FlatVector) -> None:
        """Take in what a relay has added up."""
        if self._round is not None and self._round[0] == addend.round:
            assert isinstance(self._round[1], ChunkSum)
            self._round[1].add(addend.span, vector)

    def attach(self, worker: RemoteWorker) -> None:
        """A worker is ready: have it be asked through its node from now on. A relay pays from two
        workers on."""
        if worker.node == self._here:
            if self._own is not None:
                self._own.attach(worker)
            return
        relayed = self._relayed.get(worker.node)
        if relayed is not None:
            relayed.attach(worker)
            return
        mates = [w for w in self._workers.values() if w.node == worker.node and w.pid is not None]
        if len(mates) > 1 and self._failures[worker.node] < _TRIES:
            relayed = self._new_relay(worker.node)
            for mate in mates:
                relayed.attach(mate)

    def lost(self, node: RelayedNode, error: BaseException) -> list[tuple[Call, Any]]:
        """A relay ended: its workers are called themselves, until there is another one. Returns the
        calls that it has taken with it, with answers that say so."""
        if self._relayed.get(node.name) is not node:
            return []
        del self._relayed[node.name]
        self.to_flush.discard(node)
        self._failures[node.name] += 1
        self._ray.kill(node.handle)
        self._notice(f"the relay of a node was lost ({in_words(error)}); its sums are made again")
        at_home = [worker for worker in self._workers.values() if worker.home is node]
        for worker in at_home:
            worker.home, worker.at_home = None, False
        for worker in at_home[:1]:
            self.attach(worker)  # and its mates
        return node.ended()

    def _new_relay(self, name: str) -> RelayedNode:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        affinity = NodeAffinitySchedulingStrategy(name, soft=False)
        actor = self._ray.remote(RelayActor).options(num_cpus=0, scheduling_strategy=affinity)
        self._relayed[name] = RelayedNode(name, actor.remote(self._size, self._dtype), self)
        return self._relayed[name]

    def __iter__(self) -> Iterator[RelayedNode]:
        """Those that have a relay."""
        return iter(list(self._relayed.values()))

    def close(self) -> None:
        """End all relays, and give back the memory."""
        for worker in self._workers.values():
            worker.leave()
        for node in self:
            self._ray.kill(node.handle)


def _hub(size: int, dtype: str) -> Hub | None:
    """A hub for this process; None where the system has no such memory."""
    try:
        return Hub(size, dtype)
    except (OSError, AttributeError):  # no memory left; no Linux
        return None
