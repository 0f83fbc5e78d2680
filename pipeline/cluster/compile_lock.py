"""One process of a machine compiles a program first; the others then find its work in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_PATIENCE = 600.0  # seconds; then one compiles all the same: the other may have been stopped
_QUIET = 10.0  # seconds of waiting until somebody is told


def program_key(*parts: str) -> str:
    """A name for what is compiled: processes with the same parts compile the same."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def first_to_compile(program: str, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock on a program for as long as the block compiles it for the first time.

    Once a block has ended without an error, nobody waits for this program any more: all that come
    later go on at once, side by side. Other programs, and other users, have locks of their own. A
    lock is the operating system's, so it ends with the process that holds it; it is a courtesy, and
    where none can be made the block simply runs. `notice` is told whom one waits for.
    """
    folder = _folder()
    if folder is None or (folder / f"{program}.compiled").exists():
        yield
        return
    lock, holder = FileLock(folder / f"{program}.lock"), folder / f"{program}.holder"
    began, told = time.monotonic(), False
    while time.monotonic() - began < _PATIENCE:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=1.0)
            break
        if (folder / f"{program}.compiled").exists():
            break
        if not told and time.monotonic() - began > _QUIET:
            told = True
            notice(f"process {_read(holder)} compiles the same program first; this one waits")
    try:
        with contextlib.suppress(OSError):
            holder.write_text(str(os.getpid()))
        yield
        with contextlib.suppress(OSError):
            (folder / f"{program}.compiled").touch()
    finally:
        if lock.is_locked:
            lock.release()


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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return "unknown"
