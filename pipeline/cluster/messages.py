"""What the driver, the relays and the workers say to each other. No torch: a relay has none.

What only driver and worker understand, arguments and answers, is pickled once by the one and
unpickled by the other: relays hand it on as it is.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from pipeline.worker.tree import Span

if TYPE_CHECKING:
    from pipeline.maml.flat_vector import FlatVector
    from pipeline.worker.jobs import JobResult

AHEAD = 2
"""Questions that a worker has at once: it goes on with the second while the answer to the first
travels."""

InMemory = tuple[int, int]
"""A vector by its slot and its number (see `SharedVectors`)."""


class Ready(NamedTuple):
    """A worker has built everything."""

    pid: int
    node: str
    """Ray's id of the node that it is on."""
    warnings: list[str]
    """For the driver: what an actor writes to its log nobody reads."""


@dataclass(frozen=True)
class Reply:
    """What comes back for a piece of work."""

    answer: JobResult | None
    """None: θ, or what was asked about, is no longer in memory, or the answer has been lost."""
    apart: bool = False
    """Whether the vector of the answer is not in it, but in memory, or in the sum of its node."""

    def joined(self, vector: FlatVector) -> Reply:
        """The answer with its vector."""
        assert self.answer is not None
        return Reply(self.answer.with_gradient(vector))

    def parted(self) -> Reply:
        """The answer without its vector, which goes another way."""
        assert self.answer is not None
        return replace(self, answer=self.answer.with_gradient(None), apart=True)


class Failed(NamedTuple):
    """A reply: the computation raised an error."""

    cause: Exception


Content = bytes | EOFError | OSError
"""A pickled `Reply` or `Failed`; an error: the worker's process has ended."""


def opened(content: Content) -> Reply | Failed | EOFError | OSError:
    """What a worker said."""
    if not isinstance(content, bytes):
        return content
    reply = pickle.loads(content)
    assert isinstance(reply, Reply | Failed)
    return reply


class Addend(NamedTuple):
    """To which sum the vector of an answer belongs."""

    round: int
    num_chunks: int
    span: Span


class Question(NamedTuple):
    """To a worker, by way of a relay."""

    worker: int
    number: int
    arguments: bytes
    addend: Addend | None
    """None: answers are not added."""


class Answers(NamedTuple):
    """Of workers of a node, by way of a relay."""

    contents: list[tuple[int, Content]]
    """By the numbers of the questions."""
    sums: list[tuple[Addend, FlatVector]]
    """Vectors of the answers, added as far as they are parts of each other's sums."""
