"""Work that can be stopped and taken up again: what `maml train` and `maml search` share."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from pipeline.cli.exit_codes import show_tracebacks
from pipeline.cli.next_commands import typed

if TYPE_CHECKING:
    from pipeline.cli.console import LiveLine
    from pipeline.config.experiment import Experiment

T = TypeVar("T")


def load_new_or_resumed(
    experiment: str,
    overrides: Sequence[str],
    resume: Path | None,
    load_to_resume: Callable[[Path, str, Sequence[str]], Experiment],
) -> tuple[Experiment, Path]:
    """The experiment, and the absolute folder that its results go to.

    Without `resume` the experiment is read by its name and the folder is a new one; otherwise the
    folder is `resume`, and `load_to_resume(folder, experiment, overrides)` reads what it holds.
    Raises ConfigError, and what `load_to_resume` raises.
    """
    from pipeline.config.loading import load, new_run_dir

    if resume is None:
        loaded = load(experiment, overrides)
        return loaded, new_run_dir(loaded)
    folder = resume.expanduser().absolute()
    return load_to_resume(folder, experiment, overrides), folder


def carry_out(
    work: Callable[..., T],
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool,
    watcher: LiveLine,
    command: str,
    on_stop: str,
) -> T:
    """Run `work` on the experiment until it is done, and return what it returns.

    The first Ctrl-C or SIGTERM prints `on_stop` and lets the work save its state. Where the work
    ends early, the last line shows `command --resume FOLDER`. Raises Interrupted, TrainingFailed,
    and what `work` raises before it has started.
    """
    stop = StopRequest(watcher, on_stop)
    with resumable(watcher, f"{command} --resume {typed(folder)}", resume):
        return work(
            experiment,
            folder,
            resume=resume,
            watcher=watcher,
            should_stop=lambda: stop.requested,
        )


class StopRequest:
    """Handles Ctrl-C and SIGTERM: the first one asks for a checkpoint, the second ends at once."""

    def __init__(self, watcher: LiveLine, message: str):
        """`message` is shown at the first signal, if `watcher.training` says that there is a state
        to be saved."""
        self.requested = False
        self._watcher = watcher
        self._message = message
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._watcher.training:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self._message}\n".encode())


@contextlib.contextmanager
def resumable(watcher: LiveLine, command: str, resumed: bool = False) -> Iterator[None]:
    """Notes on an error by which command the work goes on, if it ends early after it has started.

    Before the start a KeyboardInterrupt becomes Interrupted, and errors pass unchanged. Later ones
    become TrainingFailed, except Interrupted and KeyboardInterrupt, and with --debug all of them
    pass. `resumed`: the work had begun before.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        watcher.stop()
        from pipeline.training.endings import Diverged, Interrupted, TrainingFailed

        if not watcher.has_started:
            if isinstance(error, KeyboardInterrupt):
                what = "it had not gone on yet" if resumed else "nothing was trained yet"
                raise Interrupted(f"interrupted: {what}") from None
            raise
        if not isinstance(error, Diverged):
            error.add_note(f"to continue: {command}")
        if show_tracebacks() or isinstance(error, Interrupted | TrainingFailed | KeyboardInterrupt):
            raise
        # What would be bad input before the start is a failure now.
        failed = TrainingFailed(f"{type(error).__name__}: {error} (--debug shows where)")
        failed.__notes__ = error.__notes__
        raise failed from error
