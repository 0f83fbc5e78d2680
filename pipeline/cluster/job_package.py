"""Packs what travels with a job: the files of the current folder that git does not ignore.

Where the folder is not the project itself, the project's packages travel with it, so that a job
always runs the code of this machine; the nodes need only the libraries that it imports.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tasks.errors import ReportedError

LIMIT = 100 * 2**20
"""Bytes that the jobs API takes, once packed."""

_PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = ("pipeline", "tasks", "tune_configs")


class JobError(ReportedError):
    """A job cannot be submitted or found; `str()` says what to do."""


@contextlib.contextmanager
def packed(folder: Path) -> Iterator[Path]:
    """Pack the folder as a job's working directory; yields the path of a temporary zip.

    The same files give the same bytes, so that the head recognises a package that it has already.
    Raises JobError where the folder is too large.
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
                # Without the date of the file, which would change the bytes.
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
    """The files of a job's working directory, by their path in it.

    Raises JobError where a file would hide one of the project's packages, or git fails.
    """
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
    """Paths of the files below the folder that travel.

    In a repository those that git tracks, and others that neither git ignores nor `_left_out`
    excludes; elsewhere all that `_left_out` does not exclude. Raises JobError where git fails.
    """
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
    """Whether a file is data, a run's, or a tool's, and so has no place in a job."""
    parts = Path(name).parts
    hidden = {".git", ".venv", "venv", "__pycache__"}
    return parts[0] in ("data", "runs") or not hidden.isdisjoint(parts)


def _plain(name: str) -> zipfile.ZipInfo:
    """An entry of a zip that depends on nothing but its name."""
    info = zipfile.ZipInfo(name)
    info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return info
