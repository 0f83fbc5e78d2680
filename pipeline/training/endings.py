"""The ways in which a run ends before it is done: being asked to, and exceptions."""

from __future__ import annotations

from tasks.errors import INTERRUPTED, ReportedError


def never() -> bool:
    """The default of `should_stop`: nobody asks the work to stop."""
    return False


class TrainingFailed(ReportedError):
    """The run cannot go on; the message says why and what to do. Its state is in a checkpoint."""

    exit_code = 1


class Diverged(TrainingFailed):
    """Too many gradients in a row were not finite; continued, the run would end in the same way."""


class Interrupted(ReportedError):
    """The run was asked to stop and has stopped. Its state is in a checkpoint."""

    exit_code = INTERRUPTED


Interruption = (Interrupted, KeyboardInterrupt)
"""The exceptions by which a person's stop ends a run; for `except`."""
