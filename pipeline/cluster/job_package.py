"""What travels with a job: the current folder, as git knows it, packed.

Where the folder is not the project itself, the project's packages travel with it, so that a job
always runs the code that is here; the nodes need only what it imports.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIMIT = 100 * 2**20
"""Bytes that the jobs API takes, packed."""

_PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = ("pipeline", "tasks", "tune_configs")


class JobError(Exception):
    """A job cannot be submitted or found; `str()` says what to do."""


@contextlib.contextmanager
def packed(folder: Path) -> Iterator[Path]:
    """The folder as a job's working directory, in a temporary zip. Raises JobError.

    The same files give the same bytes: the head then has the package already.
    """
    files = files_to_ship(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    with tempfile.TemporaryDirectory(prefix="maml-job-") as scratch:
        package = Path(scratch) / "working_dir.zip"
        fits = sum(sizes.values()) <= 10 * LIMIT  # what is larger is not worth packing
        with package.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, path in sorted(files.items()):
                if not fits:
                    break
                # Its date would make another package of it.
                zipped.writestr(_plain(name), path.read_bytes())
                fits = file.tell() < LIMIT
        if not fits or package.stat().st_size >= LIMIT:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            named = ", ".join(f"{name} ({sizes[name] / 2**20:,.1f} MiB)" for name in largest)
            raise JobError(
                f"{folder} does not fit into a job, which takes {LIMIT // 2**20} MiB packed; its "
                f"largest files: {named}\n"
                "leave them out with .gitignore; data is given by data.root"
            )
        yield package


def files_to_ship(folder: Path) -> dict[str, Path]:
    """The files of a job's working directory, by their path in it. Raises JobError."""
    files = {name: folder / name for name in _listed(folder) if (folder / name).is_file()}
    if "pipeline/cli/__main__.py" in files:
        return files
    for package in _PACKAGES:
        for own in (f"{package}.py", f"{package}/__init__.py"):
            if own in files:
                raise JobError(
                    f"{folder / own} would hide the project's own package {package}: rename it"
                )
        for path in (_PROJECT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[str(path.relative_to(_PROJECT))] = path
    return files


def _listed(folder: Path) -> list[str]:
    """What git knows and does not ignore below the folder; without git, everything."""
    if any((above / ".git").exists() for above in (folder, *folder.parents)):
        command = ["git", "ls-files", "-t", "-z", "--cached", "--others", "--exclude-standard"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise JobError(f"{folder} is in a git repository, but there is no git here") from None
        except subprocess.CalledProcessError as error:
            raise JobError(f"git cannot list {folder}: {error.stderr.strip()}") from None
        entries = [(entry[2:], entry[0] != "?") for entry in done.stdout.split("\0") if entry]
        if entries:  # a folder that the repository ignores has none
            return [name for name, tracked in entries if tracked or not _left_out(name)]
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return [str(path) for path in found if not _left_out(str(path))]


def _left_out(name: str) -> bool:
    parts = Path(name).parts
    hidden = {".git", ".venv", "venv", "__pycache__"}
    return parts[0] in ("data", "runs") or not hidden.isdisjoint(parts)


def _plain(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return info
