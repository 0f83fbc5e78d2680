"""Runs that are recorded in MLflow without having been trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.runs.tracker import MlflowTracker


def record(run_dir: Path, uri: str, status: Any = "FINISHED", **given: Any) -> str:
    """A run made by hand; returns its id."""
    metrics = given.pop("metrics", {})
    settings: dict[str, Any] = {"params": {}, "tags": {}, **given}
    tracker = MlflowTracker.open(
        uri=uri, experiment="maml", run_name=run_dir.name, run_dir=run_dir, **settings
    )
    tracker.log_metrics(metrics, 3)
    assert tracker.close(status) is None
    assert tracker.run_id is not None
    return tracker.run_id
