"""Packages of somebody else that hide ours: found before anything of ours is imported from them.

`python -m pipeline.cli` looks for modules in the current folder first, so a file tasks.py there
(invoke and celery call theirs so) would be taken for the package `tasks`. Of `pipeline` there is
nothing to check, because this file is in it; `tune_configs` is never imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def refuse_foreign_tasks() -> None:
    """End the process with exit code 2 if `import tasks` would not import the project's own."""
    found = _where("tasks")
    if found is None or found.parent == _ROOT:
        return
    if Path(sys.path[0]).resolve() == found.parent:
        cure = "start with `maml` or `python -P -m pipeline.cli`, which do not look here first"
    else:
        cure = f"take {found.parent} off PYTHONPATH"
    message = f"{found} hides the project's own package tasks: rename it, or {cure}"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _where(package: str) -> Path | None:
    """The folder or the file that `import package` would take; None: there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    # A folder without __init__.py has no file of its own.
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0] if folders else str(spec.origin)).resolve()
