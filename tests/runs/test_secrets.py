"""A password in MLFLOW_TRACKING_URI, where it may be: used, and neither shown nor recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, load
from pipeline.runs.mlflow_store import STORE, TrackingError
from pipeline.runs.mlflow_ui import start_server, stop_server
from pipeline.runs.tracker import MlflowTracker, resend, resolve_uri
from tests.ports import free_port

SECRET = "hunter2"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a server that is away."""
    uri = f"http://me:{SECRET}@127.0.0.1:{free_port()}"
    monkeypatch.setenv(STORE, uri)
    return uri


def test_an_outage_tells_nobody(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker.open(
        uri=None, experiment="x", run_name="run", run_dir=tmp_path, params={}, tags={}
    )
    tracker.log_metrics({"loss": 1.0}, 1)
    left = tracker.close("FINISHED", timeout=1.5)
    assert left is not None
    assert SECRET not in left.read_text()
    assert "127.0.0.1" in caplog.text
    assert SECRET not in caplog.text


def test_what_was_left_goes_where_the_variable_says(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker.open(
        uri=None, experiment="x", run_name="run", run_dir=tmp_path, params={}, tags={}
    )
    left = tracker.close("FINISHED", timeout=0.1)
    assert left is not None
    assert not resend(left, timeout=0.1), "its server is still away"
    again = MlflowTracker.open(
        uri=None, experiment="x", run_name="run", run_dir=tmp_path, params={}, tags={}
    )
    assert again._sender.destination.uri == address
    assert again._sender.destination.token in left.read_text(), "the same run goes on"
    again.close("FINISHED", timeout=0.1)
    monkeypatch.setenv(STORE, "http://elsewhere:5000")
    with pytest.raises(TrackingError, match=f"are not recorded: set {STORE} to") as caught:
        resend(left)
    assert SECRET not in str(caught.value)


def test_only_the_variable_may_hold_it(address: str, tmp_path: Path) -> None:
    assert resolve_uri(None, tmp_path) == address
    assert resolve_uri(address.replace(f"me:{SECRET}", "***"), tmp_path) == address
    with pytest.raises(TrackingError, match="holds credentials") as caught:
        resolve_uri(f"mysql://me:{SECRET}@h/db", tmp_path)
    assert SECRET not in str(caught.value)


def test_the_process_list_does_not_show_it() -> None:
    server = start_server(f"mysql://me:{SECRET}@127.0.0.1:9/db", "127.0.0.1", free_port())
    try:
        assert "mlflow" in str(server.args)
        assert SECRET not in str(server.args)
    finally:
        stop_server(server)


def test_no_error_of_a_configuration_repeats_it(quick: dict[str, Any]) -> None:
    quick["tracking"] = {"uri": f"mysql://me:{SECRET}@h/db"}
    with pytest.raises(ValueError, match=r"tracking\.uri: holds credentials") as wrong:
        Experiment(**quick)
    with pytest.raises(ConfigError) as refused:
        load("sinusoid", [f"checkpoint.uri=s3://KEY:{SECRET}@b", f"inner.lr=s3://K:{SECRET}@b"])
    assert SECRET not in str(wrong.value) + str(refused.value) + str(refused.value.errors)
