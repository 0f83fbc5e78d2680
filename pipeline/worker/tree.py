"""A sum that does not depend on who adds: the value of a fixed binary tree over the chunks.

Floating-point addition is not associative, so the order of additions is part of the result. Here it
is a property of the number of chunks C alone. Node (l, i) of the tree stands for the chunks from
i·2^l to min((i + 1)·2^l, C); its value is left + right, or left alone where the right half has no
chunk. Whoever has both halves of a node may add them: worker, node or driver, in any order, again
after a loss. The bits of the root are the same. (The idea is that of reproducible tree reductions,
such as TBIK, arXiv 2511.17826; here only sums of subtrees travel.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pipeline.maml.flat_vector import FlatVector

ORDER = "binary tree over the chunks, 16 of them where they are compiled"
"""In which order sums are made; a checkpoint says so, because their last bits depend on it."""
NO_VECTOR: FlatVector = np.empty(0)
"""Stands in a sum for answers that are metrics alone: the tree still knows what is there."""


class Span(NamedTuple):
    """The chunks `first` .. `end - 1`. A block that a worker computes is always a node."""

    first: int
    end: int

    @property
    def size(self) -> int:
        """Number of chunks."""
        return self.end - self.first

    def contains(self, other: Span) -> bool:
        """Whether all chunks of the other span are among these."""
        return self.first <= other.first and other.end <= self.end


def blocks_of(num_chunks: int, size: int) -> list[Span]:
    """The nodes that stand for `size` chunks each (a power of two), the last for what remains."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a block must have 1, 2, 4, ... chunks, got {size}")
    starts = range(0, num_chunks, size)
    return [Span(first, min(first + size, num_chunks)) for first in starts]


def halves(span: Span) -> tuple[Span, Span]:
    """The two children of a node of more than one chunk."""
    if span.size < 2:
        raise ValueError(f"a block of one chunk has no halves: {span}")
    left = 1 << ((span.size - 1).bit_length() - 1)
    return Span(span.first, span.first + left), Span(span.first + left, span.end)


def parent_of(span: Span, num_chunks: int) -> Span:
    """The node one of whose two children this one is."""
    size = 1 << (span.size - 1).bit_length()
    while True:
        size *= 2
        first = span.first - span.first % size
        parent = Span(first, min(first + size, num_chunks))
        if parent != span:
            return parent


class TreeSum:
    """Vectors of nodes, added as far as both halves of a node are there."""

    def __init__(self, num_chunks: int):
        """Raises ValueError without chunks."""
        if num_chunks < 1:
            raise ValueError("a sum needs at least one chunk")
        self._whole = Span(0, num_chunks)
        self._values: dict[Span, FlatVector] = {}
        self._there = np.zeros(num_chunks, bool)
        """Chunks that are in some value."""

    def add(self, span: Span, value: FlatVector) -> bool:
        """Take in the value [D] of a node; False for one that is there already, alone or in a sum.

        `value` may be overwritten, unless it is read-only. A node that is there in part takes the
        place of its parts: they are of the same bits.
        """
        there = self._there[span.first : span.end]
        if there.any():
            if self._within_another(span):
                return False
            for known in [known for known in self._values if span.contains(known)]:
                del self._values[known]
        there[:] = True
        while span != self._whole:
            parent = parent_of(span, self._whole.end)
            left, right = halves(parent)
            other = self._values.pop(right if span == left else left, None)
            if other is None:
                break
            value = _sum(value, other) if span == left else _sum(other, value)
            span = parent
        self._values[span] = value
        return True

    def _within_another(self, span: Span) -> bool:
        """Whether a value is there of this node, or of one above it."""
        while span not in self._values and span != self._whole:
            span = parent_of(span, self._whole.end)
        return span in self._values

    def has(self, span: Span) -> bool:
        """Whether a node's value is there, alone or in a sum."""
        return bool(self._there[span.first : span.end].all())

    @property
    def complete(self) -> bool:
        """Whether the sum over all chunks is there."""
        return self._whole in self._values

    @property
    def missing(self) -> list[Span]:
        """Chunks of which nothing has arrived, as the largest gaps, in order."""
        gaps, at = [], 0
        for span in sorted(self._values):
            if span.first > at:
                gaps.append(Span(at, span.first))
            at = span.end
        if at < self._whole.end:
            gaps.append(Span(at, self._whole.end))
        return gaps

    @property
    def nodes(self) -> dict[Span, FlatVector]:
        """The values so far; of a block that is a node, and complete, exactly one."""
        return dict(sorted(self._values.items()))

    def total(self) -> FlatVector:
        """The sum over all chunks. Raises ValueError while any is missing."""
        if self.missing:
            raise ValueError(f"chunks are missing: {self.missing}")
        return self._values[self._whole]


def _sum(left: FlatVector, right: FlatVector) -> FlatVector:
    """left + right, in the memory of one of them where that may be written."""
    for out in (left, right):
        if out.flags.writeable:
            return np.add(left, right, out=out)
    return np.add(left, right)
