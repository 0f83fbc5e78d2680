"""Packages of somebody else that hide ours: found before anything of ours is imported from them.

A file tasks.py in the current folder (invoke and celery call theirs so) would be taken for the
package `tasks`: by `python -m pipeline.cli`, which looks there first, and by Ray's worker
processes, which look there first however the command was started.

Not seen is a pipeline.py in the current folder of `python -m pipeline.cli`: Python imports it
before any line of this file runs. `maml` sees it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_OURS = {
    "pipeline": "A distributed pipeline for model-agnostic meta-learning",
    "tasks": "Task distributions: what is learned",
}
"""The packages that are imported, and how the docstring of each begins."""


def refuse_foreign_packages() -> None:
    """End the process with exit code 2 if this process or a worker of Ray would import `pipeline`
    or `tasks` from anywhere but this installation."""
    for package in _OURS:
        found = _where(package)
        if found is not None and (problem := _problem(package, found)):
            print(f"error: {problem}", file=sys.stderr)
            raise SystemExit(2)


def _problem(package: str, found: Path) -> str:
    """Why the package is not to be imported from where it was found, and the cure; '' if it is."""
    ours = _is_ours(package, found)
    if found == _ROOT / package:
        if ours:
            return ""
        return (
            f"{found} is not the project's own package {package}: another distribution has "
            "replaced its files; uninstall that one, and install this one again"
        )
    here = found.parent == _current_folder()
    cure = "start in another folder" if here else f"take {found.parent} off PYTHONPATH"
    if ours:
        return (
            f"{found} belongs to another checkout of this project than this command, which is "
            f"installed from {_ROOT}: install that checkout (pip install -e {found.parent}), or "
            f"{cure}"
        )
    return f"{found} hides the project's own package {package}: rename it, or {cure}"


def _is_ours(package: str, found: Path) -> bool:
    """Whether the package's docstring is the one of ours: a distribution of the same name in the
    same folder replaces __init__.py, and may leave our other files there."""
    try:
        text = (found / "__init__.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a module, a folder without __init__.py, or not text
        return False
    return text.startswith(f'"""{_OURS[package]}')


def _where(package: str) -> Path | None:
    """The folder or the file that `import package` would take; None: there is none."""
    here = _current_folder()
    # The second finds an editable install, which is not on the path.
    spec = PathFinder.find_spec(package, [*([] if here is None else [str(here)]), *sys.path])
    spec = spec or importlib.util.find_spec(package)
    if spec is None:
        return None
    # A folder without __init__.py has no file of its own.
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0] if folders else str(spec.origin)).resolve()


def _current_folder() -> Path | None:
    """The current folder; None: it was deleted."""
    with contextlib.suppress(OSError):
        return Path.cwd().resolve()
    return None
