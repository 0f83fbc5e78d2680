"""The `maml` command, run as a person types it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.places import ROOT
from tests.warm import warm


def maml(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; standard output is no terminal."""
    return warm().run(arguments, cwd, {**clean_environment(), **environment}, timeout=200)


def clean_environment() -> dict[str, str]:
    """This environment, without what libraries set in it, and with the checkout."""
    # Starting Ray sets the latter for the process and its children.
    set_by_libraries = ("MLFLOW_TRACKING_URI", "RAY_AUTH_MODE")
    env = {k: v for k, v in os.environ.items() if k not in set_by_libraries}
    return {**env, "PYTHONPATH": str(ROOT)}
