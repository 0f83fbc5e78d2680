"""Errors of the command line: one clear message and an exit code instead of a traceback.

Exit codes: 0 done; 1 the run failed; 2 the input was wrong, nothing was started; 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.markup import escape

from tasks.credentials import redacted
from tasks.errors import INTERRUPTED, ReportedError

DEBUG = "MAML_DEBUG"
"""Environment variable that `--debug` sets."""


def show_tracebacks() -> bool:
    """Whether --debug was given: errors then end with Python's traceback."""
    return bool(os.environ.get(DEBUG))


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: an error in it ends the process with a message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as error:
            _fail("interrupted", INTERRUPTED, _notes(error))
        except BrokenPipeError:
            # The reader of our output has gone (`maml ... | head`): nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if show_tracebacks():
                sys.stderr.write(redacted("".join(traceback.format_exception(error))))
                raise typer.Exit(1) from None
            _fail(*_described(error), _notes(error))

    return run


def _described(error: Exception) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    if isinstance(error, ReportedError):
        return str(error), error.exit_code
    if isinstance(error, ValueError):
        return str(error), 2
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way: lines for the person who reads its message."""
    return list(getattr(error, "__notes__", []))


def _fail(message: str, code: int, notes: Sequence[str] = ()) -> None:
    """Print the message, yellow for an interruption, then the notes; end the command with the exit
    code."""
    from pipeline.cli.console import err

    text = escape(redacted(message))
    said = f"[yellow]{text}[/]" if code == INTERRUPTED else f"[bold red]error:[/] {text}"
    err.print(said, soft_wrap=True)
    for note in notes:
        err.print(redacted(note), markup=False, soft_wrap=True)
    raise typer.Exit(code)
