"""When the state of a run is written, and what happens where that fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pipeline.config.settings import Checkpointing
from pipeline.runs.checkpoint import CheckpointError, CheckpointStore, TrainingState
from pipeline.runs.claims import Lease
from pipeline.runs.folder import RunFolderError

_TRIES = 3  # failed writes in a row that end a run
_PAUSE = 30.0  # seconds after a failed write until the next one
_PAUSE_AT_END = 1.0


class Saver:
    """Writes the checkpoints of one run, and outlives a store that fails now and then.

    A state that is the best on validation and could not be written is kept until it can be.
    """

    def __init__(
        self,
        store: CheckpointStore,
        settings: Checkpointing,
        notice: Callable[[str], None],
        saved_at: int | None,
        lease: Lease | None,
    ):
        """`saved_at` is the iteration of the newest checkpoint, None where there is none; `notice`
        is told of writes that failed. With a `lease`, nothing is written once another has it."""
        self.saved_at = saved_at
        self._store, self._notice, self._lease = store, notice, lease
        self._seconds = 60 * settings.minutes if settings.minutes else math.inf
        self._last = time.monotonic()
        self._failures = 0
        self._best: TrainingState | None = None

    def overdue(self) -> bool:
        """Whether the clock asks for a checkpoint: the last one is old, or could not be written."""
        patience = _PAUSE if self._failures else self._seconds
        return time.monotonic() - self._last >= patience

    def save(self, state: TrainingState, *, best: bool) -> None:
        """Write a checkpoint, unless a write failed a moment ago.

        A failed write is told, and the next one is tried soon. Raises CheckpointError if it is the
        third in a row, or if the run has no checkpoint yet; RunFolderError if another writes now.
        """
        if best:
            self._best = state
        if self._failures and not self.overdue():
            return
        try:
            self._write(state)
        except CheckpointError as error:
            self._failures, self._last = self._failures + 1, time.monotonic()
            if self.saved_at is None or self._failures == _TRIES:
                raise
            self._notice(
                f"iteration {state.iteration:,}: {error}. Training goes on, and a checkpoint is "
                f"tried again in {_PAUSE:.0f} s"
            )

    def save_at_end(self, state: TrainingState) -> str:
        """Write the last state of a run that ends; what went wrong in words, or ''."""
        for attempt in range(_TRIES):
            try:
                self._write(state)
            except CheckpointError as error:
                if attempt == _TRIES - 1:
                    return f"iteration {state.iteration:,} is not saved: {error}"
                time.sleep(_PAUSE_AT_END)
            except RunFolderError as error:
                return f"iteration {state.iteration:,} is not saved: {error}"
            else:
                break
        return ""

    def _write(self, state: TrainingState) -> None:
        """Write a state, and before it the best one that waits. Raises what `save` raises."""
        if self._lease is not None:
            self._lease.check()
        waiting = self._best
        if waiting is not None and waiting.iteration < state.iteration:
            self._store.save(waiting, best=True)
            self._best = None
        self._store.save(state, best=self._best is not None)
        self._best = None
        self.saved_at, self._last, self._failures = state.iteration, time.monotonic(), 0
