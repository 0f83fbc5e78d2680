"""Commands whose errors about their options are in plain words and name what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_PREFIX = "Value error, "  # pydantic's, which checks options for typer
_CHOICE = re.compile(r"'(?P<given>[^']*)' is not one of (?P<there>.*)\.$")


class ClearTyper(typer.Typer):
    """`maml`, or a group such as `maml runs`: its options and those of all its commands are
    refused clearly."""

    def __init__(self, **settings: Any):
        """Take what a `typer.Typer` takes."""
        super().__init__(cls=ClearGroup, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Add the decorated function as a command, as `typer.Typer` does."""
        return super().command(name, cls=ClearCommand, **settings)


class ClearCommand(TyperCommand):
    """`maml COMMAND`, `maml GROUP COMMAND`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; a value that is refused is refused clearly."""
        with _refusing_clearly():
            return super().parse_args(ctx, args)


class ClearGroup(TyperGroup):
    """`maml`, `maml GROUP`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments of the group itself, as `ClearCommand` does."""
        with _refusing_clearly():
            return super().parse_args(ctx, args)


@contextmanager
def _refusing_clearly() -> Iterator[None]:
    """Make the message of a refused value clear."""
    try:
        yield
    except typer.BadParameter as error:
        error.message = clear(error.message)
        raise


def clear(message: str) -> str:
    """The message without pydantic's prefix; of a mistyped choice, with the one that is like it."""
    message = message.removeprefix(_PREFIX)
    found = _CHOICE.search(message)
    close = found and difflib.get_close_matches(
        found["given"], re.findall(r"'([^']*)'", found["there"]), 1
    )
    return f"{message.removesuffix('.')}; did you mean {close[0]}?" if close else message
