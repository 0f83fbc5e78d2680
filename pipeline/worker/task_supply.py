"""The training tasks of a worker's chunks: sampled in blocks of iterations, and ahead of time.

Supervised tasks do not depend on θ, so a worker samples the next iteration while it would wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.worker.jobs import Cut
from tasks.base import Supervised, TaskBatch

_BLOCK_BYTES = 2**18  # of sampled tasks, per block
_LONGEST_BLOCK = 64  # iterations


class _Chunk(NamedTuple):
    iteration: int
    chunk: int


class TaskSupply:
    """Training tasks of a worker.

    Task i of iteration t has the index t·tasks_per_batch + i, so every worker samples the same.
    """

    def __init__(
        self,
        task: Supervised,
        seed: int,
        cut: Cut,
        iterations: int,
        place: Callable[[TaskBatch], TaskBatch],
    ):
        """`seed` is the run's; `place` moves sampled tasks to the compute device and precision."""
        self._task, self._seed = task, seed
        self._cut, self._iterations = cut, iterations
        self._place = place
        self._block: int | None = None
        self._to_prepare: dict[_Chunk, None] = {}  # in this order
        self._prepared: dict[_Chunk, TaskBatch] = {}

    def take(self, iteration: int, chunk: int) -> TaskBatch:
        """The tasks of a chunk: prepared ones, or else sampled now; each is handed out once."""
        wanted = _Chunk(iteration, chunk)
        if wanted not in self._prepared:
            self._sample(wanted)
        # What was meant for an iteration that is over went to another worker.
        self._to_prepare = {c: None for c in self._to_prepare if c.iteration > iteration}
        if iteration + 1 < self._iterations:
            self._to_prepare[_Chunk(iteration + 1, chunk)] = None
        return self._prepared.pop(wanted)

    def prepare_ahead(self) -> bool:
        """Sample one chunk of the next iteration; False if there is none left to sample.

        The chunks that a worker had in this iteration are the best guess at those of the next.
        """
        if not self._to_prepare:
            return False
        wanted = next(iter(self._to_prepare))
        del self._to_prepare[wanted]
        if wanted not in self._prepared:
            self._sample(wanted)
        return True

    def _sample(self, wanted: _Chunk) -> None:
        """Prepare the tasks of a chunk, and those of the same chunk in the rest of its block.

        Tasks can be so small that a call to sample them costs more than their numbers; then many
        iterations are sampled in one call. Blocks begin at multiples of their length: which tasks
        are sampled together must not depend on who samples when, or the last bits might.
        """
        members = self._cut.members(wanted.chunk)
        length = self._iterations_per_block()
        start = wanted.iteration - wanted.iteration % length
        indices = members + self._cut.per_batch * np.arange(start, start + length)[:, None]
        tasks = self._place(self._task.sample(self._seed, "train", indices.ravel()))
        # What is older went to another worker, or was sampled for iterations that were over.
        self._prepared = {
            c: b for c, b in self._prepared.items() if c.iteration >= wanted.iteration
        }
        for number in range(wanted.iteration - start, length):
            of_it = slice(number * len(members), (number + 1) * len(members))
            self._prepared[_Chunk(start + number, wanted.chunk)] = tasks.select(of_it)

    def _iterations_per_block(self) -> int:
        """As many iterations as fill `_BLOCK_BYTES`, 1 to `_LONGEST_BLOCK`."""
        if self._block is None:
            one = self._task.sample(self._seed, "train", np.arange(1))
            size = self._cut.per_chunk * sum(t.nbytes for examples in one for t in examples)
            self._block = max(1, min(_LONGEST_BLOCK, _BLOCK_BYTES // size))
        return self._block
