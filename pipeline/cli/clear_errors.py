"""A command whose errors about its options are in plain words and name what was meant."""

from __future__ import annotations

import difflib
import re
from typing import Any

import typer
from typer.core import TyperCommand

_PREFIX = "Value error, "  # pydantic's, which checks options for typer
_CHOICE = re.compile(r"'(?P<given>[^']*)' is not one of (?P<there>.*)\.$")


class ClearCommand(TyperCommand):
    """`maml COMMAND`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; a value that is refused is refused clearly."""
        try:
            return super().parse_args(ctx, args)
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
