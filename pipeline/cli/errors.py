"""Errors of the command line: one clear message and an exit code instead of a traceback; Ctrl-C.

Exit codes: 0 done; 1 the run failed; 2 the input was wrong, nothing was started; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.markup import escape

from tasks.errors import ReportedError

DEBUG = "MAML_DEBUG"
"""Environment variable that `--debug` sets."""


def show_tracebacks() -> bool:
    """Whether errors go through to Python's own report."""
    return bool(os.environ.get(DEBUG))


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command with a message and an exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            # The reader of our output has gone (`maml ... | head`): nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if show_tracebacks():
                raise
            _fail(*_described(error))

    return run


class StopRequest:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint, the second ends at once."""

    def __init__(self, watcher: Any, message: str):
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
def resumable(watcher: Any, command: str) -> Iterator[None]:
    """Around work that can be taken up again: if it ends early, says by which command."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        watcher.stop()
        if not watcher.has_started:
            raise
        from pipeline.training.endings import Diverged, Interrupted, TrainingFailed

        if not isinstance(error, Diverged):
            watcher.say(f"to continue: {command}")
        if show_tracebacks() or isinstance(error, Interrupted | TrainingFailed | KeyboardInterrupt):
            raise
        # What would be bad input before the start is a failure now.
        raise TrainingFailed(f"{type(error).__name__}: {error} (--debug shows where)") from error


def typed(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def ui_command(experiment: Any, run_dir: Path) -> str:
    """Where to look at a run in MLflow."""
    from pipeline.config.loading import runs_folder
    from pipeline.runs.tracker import resolve_uri

    uri = resolve_uri(experiment.tracking.uri, run_dir)
    if uri.startswith(("http://", "https://")):
        return uri
    default = resolve_uri(None, runs_folder() / "any")
    return "maml ui" if uri == default else f"maml ui --uri {uri}"


def _described(error: Exception) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    if isinstance(error, ReportedError):
        return str(error), error.exit_code
    if isinstance(error, ValueError):
        return str(error), 2
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _fail(message: str, code: int) -> None:
    from pipeline.cli.console import err

    said = (
        f"[yellow]{escape(message)}[/]" if code == 130 else f"[bold red]error:[/] {escape(message)}"
    )
    err.print(said, soft_wrap=True)
    raise typer.Exit(code)
