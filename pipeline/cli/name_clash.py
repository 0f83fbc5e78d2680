"""Packages of somebody else that hide ours: found before anything of ours is imported from them.

A file tasks.py in the current folder (invoke and celery call theirs so) would be taken for the
package `tasks`: by `python -m pipeline.cli`, which looks there first, and by Ray's worker
processes, which look there first however the command was started.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = ("pipeline", "tasks")


def refuse_foreign_packages() -> None:
    """End the process with exit code 2 if this command, or a worker of it, would import others."""
    for package in _IMPORTED:
        found = _where(package)
        if found is None or found.parent == _ROOT:
            continue
        here = found.parent == Path.cwd().resolve()
        cure = "start in another folder" if here else f"take {found.parent} off PYTHONPATH"
        message = f"{found} hides the project's own package {package}: rename it, or {cure}"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _where(package: str) -> Path | None:
    """The folder or the file that `import package` would take; None: there is none."""
    # The second finds an editable install, which is not on the path.
    spec = PathFinder.find_spec(package, [str(Path.cwd()), *sys.path])
    spec = spec or importlib.util.find_spec(package)
    if spec is None:
        return None
    # A folder without __init__.py has no file of its own.
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0] if folders else str(spec.origin)).resolve()
