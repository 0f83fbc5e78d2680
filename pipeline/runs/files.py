"""Small local files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from tasks.errors import ReportedError

SHARED = "MAML_SHARED_RUNS"
"""Environment variable: 1 for folders of runs that others may read, as the umask says."""


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


def folder_mode() -> int:
    """The permissions of a new folder, before the umask."""
    return 0o777 if os.environ.get(SHARED) == "1" else 0o700


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, for their user alone; one that is there stays as it is.

    With MAML_SHARED_RUNS=1 they get the permissions that the umask says. Raises OSError.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(folder_mode(), exist_ok=True)
    if not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


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
