"""The commands that `maml train`, `search` and `compare` suggest at their end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.credentials import redacted

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment


def typed(path: Path) -> str:
    """The path as one would type it here: relative where it lies in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def ui_command(experiment: Experiment, run_dir: Path) -> str:
    """The command, or the address, that shows a run in MLflow. Raises TrackingError."""
    from pipeline.config.loading import runs_folder
    from pipeline.runs.tracker import resolve_uri

    uri = resolve_uri(experiment.tracking.uri, run_dir)
    if uri.startswith(("http://", "https://")):
        return redacted(uri)
    default = resolve_uri(None, runs_folder() / "any")
    return "maml ui" if uri == default else f"maml ui --uri {redacted(uri)}"
