"""Work that can be stopped and taken up again: what `maml train` and `maml search` share."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pipeline.cli.exit_codes import show_tracebacks
from pipeline.cli.next_commands import typed

if TYPE_CHECKING:
    from pipeline.cli.console import LiveLine
    from pipeline.config.experiment import Experiment

T = TypeVar("T")


class Kind(NamedTuple):
    """What is taken up again: a run or a search."""

    load_to_resume: Callable[[Path, Sequence[str]], Experiment]
    """Reads what a folder holds, with overrides."""
    to_continue: Callable[[Experiment], Path | None]
    """The folder with which `--resume auto` goes on, if there is one."""
    continues_elsewhere: Callable[[Experiment], bool] = lambda experiment: False
    """Whether `checkpoint.uri` holds a run with which it goes on though there is no such folder."""
    load_from_uri: Callable[[str, Sequence[str]], Experiment] | None = None
    """Reads what the checkpoints at a URI say, with overrides; None: it is in folders alone."""


class Request(NamedTuple):
    """What is to be done, and where."""

    experiment: Experiment
    folder: Path
    """Absolute."""
    resume: bool


@contextlib.contextmanager
def new_or_resumed(
    kind: Kind, name: str | None, overrides: Sequence[str], resume: str | None
) -> Iterator[Request]:
    """What `[NAME] [OVERRIDES] [--resume FOLDER|URI|auto]` asks for.

    Without `resume` the experiment is read by its name and the folder is a new one, which goes
    again if nothing is written to it. A folder to be resumed says all that a name would; so do
    checkpoints at a URI, from which a run goes on in a new folder. With `auto`, the named
    experiment goes on where there is something to go on with, and else begins.

    Raises ConfigError, RunFolderError, and what the functions of `kind` raise.
    """
    from pipeline.config.loading import ConfigError, absolute_path, load
    from pipeline.runs.claims import new_folder
    from pipeline.runs.continuing import AUTO

    if resume not in (None, AUTO):
        words = [*([name] if name else []), *overrides]  # the first word stands where names do
        if "://" in resume:
            if kind.load_from_uri is None:
                raise ConfigError("", [f"--resume: {resume} is no folder, from which this goes on"])
            experiment = kind.load_from_uri(resume, words)
            with new_folder(experiment) as folder:
                yield Request(experiment, folder, True)
            return
        folder = absolute_path(resume)
        yield Request(kind.load_to_resume(folder, words), folder, True)
        return
    if name is None:
        raise ConfigError("", ["name an experiment (`maml config list`), or --resume a folder"])
    experiment = load(name, overrides)
    found = kind.to_continue(experiment) if resume == AUTO else None
    if found is not None:
        yield Request(experiment, found, True)
        return
    elsewhere = resume == AUTO and kind.continues_elsewhere(experiment)
    with new_folder(experiment) as folder:
        yield Request(experiment, folder, elsewhere)


def carry_out(
    work: Callable[..., T],
    request: Request,
    *,
    watcher: LiveLine,
    command: str,
    on_stop: str,
) -> T:
    """Run `work` on the experiment until it is done, and return what it returns.

    The first Ctrl-C, SIGTERM or SIGHUP prints `on_stop` and lets the work save its state. Where the
    work ends early, the last line shows `command --resume FOLDER`. Raises Interrupted,
    TrainingFailed, and what `work` raises before it has started.
    """
    stop = StopRequest(watcher, on_stop)
    with resumable(watcher, f"{command} --resume {typed(request.folder)}", request.resume):
        return work(
            request.experiment,
            request.folder,
            resume=request.resume,
            watcher=watcher,
            should_stop=lambda: stop.requested,
        )


class StopRequest:
    """Handles Ctrl-C, SIGTERM and SIGHUP: the first one asks for a checkpoint, the second ends at
    once."""

    def __init__(self, watcher: LiveLine, message: str):
        """`message` is shown at the first signal, if `watcher.training` says that there is a state
        to be saved."""
        self.requested = False
        self._watcher = watcher
        self._message = message
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._forget_the_terminal()
        if self.requested or not self._watcher.training:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self._message}\n".encode())

    def _forget_the_terminal(self) -> None:
        """It is gone: what would be printed there goes nowhere, instead of being an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


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
