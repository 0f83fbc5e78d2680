"""The version of the project."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

DISTRIBUTION = "maml-pipeline"
_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def _version() -> str:
    """The version of the installed distribution, else the one in the checkout's pyproject.toml;
    'unknown' in a job's working directory, which has neither."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        if not _PYPROJECT.is_file():
            return "unknown"
        return str(tomllib.loads(_PYPROJECT.read_text())["project"]["version"])


__version__ = _version()
