"""Small local files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from tasks.errors import ReportedError


class WriteError(ReportedError):
    """A file of a run or a search cannot be written; `str()` names it and says what to do."""


def unique_suffix() -> str:
    """Eight hex digits that no other writer of the same folder has."""
    return uuid.uuid4().hex[:8]


def sync(path: str | Path) -> None:
    """Return once the content of a file, or the names in a folder, would survive a loss of power.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a small local file so that a reader sees all of it or what was there before.

    Raises WriteError.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{unique_suffix()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error}; choose another folder with run_dir"
        ) from error
