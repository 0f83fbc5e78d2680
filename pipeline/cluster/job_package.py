"""Packs what travels with a job: what git tracks in the current folder, and new code and settings.

Code and settings are `*.py` and `*.yaml`: of files that git does not track, and outside of git,
they alone travel. Names that begin with a dot never do, nor what is below one: keys and passwords
are there. Where the folder is not the project itself, the project's packages travel with it, so
that a job always runs the code of this machine; the nodes need only the libraries that it imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipeline.config.wording import counted
from tasks.errors import ReportedError

LIMIT = 100 * 2**20
"""Bytes that the jobs API takes, once packed."""

_PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = ("pipeline", "tasks", "tune_configs")
_CODE = (".py", ".yaml", ".yml")


class JobError(ReportedError):
    """A job cannot be submitted or found; `str()` says what to do."""


@dataclass(frozen=True)
class Selection:
    """The files of a job's working directory."""

    files: Mapping[str, Path]
    """By their path in it."""
    why: str
    """What chose them, for a person."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: path.stat().st_size for name, path in self.files.items()}

    def summary(self) -> str:
        """How many files, how large, and why these, in one line."""
        size = sum(self.sizes.values()) / 1e6
        return f"{counted(len(self.files), 'file')}, {size:,.1f} MB: {self.why}"


@contextlib.contextmanager
def packed(selection: Selection) -> Iterator[Path]:
    """Pack a job's working directory; yields the path of a temporary zip.

    The same files give the same bytes, so that the head recognises a package that it has already.
    Raises JobError where they are too large.
    """
    sizes = selection.sizes
    with tempfile.TemporaryDirectory(prefix="maml-job-") as scratch:
        package = Path(scratch) / "working_dir.zip"
        fits = sum(sizes.values()) <= 10 * LIMIT  # what is larger is not worth packing
        with package.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, path in sorted(selection.files.items()):
                if not fits:
                    break
                # Without the date of the file, which would change the bytes.
                zipped.writestr(_plain(name), path.read_bytes())
                fits = file.tell() < LIMIT
        if not fits or package.stat().st_size >= LIMIT:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            named = ", ".join(f"{name} ({sizes[name] / 2**20:,.1f} MiB)" for name in largest)
            raise JobError(
                f"this folder does not fit into a job, which takes {LIMIT // 2**20} MiB packed; "
                f"its largest files: {named}\n"
                "start the job in another folder; data is given by data.root"
            )
        yield package


def hash_of(package: Path) -> str:
    """The SHA-256 of a packed working directory, in hex."""
    return hashlib.sha256(package.read_bytes()).hexdigest()


def files_to_ship(folder: Path) -> Selection:
    """The files that travel with a job that is submitted in a folder.

    Raises JobError for a home directory or one that holds it, where a file would hide one of the
    project's packages, and where git fails.
    """
    if Path.home().resolve().is_relative_to(folder.resolve()):
        raise JobError(
            f"{folder} is a home directory, or holds one: it does not travel with a job; make a "
            "folder for your experiments, and submit there"
        )
    names, why = _chosen(folder)
    files = {name: folder / name for name in names if (folder / name).is_file()}
    if "pipeline/cli/__main__.py" in files:
        return Selection(files, why)
    for package in _PACKAGES:
        for own in (f"{package}.py", f"{package}/__init__.py"):
            if own in files:
                raise JobError(
                    f"{folder / own} would hide the project's own package {package}: rename it"
                )
        for path in (_PROJECT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[str(path.relative_to(_PROJECT))] = path
    return Selection(files, f"{why}, and the project's packages")


def _chosen(folder: Path) -> tuple[list[str], str]:
    """Paths of the files below the folder that travel, and what chose them. Raises JobError."""
    listed = _known_to_git(folder)
    if not listed:  # no repository, or a folder that its repository ignores
        return [name for name in _below(folder) if _is_code(name)], "*.py and *.yaml outside of git"
    tracked = [name for name, is_tracked in listed.items() if is_tracked and not _is_hidden(name)]
    new = [name for name, is_tracked in listed.items() if not is_tracked and _is_code(name)]
    return [*tracked, *new], f"{len(tracked)} that git tracks, {len(new)} new *.py and *.yaml"


def _known_to_git(folder: Path) -> dict[str, bool]:
    """The files below the folder that git does not ignore, and whether it tracks them; empty where
    there is no repository. Those that were deleted are not among them. Raises JobError where git
    fails."""
    if not any((above / ".git").exists() for above in (folder, *folder.parents)):
        return {}
    command = ["git", "ls-files", "-t", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise JobError(f"{folder} is in a git repository, but there is no git here") from None
    except subprocess.CalledProcessError as error:
        raise JobError(f"git cannot list {folder}: {error.stderr.strip()}") from None
    listed = {entry[2:]: entry[0] != "?" for entry in done.stdout.split("\0") if entry}
    return {name: tracked for name, tracked in listed.items() if (folder / name).is_file()}


def _below(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder; looks into none that cannot hold any of a job's."""
    for where, folders, names in os.walk(folder):
        inside = Path(where).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _is_left_out(str(inside / name)))
        yield from (str(inside / name) for name in sorted(names))


def _is_code(name: str) -> bool:
    """Whether a file is code or settings, and has a place in a job."""
    return PurePath(name).suffix in _CODE and not _is_left_out(name)


def _is_left_out(name: str) -> bool:
    """Whether a path is hidden, data, a run's, or a tool's."""
    parts = PurePath(name).parts
    of_a_tool = not {"venv", "__pycache__"}.isdisjoint(parts)
    return _is_hidden(name) or of_a_tool or parts[0] in ("data", "runs")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePath(name).parts)


def _plain(name: str) -> zipfile.ZipInfo:
    """An entry of a zip that depends on nothing but its name."""
    info = zipfile.ZipInfo(name)
    info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return info
