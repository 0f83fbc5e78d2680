"""The training tasks of a worker are the same whoever samples them, and however far ahead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.worker import task_supply
from pipeline.worker.jobs import Cut, default_tasks_per_chunk
from pipeline.worker.task_supply import TaskSupply
from tasks.base import TaskBatch
from tasks.sinusoid import Sinusoid

SEED, ITERATIONS = 3, 5
CUT = Cut(per_batch=10, per_chunk=4)


@dataclass(frozen=True, kw_only=True)
class Counted(Sinusoid):
    """Remembers how many tasks each call sampled."""

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        calls.append(len(indices))
        return super().sample(seed, split, indices)


calls: list[int] = []


@pytest.fixture
def supply(monkeypatch: pytest.MonkeyPatch) -> TaskSupply:
    """One iteration per block, so that each chunk is a call."""
    monkeypatch.setattr(task_supply, "_LONGEST_BLOCK", 1)
    made = supply_of()
    made.take(0, 2)  # the size of a block is found by sampling a task once
    calls.clear()
    return made


def supply_of() -> TaskSupply:
    task = Counted(shots=5, queries=5)
    return TaskSupply(task, SEED, CUT, ITERATIONS, lambda batch: batch)


def expected(iteration: int, chunk: int) -> TaskBatch:
    indices = iteration * CUT.per_batch + CUT.members(chunk)
    return Sinusoid(shots=5, queries=5).sample(SEED, "train", indices)


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(
        torch.equal(part, wanted)
        for parts, those in zip(one, other, strict=True)
        for part, wanted in zip(parts, those, strict=True)
    )


@pytest.mark.parametrize("longest", [1, 2, 64])
def test_tasks_do_not_depend_on_blocks_or_order(
    monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(task_supply, "_LONGEST_BLOCK", longest)
    supply = supply_of()
    for iteration, chunk in [(0, 0), (0, 2), (1, 0), (3, 1), (4, 2), (2, 0)]:
        assert same(supply.take(iteration, chunk), expected(iteration, chunk))
        supply.prepare_ahead()


def test_small_tasks_are_sampled_many_iterations_at_once() -> None:
    calls.clear()
    supply = supply_of()
    for iteration in range(ITERATIONS):
        supply.take(iteration, 0)
    size, *sampled = calls
    assert size == 1  # one task, to see how large it is
    assert sampled == [64 * CUT.per_chunk]


def test_large_tasks_are_sampled_one_iteration_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_supply, "_BLOCK_BYTES", 1)
    calls.clear()
    supply = supply_of()
    supply.take(0, 0)
    supply.take(1, 0)
    assert calls == [1, CUT.per_chunk, CUT.per_chunk]


def test_idle_time_prepares_the_same_chunk_of_the_next_iteration(supply: TaskSupply) -> None:
    assert same(supply.take(0, 1), expected(0, 1))
    calls.clear()
    while supply.prepare_ahead():
        pass
    assert calls == [2, 4]  # of chunks 2 and 1
    assert same(supply.take(1, 1), expected(1, 1))
    assert calls == [2, 4]  # it was there


def test_nothing_is_prepared_without_a_guess_or_beyond_the_last_iteration(
    supply: TaskSupply,
) -> None:
    assert not supply_of().prepare_ahead()
    supply.take(ITERATIONS - 1, 0)
    assert not supply.prepare_ahead()


def test_what_was_meant_for_an_iteration_that_is_over_is_forgotten(supply: TaskSupply) -> None:
    supply.take(0, 1)
    supply.take(2, 0)  # other workers did the chunks of iteration 1
    calls.clear()
    while supply.prepare_ahead():
        pass
    assert calls == [CUT.per_chunk]  # chunk 0 of iteration 3 alone


def test_tasks_are_placed_where_they_are_computed() -> None:
    task = Sinusoid(shots=5, queries=5)
    supply = TaskSupply(task, SEED, CUT, ITERATIONS, lambda b: b.to("cpu", torch.float16))
    assert supply.take(0, 0).support.x.dtype == torch.float16


# How a meta-batch is cut.


@pytest.mark.parametrize(("per_batch", "per_chunk"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_chunks_are_the_meta_batch(per_batch: int, per_chunk: int) -> None:
    cut = Cut(per_batch, per_chunk)
    members = [cut.members(chunk) for chunk in range(cut.num_chunks)]
    assert np.concatenate(members).tolist() == list(range(per_batch))
    assert all(len(each) == per_chunk for each in members[:-1])
    sizes = [len(members[chunk]) for chunk in cut.of_every_size]
    assert sizes == list(dict.fromkeys(map(len, members)))


@pytest.mark.parametrize(
    ("num_parameters", "tasks", "size", "compiled"),
    [
        (19_999, 25, 25, 25),
        (20_000, 25, 7, 2),
        (20_000, 64, 16, 4),
        (20_000, 8, 2, 2),
        (20_000, 3, 1, 1),
    ],
    ids=["small model", "25 tasks", "64 tasks", "8 tasks", "3 tasks"],
)
def test_large_models_are_cut_in_four_or_sixteen(
    num_parameters: int, tasks: int, size: int, compiled: int
) -> None:
    assert default_tasks_per_chunk(num_parameters, tasks, compile=False) == size
    assert default_tasks_per_chunk(num_parameters, tasks, compile=True) == compiled
