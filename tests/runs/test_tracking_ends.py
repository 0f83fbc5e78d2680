"""When a run has ended for MLflow, and what is said where MLflow refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.runs.tracker import MlflowTracker, resend
from tests.waiting import PATIENCE


def started(run_dir: Path, uri: str, experiment: str = "maml") -> MlflowTracker:
    return MlflowTracker.open(
        uri=uri, experiment=experiment, run_name="run", run_dir=run_dir, params={}, tags={}
    )


def test_a_run_has_ended_only_when_its_files_are_there(tmp_path: Path) -> None:
    """Whoever reacts to FINISHED finds the parameters."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = started(tmp_path / "run", uri)
    assert tracker.wait_for_run_id(PATIENCE) is not None
    artifacts = tmp_path / "mlartifacts"
    artifacts.write_text("no folder: files cannot be stored")
    (tmp_path / "theta.safetensors").write_text("θ")
    tracker.log_artifact(tmp_path / "theta.safetensors")
    left = tracker.close("FINISHED", timeout=2)
    assert left is not None
    client = MlflowClient(uri)
    assert client.get_run(str(tracker.run_id)).info.status == "RUNNING"
    artifacts.unlink()
    assert resend(left, PATIENCE)
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    [artifact] = client.list_artifacts(str(tracker.run_id))
    assert artifact.path == "theta.safetensors"


def test_a_deleted_experiment_is_said_as_what_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment("gone"))
    started(tmp_path / "run", store, "gone").close("FINISHED", timeout=1)
    assert "refuses the records of this run" in caplog.text
    assert "cannot be reached" not in caplog.text
