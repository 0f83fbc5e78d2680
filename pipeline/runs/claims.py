"""Who may write where: a new folder belongs to whoever makes it, and a folder has one writer.

A writer leaves a lease in the folder, FOLDER/.lease: who it is and since when, as JSON. Its
modification time is the writer's last sign of life, given every few seconds. On the writer's own
machine its process says whether it lives; elsewhere its signs of life do.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pipeline.config.experiment import Experiment
from pipeline.config.loading import absolute_path, runs_folder
from pipeline.runs.files import folder_mode, make_folder
from pipeline.runs.folder import RunFolderError

LEASE = ".lease"
_SIGN_OF_LIFE = 20.0  # seconds between two of them
_SILENCE = 120.0  # seconds without one, after which a writer on another machine counts as dead


@contextlib.contextmanager
def new_folder(experiment: Experiment) -> Iterator[Path]:
    """The absolute folder of a new run or search: `run_dir`, else one with a name of its own.

    Such a name is claimed by making the folder, so that of two runs that start in the same second
    each has its own. Left empty, it goes again, with those above it that were made for it.

    Raises RunFolderError.
    """
    if experiment.run_dir is not None:
        yield absolute_path(experiment.run_dir)
        return
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, attempt = runs_folder() / f"{experiment.name}-{stamp}", 1
    new = [each for each in folder.parents if not each.exists()]
    try:
        while not _made(folder):
            attempt += 1
            folder = folder.with_name(f"{experiment.name}-{stamp}-{attempt}")
    except OSError as error:
        raise RunFolderError(
            f"run_dir: cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            for each in (folder, *new):
                each.rmdir()


def named_folders(experiment: Experiment) -> list[Path]:
    """The folders that `new_folder` has made for experiments of this name, the newest first."""
    name = re.compile(re.escape(experiment.name) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    found = []
    for folder in runs_folder().glob(f"{experiment.name}-*"):
        if match := name.fullmatch(folder.name):
            found.append((match[1], int(match[2] or 1), folder))
    return [folder for *_, folder in sorted(found, reverse=True)]


def _made(folder: Path) -> bool:
    """Make a folder; whether there was none before. Raises OSError."""
    make_folder(folder.parent)
    try:
        folder.mkdir(folder_mode())
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Writer:
    """Who writes to a folder."""

    token: str
    """Of this lease alone."""
    host: str
    machine: str
    """The running system, and the container in it; '' where it does not say."""
    pid: int
    started: str
    """When the process started, as its system counts; another process of this number differs."""
    since: str
    """Local time at which it began to write, for a person."""

    @classmethod
    def this_process(cls) -> Writer:
        return cls(
            uuid.uuid4().hex,
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _started(os.getpid()),
            datetime.datetime.now().isoformat(" ", "seconds"),
        )

    def lives(self, silent: float) -> bool:
        """Whether it still runs; `silent` is the time since its last sign of life, in seconds."""
        if self.machine and self.machine == _machine():
            return _started(self.pid) == self.started
        return silent < _SILENCE

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lease:
    """The right to write to a folder; `leased` gives it."""

    def __init__(self, folder: Path, setting: str):
        """`setting` chose the folder; messages name it."""
        self._what, self._path = f"{setting}: {folder}", folder / LEASE
        self._mine = Writer.this_process()

    def take(self) -> None:
        """Write the lease. Raises RunFolderError where another one holds it, OSError."""
        with _locked(self._path) as file:
            holder = _read(file)
            silent = time.time() - os.fstat(file.fileno()).st_mtime
            if holder is not None and holder.lives(silent):
                raise RunFolderError(
                    f"{self._what} is in use by {holder}; wait for it, or stop it "
                    f"(if that process is none of yours, delete {self._path})"
                )
            file.truncate(0)
            file.write(json.dumps(asdict(self._mine)))

    def check(self) -> None:
        """Raise RunFolderError if another writer has taken over, because this one was silent."""
        with contextlib.suppress(OSError), self._path.open() as file:
            holder = _read(file)
            if holder is not None and holder.token != self._mine.token:
                raise RunFolderError(
                    f"{self._what} was taken over by {holder}, because this process "
                    "gave no sign of life for too long; what it did since then is not saved"
                )

    def give_signs_of_life(self, over: threading.Event) -> None:
        """Until `over` is set."""
        while not over.wait(_SIGN_OF_LIFE):
            with contextlib.suppress(OSError, RunFolderError):
                self.check()
                os.utime(self._path)

    def give_up(self) -> None:
        """Remove the lease, unless another writer has it."""
        with contextlib.suppress(OSError), _locked(self._path) as file:
            holder = _read(file)
            if holder is None or holder.token == self._mine.token:
                self._path.unlink()


@contextlib.contextmanager
def leased(folder: Path, setting: str = "run_dir") -> Iterator[Lease]:
    """Be the one writer of a folder, which is made if need be; left empty, it goes again.

    Raises RunFolderError where there is a living writer, or the folder cannot be written; it names
    the `setting` that chose the folder.
    """
    lease = Lease(folder, setting)
    try:
        made = _made(folder)
        lease.take()
    except OSError as error:
        raise RunFolderError(
            f"{setting}: cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error
    over = threading.Event()
    thread = threading.Thread(target=lease.give_signs_of_life, args=(over,), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join()
        lease.give_up()
        if made:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Open a file that nobody else reads or changes meanwhile; made if need be. Raises OSError."""
    while True:
        with path.open("a+") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # its writer has removed it since it was opened
            yield file
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: IO[str]) -> Writer | None:
    """The writer that a lease names; None if it was not written to the end."""
    file.seek(0)
    try:
        return Writer(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    """Names the running system and this process's container: where process numbers mean the same.
    '' where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the system did; '' if there is none."""
    try:
        # After the name, which may contain anything: state, ..., start time (fields 3 and 22).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
