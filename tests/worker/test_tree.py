"""The tree of sums: the same bits for any blocks, any order, any losses and duplicates."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.tree import Span, TreeSum, blocks_of, halves, parent_of


def leaves(count: int, seed: int = 0) -> list[FlatVector]:
    """Vectors of very different sizes: every order of additions gives other last bits."""
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.uniform(-4, 4, (count, 7))
    return list((draw.standard_normal((count, 7)) * sizes).astype(np.float32))


def value_of(span: Span, vectors: list[FlatVector]) -> FlatVector:
    """The definition, as it is written: left + right, down to single chunks."""
    if span.size == 1:
        return vectors[span.first].copy()
    left, right = halves(span)
    return value_of(left, vectors) + value_of(right, vectors)


def partition(count: int, draw: random.Random) -> list[Span]:
    """Nodes that together stand for all chunks, each once; split at random."""
    found, to_split = [], [Span(0, count)]
    while to_split:
        span = to_split.pop()
        if span.size > 1 and draw.random() < 0.7:
            to_split += halves(span)
        else:
            found.append(span)
    return found


def test_the_tree_of_five_chunks() -> None:
    vectors = leaves(5)
    a, b, c, d, e = vectors
    assert np.array_equal(value_of(Span(0, 5), vectors), ((a + b) + (c + d)) + e)


def test_the_order_matters_at_all() -> None:
    """Otherwise the tests below would hold for any sum."""
    vectors = leaves(16)
    one_by_one = vectors[0].copy()
    for vector in vectors[1:]:
        one_by_one += vector
    assert not np.array_equal(one_by_one, value_of(Span(0, 16), vectors))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32))
def test_any_partition_in_any_order_with_duplicates_gives_the_same_bits(
    count: int, seed: int
) -> None:
    draw = random.Random(seed)
    vectors = leaves(count, seed)
    expected = value_of(Span(0, count), vectors)
    answers = partition(count, draw)
    late = [span for _ in range(draw.randrange(4)) for span in partition(count, draw)]
    answers += draw.sample(late, draw.randrange(len(late) + 1))
    draw.shuffle(answers)
    tree = TreeSum(count)
    for span in answers:
        value = value_of(span, vectors)
        if draw.random() < 0.5:
            value.setflags(write=False)  # as what comes from an object store
        before = value.copy()
        tree.add(span, value)
        if not value.flags.writeable:
            assert np.array_equal(value, before)
    assert not tree.missing
    assert np.array_equal(tree.total(), expected)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32))
def test_what_is_lost_is_missing_until_it_is_computed_again(count: int, seed: int) -> None:
    draw = random.Random(seed)
    vectors = leaves(count, seed)
    tree = TreeSum(count)
    lost = []
    for span in partition(count, draw):
        if draw.random() < 0.4:
            lost.append(span)
        else:
            assert tree.add(span, value_of(span, vectors))
    missing = {chunk for gap in tree.missing for chunk in range(*gap)}
    assert missing == {chunk for span in lost for chunk in range(*span)}
    if lost:
        with pytest.raises(ValueError, match="chunks are missing"):
            tree.total()
    for span in lost:
        assert tree.add(span, value_of(span, vectors))
    assert np.array_equal(tree.total(), value_of(Span(0, count), vectors))


@given(st.integers(1, 200), st.integers(0, 7))
def test_a_worker_returns_one_vector_per_block(count: int, power: int) -> None:
    """Blocks are nodes, so what their chunks add up to is a single vector."""
    vectors = leaves(count)
    blocks = blocks_of(count, 2**power)
    assert [chunk for span in blocks for chunk in range(*span)] == list(range(count))
    for block in blocks:
        tree = TreeSum(count)
        for chunk in range(*block):
            tree.add(Span(chunk, chunk + 1), vectors[chunk].copy())
        ((span, value),) = tree.nodes.items()
        assert span == block
        assert np.array_equal(value, value_of(block, vectors))


@given(st.integers(2, 300), st.integers(0, 2**32))
def test_halves_and_parents_agree(count: int, seed: int) -> None:
    draw = random.Random(seed)
    span = Span(0, count)
    while span.size > 1:
        left, right = halves(span)
        assert (left.first, left.end, right.end) == (span.first, right.first, span.end)
        assert parent_of(left, count) == parent_of(right, count) == span
        span = draw.choice((left, right))


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1, 2, 4, \.\.\. chunks, got 3"):
        blocks_of(8, 3)
    with pytest.raises(ValueError, match="no halves"):
        halves(Span(2, 3))
    with pytest.raises(ValueError, match="at least one chunk"):
        TreeSum(0)


def test_a_late_duplicate_changes_nothing() -> None:
    vectors = leaves(4)
    tree = TreeSum(4)
    assert tree.add(Span(0, 2), value_of(Span(0, 2), vectors))
    assert not tree.add(Span(1, 2), np.full(7, np.nan, np.float32)), "it lies within"
    assert not tree.add(Span(0, 2), np.full(7, np.nan, np.float32)), "it is the same"
    assert tree.add(Span(2, 4), value_of(Span(2, 4), vectors))
    assert not tree.add(Span(2, 4), np.full(7, np.nan, np.float32)), "it is in the sum"
    assert np.array_equal(tree.total(), value_of(Span(0, 4), vectors))
