"""Words of messages for people."""

from typing import Any

_LONGEST = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """A value in a message, as Python writes it, cut where it is long."""
    try:
        return cut(repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of {value.bit_length():,} bits"


def cut(text: str) -> str:
    """A text in a message: all of it, or its beginning where it is long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: '1 step', '3 steps'; `plural` where that is more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
