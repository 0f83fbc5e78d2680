"""One process of a machine compiles a program first; the others then find its work in the cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_PATIENCE = 600.0  # seconds; then one compiles all the same: the other may have been stopped
_QUIET = 10.0  # seconds of waiting until somebody is told
_TICK = 0.2  # seconds between looks at whether the other is done


def program_key(*parts: str) -> str:
    """A file name for a program; equal for processes with equal `parts`."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def first_to_compile(program: str, notice: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time run the block for a program, until a first one has ended without an
    error; from then on nobody waits.

    Other programs, and other users, have locks of their own. A lock is the operating system's, so
    it ends with the process that holds it; it is a courtesy, and where none can be made the block
    simply runs. After ten seconds of waiting `notice` gets a line with the holder's process id.
    """
    folder = _folder()
    if folder is None or (folder / f"{program}.compiled").exists():
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context((folder / f"{program}.lock").open("a+"))
            _wait_for_turn(file, folder / f"{program}.compiled", notice)
        except OSError:
            pass  # a file system without locks, or a full one
        yield  # the lock ends with the file
    with contextlib.suppress(OSError):
        (folder / f"{program}.compiled").touch()


def _wait_for_turn(file: IO[str], compiled: Path, notice: Callable[[str], None]) -> None:
    """Return with the lock on `file`, or once `compiled` is there, or when patience ends.

    Raises OSError where there are no locks.
    """
    began, told = time.monotonic(), False
    while time.monotonic() - began < _PATIENCE and not compiled.exists():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told and time.monotonic() - began > _QUIET:
                told = True
                file.seek(0)
                notice(f"process {file.read()} compiles the same program first; this one waits")
            time.sleep(_TICK)
            continue
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return


def _folder() -> Path | None:
    """A folder in the cache of compiled programs, so that notes are gone when the programs are;
    None where it belongs to somebody else, or none can be made."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        folder = Path(cache_dir()) / "maml"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid()
    except OSError:
        return None
    return folder if mine and os.access(folder, os.W_OK) else None
