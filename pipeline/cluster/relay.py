"""One process per node of a cluster: what goes to the node's workers, and comes from them, as one.

    driver ── θ, once per node ──▶ relay ══ shared memory ══▶ workers of the node
    driver ◀── sums, few per node ── relay ◀══ shared memory ══ their vectors

Without it θ would be sent to each worker, and each worker's sum to the driver. The relay adds by
the same tree as everybody (`worker.tree`), so that bits do not depend on who is on which node. It
takes no CPU of the cluster, keeps nothing that could not be computed again, and imports no torch.
Where a node has none, or has lost it, vectors travel with the workers' own calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.cluster.shared_vectors import Address, SharedVectors, StaleVector
from pipeline.worker.tree import Span, TreeSum

if TYPE_CHECKING:
    from pipeline.maml.flat_vector import FlatVector

_WORTH_BYTES = 50_000  # a smaller vector costs little beside the call that it travels with
_TRIES = 3  # relays of a node that may fail


class Kept(NamedTuple):
    """A vector that is in the memory of a relay."""

    memory: int
    """Of which worker, by the number that its memory was made with."""
    slot: int
    call: int
    span: Span


class RelayActor:
    """The Ray actor. Its calls are carried out in the order in which the driver makes them."""

    def __init__(self, size: int, dtype: str):
        """`size`: the numbers in a vector."""
        self._size, self._dtype = size, dtype
        self._broadcast = SharedVectors.create(4, size, dtype)
        self._answers: dict[int, SharedVectors] = {}

    def open(self, memory: int, slots: int) -> tuple[Address, Address]:
        """Where a worker reads θ and the vectors of questions, and where it puts its answers.

        Raises OSError where there is no memory left.
        """
        self._answers[memory] = SharedVectors.create(slots, self._size, self._dtype)
        return self._broadcast.address, self._answers[memory].address

    def close(self, memory: int) -> None:
        """Forget the memory of a worker that is no more."""
        if memory in self._answers:
            self._answers.pop(memory).close()

    def set(self, slot: int, number: int, vector: FlatVector) -> None:
        """Put θ, or the vector of a question, where the workers read it."""
        self._broadcast.write(slot, number, vector)

    def folded(self, num_chunks: int, kept: Sequence[Kept]) -> list[tuple[Span, FlatVector]]:
        """Vectors of workers, added as far as they are parts of each other's sums. Those that are
        not there any more are left out."""
        tree = TreeSum(num_chunks)
        for each in kept:
            try:
                vector = self._answers[each.memory].read(each.slot, each.call)
            except (StaleVector, KeyError):
                continue
            tree.add(each.span, vector)
        return list(tree.nodes.items())


class Relay:
    """A relay as the driver knows it."""

    def __init__(self, node: str, handle: Any):
        self.node, self.handle = node, handle
        self.kept: list[Kept] = []
        """Answered, and not asked for yet."""
        self.asked: list[Kept] = []
        """What a call of `folded` is about that is under way."""
        self.under_way: set[int] = set()
        """Numbers of the present round's calls that workers of this node have not answered."""
        self.full = False
        """Whether a worker had no room for an answer."""

    def due(self, covered: bool) -> bool:
        """Whether to fetch what is kept; `covered`: nothing else is missing."""
        return bool(self.kept) and not self.asked and (covered or self.full or not self.under_way)

    def fetch(self, num_chunks: int) -> Any:
        """Ask for the sum of all that is kept; returns the reference of the answer."""
        self.asked, self.kept, self.full = self.kept, [], False
        return self.handle.folded.remote(num_chunks, self.asked)

    def holds(self, memory: int, slot: int) -> bool:
        """Whether an answer that is still to be fetched lies there."""
        return any((k.memory, k.slot) == (memory, slot) for k in [*self.kept, *self.asked])


class Relays:
    """The relays of a group of workers, by node."""

    def __init__(self, ray: Any, size: int, dtype: str):
        """`size`: the numbers in a vector."""
        self._ray, self._size, self._dtype = ray, size, dtype
        self._relays: dict[str, Relay] = {}
        self._failures: Counter[str] = Counter()
        self.here = ray.get_runtime_context().get_node_id()
        """Ray's id of the node of this process, which needs none."""

    def __iter__(self) -> Iterator[Relay]:
        return iter(list(self._relays.values()))

    def of(self, node: str) -> tuple[Relay | None, bool]:
        """The relay of a node, and whether it was started just now; None where there is to be none:
        on this node, for small vectors, after three that failed."""
        if node in self._relays:
            return self._relays[node], False
        small = self._size * np.dtype(self._dtype).itemsize < _WORTH_BYTES
        if small or node == self.here or self._failures[node] >= _TRIES:
            return None, False
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        handle = self._ray.remote(RelayActor).options(**options).remote(self._size, self._dtype)
        self._relays[node] = Relay(node, handle)
        return self._relays[node], True

    def drop(self, relay: Relay) -> None:
        """A relay failed; the node gets another one, three times."""
        if self._relays.get(relay.node) is relay:
            del self._relays[relay.node]
            self._failures[relay.node] += 1
            self._ray.kill(relay.handle)

    def close(self) -> None:
        """End all."""
        for relay in self:
            self._ray.kill(relay.handle)
