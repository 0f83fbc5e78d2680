"""What a round of questions still needs, and what has come back: no Ray, no processes, no clocks.

A round is either a list of jobs that have nothing to do with each other (evaluations), or one
question to all chunks of a meta-batch whose answers are summed. In both, a piece may be given to
several workers, lost and given again: the first answer counts, and none changes the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.jobs import ChunkJob, Job, JobResult
from pipeline.worker.tree import NO_VECTOR, Span, TreeSum, halves

_LONG_BLOCK = 0.25  # seconds; a call costs about a millisecond


@dataclass(eq=False)
class Piece:
    """Work for one call."""

    job: Job
    deaths: int = 0
    """Processes that ended while they computed it, or a larger piece that it was part of."""
    refused_by: int | None = None
    """Number of the worker whose computation raised an error."""
    refused_at: float = 0.0
    """When (time.monotonic)."""
    held_by: int | None = None
    """Number of the worker that has kept what the job asks about; others have to make it again."""


class Total(NamedTuple):
    """The answers of all chunks of a meta-batch, as one."""

    gradient: FlatVector | None
    """Sum over the tasks, [D], by the tree of `worker.tree`; None where only metrics were asked."""
    metrics: dict[str, npt.NDArray[Any]]
    """Per task, [tasks of the meta-batch], in their order."""
    num_tasks: int
    finite: tuple[bool, ...]
    """Of every chunk: whether its vector has finite elements only."""
    seconds_sampling: float
    seconds_computing: float
    busiest_seconds: float
    """Of the worker that had most to do: what the driver cannot avoid."""


class Round(Protocol):
    """What is left to do, and what has come back."""

    waiting: deque[Piece]
    """Pieces that nobody works on, the next one first."""

    @property
    def done(self) -> bool:
        """Whether everything has been answered, and is here."""
        ...

    def needs(self, piece: Piece) -> bool:
        """Whether the answer to a piece would still tell something."""
        ...

    def accept(self, piece: Piece, answer: JobResult, worker: int, apart: bool = False) -> None:
        """Take in the answer of a worker, by its number; one that came too late changes nothing.
        `apart`: its vector has been added otherwise, as part of the sum of a node."""
        ...

    def parts(self, piece: Piece) -> list[Piece]:
        """The piece in two, for two workers; itself where it cannot be divided."""
        ...


class JobList:
    """Separate jobs."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs = list(jobs)
        self._answers: dict[int, JobResult] = {}
        """By the identity of the job, which all pieces that stand for it share."""
        self.waiting = deque(Piece(job) for job in self._jobs)

    @property
    def done(self) -> bool:
        return len(self._answers) == len(self._jobs)

    def needs(self, piece: Piece) -> bool:
        return id(piece.job) not in self._answers

    def accept(self, piece: Piece, answer: JobResult, worker: int, apart: bool = False) -> None:
        self._answers.setdefault(id(piece.job), answer)

    def parts(self, piece: Piece) -> list[Piece]:
        return [piece]

    def answers(self) -> list[JobResult]:
        """In the order of the jobs."""
        return [self._answers[id(job)] for job in self._jobs]


class ChunkSum:
    """One question to all chunks of a meta-batch; a piece is a block of them."""

    def __init__(
        self,
        ask: Callable[[Span], ChunkJob],
        num_chunks: int,
        blocks: Iterable[tuple[Span, int | None]],
    ):
        """`blocks`: nodes of the tree that together are all chunks, each with the number of the
        worker that holds what is asked about, or None."""
        self._ask, self.num_chunks = ask, num_chunks
        self._tree = TreeSum(num_chunks)
        self._there = bytearray(num_chunks)  # looked at for every answer: quicker than an array
        """Chunks whose answers are here; their vectors may come a moment before."""
        self._answers: dict[Span, tuple[int, JobResult]] = {}
        self._has_vectors = False
        self._busy: dict[int, float] = {}
        self.waiting = deque(Piece(ask(span), held_by=holder) for span, holder in blocks)

    @property
    def done(self) -> bool:
        return self._tree.complete

    def needs(self, piece: Piece) -> bool:
        span = span_of(piece)
        return 0 in self._there[span.first : span.end]

    def accept(self, piece: Piece, answer: JobResult, worker: int, apart: bool = False) -> None:
        if not self.needs(piece):
            return
        span = span_of(piece)
        self._there[span.first : span.end] = b"\1" * span.size
        if not apart:
            self.add(span, NO_VECTOR if answer.gradient is None else answer.gradient)
        # Its vector is in the sum: what is kept is small.
        kept = answer if answer.gradient is None else replace(answer, gradient=None)
        self._answers[span] = (worker, kept)
        seconds = answer.seconds_sampling + answer.seconds_computing
        self._busy[worker] = self._busy.get(worker, 0.0) + seconds

    def add(self, span: Span, vector: FlatVector) -> None:
        """Take in the vector of a node of the tree; the answers to its chunks come beside it."""
        self._has_vectors |= vector is not NO_VECTOR
        self._tree.add(span, vector)

    def parts(self, piece: Piece) -> list[Piece]:
        span = span_of(piece)
        if span.size == 1:
            return [piece]
        return [replace(piece, job=self._ask(half)) for half in halves(span)]

    def answered_by(self) -> list[tuple[Span, int]]:
        """Which worker answered which block."""
        return [(span, worker) for span, (worker, _) in self._cover()]

    def total(self) -> Total:
        """The answers of all chunks as one. Raises ValueError while any is missing."""
        vector = self._tree.total()
        answers = [answer for _, (_, answer) in self._cover()]
        busiest = max(self._busy.values())
        return total_of(answers, vector if self._has_vectors else None, busiest)

    def _cover(self) -> list[tuple[Span, tuple[int, JobResult]]]:
        """Blocks that together are all chunks, in order, each with its worker and its answer."""
        found, end = [], 0
        for span, given in sorted(
            self._answers.items(), key=lambda item: (item[0][0], -item[0][1])
        ):
            if span.end > end:  # otherwise part of a block that was answered as a whole, too
                found.append((span, given))
                end = span.end
        return found


def total_of(
    results: Sequence[JobResult], gradient: FlatVector | None, busiest_seconds: float
) -> Total:
    """The results of blocks that together are all chunks, in order, as one."""
    return Total(
        gradient,
        {
            name: np.concatenate([result.metrics[name] for result in results])
            for name in results[0].metrics
        },
        sum(result.num_tasks for result in results),
        tuple(flag for result in results for flag in result.finite),
        sum(result.seconds_sampling for result in results),
        sum(result.seconds_computing for result in results),
        busiest_seconds,
    )


def block_size(num_chunks: int, workers: int, chunk_seconds: float | None) -> int:
    """Chunks in a block, a power of two.

    One block per worker costs the fewest calls. Where workers cannot be given the same number, or
    where a block takes so long that the cost of a call is nothing beside it, blocks are smaller, so
    that who is early helps out.
    """
    size, workers = 1, max(workers, 1)
    while 2 * size * workers <= num_chunks:
        size *= 2
    if size > 1 and size * workers != num_chunks:
        size //= 2
    while size > 1 and size * (chunk_seconds or 0.0) > _LONG_BLOCK:
        size //= 2
    return size


def span_of(piece: Piece) -> Span:
    """The chunks of a piece of a `ChunkSum`."""
    assert isinstance(piece.job, ChunkJob)
    return piece.job.chunks
