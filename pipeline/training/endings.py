"""How a run may end before it is done."""

from __future__ import annotations


class TrainingFailed(Exception):
    """The run cannot go on; `str()` says why and what to do. A checkpoint holds what it has."""


class Diverged(TrainingFailed):
    """Numbers that are not finite ended the run; continued, it would end in the same way."""


class Interrupted(Exception):
    """The run was asked to stop, and has: its state is in a checkpoint."""


Interruption = (Interrupted, KeyboardInterrupt)
