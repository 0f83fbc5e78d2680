"""What a round needs and takes in: pieces lost, divided, given twice, answered late; no Ray."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cluster.rounds import ChunkSum, JobList, Piece, block_size
from pipeline.worker.jobs import CandidateJob, EvaluationJob, GradientJob, JobResult
from pipeline.worker.tree import Span, TreeSum, blocks_of

COUNT = 13
VECTORS = [
    (np.random.default_rng(c).standard_normal(5) * 10.0 ** (c % 7 - 3)).astype(np.float32)
    for c in range(COUNT)
]


def answer(piece: Piece) -> JobResult:
    """What an honest worker returns for a block: chunk c has one task, with the loss c."""
    job = piece.job
    assert isinstance(job, GradientJob)
    tree = TreeSum(COUNT)
    for chunk in range(*job.chunks):
        tree.add(Span(chunk, chunk + 1), VECTORS[chunk].copy())
    ((_, vector),) = tree.nodes.items()
    losses = np.arange(*job.chunks, dtype=np.float32)
    finite = tuple(chunk != 3 for chunk in range(*job.chunks))
    return JobResult(job, len(losses), vector, {"query_loss": losses}, 0.25, 0.5, finite)


def gradients(size: int = 4) -> ChunkSum:
    blocks = [(block, None) for block in blocks_of(COUNT, size)]
    return ChunkSum(lambda chunks: GradientJob(0, chunks), COUNT, blocks)


def undisturbed() -> np.ndarray:
    round = gradients(16)
    (piece,) = round.waiting
    round.accept(piece, answer(piece), 0)
    vector = round.total().gradient
    assert vector is not None
    return vector


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8, 16]))
def test_losses_and_duplicates_change_nothing(seed: int, size: int) -> None:
    """Workers die, hang and answer late, in any order; the bits are those of a quiet round."""
    draw = random.Random(seed)
    round = gradients(size)
    late: list[Piece] = []
    while not round.done:
        piece = round.waiting.popleft()
        if not round.needs(piece):
            continue
        event = draw.random()
        if event < 0.3:  # the worker dies
            round.waiting.extend(round.parts(piece))
        elif event < 0.5:  # it is slow: others get the same
            late.append(piece)
            round.waiting.extend(round.parts(piece))
        else:
            round.accept(piece, answer(piece), draw.randrange(4))
        if late and draw.random() < 0.5:
            slow = late.pop(draw.randrange(len(late)))
            round.accept(slow, answer(slow), draw.randrange(4))
    total = round.total()
    for slow in late:
        assert not round.needs(slow)
        round.accept(slow, answer(slow), 0)
    for found in (total, round.total()):
        assert found.gradient is not None
        assert np.array_equal(found.gradient, undisturbed())
        assert np.array_equal(found.metrics["query_loss"], np.arange(COUNT))
        assert found.finite == tuple(chunk != 3 for chunk in range(COUNT))
        assert found.num_tasks == COUNT
    blocks = [span for span, _ in round.answered_by()]
    assert [chunk for span in blocks for chunk in range(*span)] == list(range(COUNT))


def test_time_is_that_of_the_busiest_worker() -> None:
    round = gradients(4)  # blocks of 4, 4, 4 and 1
    for worker, piece in zip((1, 1, 2, 2), list(round.waiting), strict=True):
        round.accept(piece, answer(piece), worker)
    total = round.total()
    assert (total.seconds_sampling, total.seconds_computing) == (1.0, 2.0)
    assert total.busiest_seconds == 1.5


def test_answers_that_are_metrics_alone_have_no_vector() -> None:
    round = ChunkSum(lambda chunks: CandidateJob(0, chunks), 3, [(Span(0, 3), 7)])
    (piece,) = round.waiting
    assert piece.held_by == 7
    metrics = {"kl": np.ones(3)}
    round.accept(piece, JobResult(piece.job, 3, None, metrics, 0.0, 0.1, (True,) * 3), 7)
    assert round.total().gradient is None
    assert round.total().metrics["kl"].sum() == 3


def test_what_was_known_of_a_piece_is_known_of_its_parts() -> None:
    """A chunk that ends processes is found, by halves, and then counted."""
    round = gradients(16)
    piece = Piece(GradientJob(0, Span(0, COUNT)), deaths=2, refused_by=3)
    halves = round.parts(piece)
    assert [part.job for part in halves] == [
        GradientJob(0, Span(0, 8)),
        GradientJob(0, Span(8, 13)),
    ]
    assert all((part.deaths, part.refused_by) == (2, 3) for part in halves)
    single = Piece(GradientJob(0, Span(2, 3)))
    assert round.parts(single) == [single]


def test_separate_jobs_are_answered_in_their_order() -> None:
    jobs = [EvaluationJob("test", first, 2, (0, 1)) for first in (0, 2, 4)]
    round = JobList(jobs)
    pieces = list(round.waiting)
    for piece in (pieces[2], pieces[0], pieces[0], pieces[1]):
        assert not round.done
        assert round.parts(piece) == [piece]
        round.accept(piece, JobResult(piece.job, 2, None, {}, 0.0, 0.0), 0)
    assert round.done
    again = replace(pieces[1], held_by=None)  # given out a second time, as what is overdue is
    assert not round.needs(again)
    round.accept(again, JobResult(again.job, 9, None, {}, 0.0, 0.0), 1)
    assert [result.num_tasks for result in round.answers()] == [2, 2, 2]
    assert [result.job for result in round.answers()] == jobs


@pytest.mark.parametrize(
    ("chunks", "workers", "seconds", "size"),
    [
        (16, 2, None, 8),  # one call for each
        (16, 2, 0.01, 8),
        (16, 2, 10.0, 1),  # long chunks one by one: who is early helps out
        (16, 3, None, 2),  # 6, 6 and 4 chunks rather than 8, 4 and 4
        (4, 4, None, 1),
        (2, 8, None, 1),
        (1, 1, None, 1),
        (64, 1, None, 64),
        (16, 0, None, 16),  # nobody is there yet
    ],
)
def test_size_of_blocks(chunks: int, workers: int, seconds: float | None, size: int) -> None:
    assert block_size(chunks, workers, seconds) == size


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4]))
def test_vectors_may_come_as_the_sums_of_relays(seed: int, size: int) -> None:
    """Two relays add up what their workers found, in any portions; some are lost with all that they
    had, some pieces are computed at both. Answers come beside the sums; the bits are the same."""
    draw = random.Random(seed)
    round = gradients(size)
    relays: list[list[Piece]] = [[], []]
    while not round.done:
        if round.waiting:
            piece = round.waiting.popleft()
            if draw.random() < 0.2:  # overdue: it is given out again
                round.waiting.extend(round.parts(piece))
            relays[draw.randrange(2)].append(piece)
        relay = relays[draw.randrange(2)]
        pieces, relay[:] = list(relay), []
        if draw.random() < 0.3:  # it is lost
            round.waiting.extend(p for piece in pieces for p in round.parts(piece))
            continue
        sums = TreeSum(COUNT)
        for piece in pieces:
            vector = answer(piece).gradient
            assert vector is not None
            sums.add(piece.job.chunks, vector)
        for span, vector in sums.nodes.items():
            round.add(span, vector)
        for piece in pieces:
            round.accept(piece, answer(piece).with_gradient(None), 0, apart=True)
    total = round.total()
    assert total.gradient is not None
    assert np.array_equal(total.gradient, undisturbed())
    assert np.array_equal(total.metrics["query_loss"], np.arange(COUNT))
