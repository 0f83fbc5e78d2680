"""The MLflow record: complete and exactly once, whatever happens to the server meanwhile."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.runs.mlflow_ui import serve
from pipeline.runs.tracker import (
    UNSENT,
    MlflowTracker,
    NullTracker,
    Tracker,
    TrackingError,
    environment_tags,
    resend,
    resolve_uri,
)
from tests.ports import free_port
from tests.waiting import PATIENCE, wait_for

mlflow = pytest.importorskip("mlflow")
from mlflow import MlflowClient  # noqa: E402


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> str:
    """A tracking store that has its tables: creating them takes seconds."""
    runs = tmp_path_factory.mktemp("project") / "runs"
    uri = resolve_uri(None, runs / "first")
    assert start(runs / "first", uri=uri).close("FINISHED", PATIENCE) is None
    return uri


def start(run_dir: Path, **changes: object) -> MlflowTracker:
    settings = {"uri": None, "experiment": "maml", "run_name": run_dir.name, "run_dir": run_dir}
    return MlflowTracker.open(**{**settings, "params": {}, "tags": {}, **changes})


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_run_arrives_complete(store: str, tmp_path: Path) -> None:
    text = tmp_path / "curve.txt"
    text.write_text("a curve")
    tracker = start(
        tmp_path / "run",
        uri=store,
        params={f"inner.setting{i}": i for i in range(150)} | {"long": "x" * 9000},
        tags={"purpose": "test", "git.dirty": "true"},
        parent_run_id="0" * 32,
    )
    for step in range(300):
        tracker.log_metrics({"loss": step / 7, "K=5/accuracy": 0.5}, step)
    tracker.log_metrics({"nan": math.nan, "inf": math.inf}, 3)
    tracker.log_artifact(text, "plots")
    assert tracker.close("FAILED", PATIENCE) is None
    assert tracker.close("FAILED") is None

    client = MlflowClient(store)
    assert tracker.run_id is not None
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "run"
    assert run.info.status == "FAILED"
    assert run.info.end_time >= run.info.start_time
    assert client.get_experiment(run.info.experiment_id).name == "maml"
    assert len(run.data.params) == 151
    assert run.data.params["inner.setting7"] == "7"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["purpose"] == "test"
    assert run.data.tags["mlflow.parentRunId"] == "0" * 32
    assert history(store, tracker.run_id, "loss") == [(i, i / 7) for i in range(300)]
    assert len(history(store, tracker.run_id, "K_5/accuracy")) == 300
    assert math.isnan(run.data.metrics["nan"])
    assert run.data.metrics["inf"] > 1e300
    [artifact] = client.list_artifacts(tracker.run_id, "plots")
    assert artifact.path == "plots/curve.txt"
    assert not list(tmp_path.glob("**/*.jsonl"))


def test_many_records_arrive(store: str, tmp_path: Path) -> None:
    tracker = start(tmp_path / "run", uri=store)
    for step in range(2000):
        tracker.log_metrics({f"metric{i}": float(i) for i in range(12)}, step)
    assert tracker.wait_for_run_id(PATIENCE) is not None
    tracker.close("FINISHED", PATIENCE)
    assert len(history(store, str(tracker.run_id), "metric11")) == 2000


def test_logging_waits_for_nobody(tmp_path: Path) -> None:
    """All is logged while the server has taken the first request, and does not answer it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        tracker = start(tmp_path / "run", uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = silent.accept()
        for step in range(100):
            tracker.log_metrics({"loss": float(step)}, step)
        tracker.log_params({"seed": 0})
        tracker.set_tags({"a": "b"})
        tracker.log_artifact(tmp_path / "theta.safetensors")
        assert tracker.run_id is None
        connection.close()
    left = tracker.close("KILLED", timeout=0.5)
    assert left is not None
    kinds = [json.loads(line).get("kind") for line in left.read_text().splitlines()]
    assert kinds.count("Metrics") == 100
    assert {"Params", "Tags", "Artifact", "RunStatus"} <= set(kinds)


def test_a_resumed_run_is_the_same_run_without_repetition(store: str, tmp_path: Path) -> None:
    first = start(tmp_path / "run", uri=store, params={"seed": 0, "iterations": 10})
    for step in range(6):
        first.log_metrics({"loss": 0.1 * step}, step)
    first.close("KILLED", PATIENCE)

    second = start(
        tmp_path / "run",
        uri=store,
        params={"seed": 0, "iterations": 20, "new": 1},
        run_id=first.run_id,
    )
    assert second.wait_for_run_id(PATIENCE) == first.run_id
    for step in range(4, 9):  # from the checkpoint of step 4
        second.log_metrics({"loss": 0.1 * step}, step)
    second.close("FINISHED", PATIENCE)
    run = MlflowClient(store).get_run(str(first.run_id))
    assert run.info.status == "FINISHED"
    assert history(store, str(first.run_id), "loss") == [(i, 0.1 * i) for i in range(9)]
    assert run.data.params == {"seed": "0", "iterations": "10", "new": "1"}
    assert run.data.tags["changed.iterations"] == "20"


def test_a_run_that_is_gone_goes_on_as_a_new_one(store: str, tmp_path: Path, caplog) -> None:
    tracker = start(tmp_path / "run", uri=store, run_id="f" * 32)
    tracker.close("FINISHED", PATIENCE)
    assert tracker.run_id != "f" * 32
    assert "f" * 32 in caplog.text
    assert MlflowClient(store).get_run(str(tracker.run_id)).info.status == "FINISHED"


def test_what_cannot_be_recorded_is_named_and_holds_nothing_up(store, tmp_path, caplog) -> None:
    tracker = start(tmp_path / "run", uri=store)
    tracker.log_artifact(tmp_path / "never-written.png")
    tracker.log_metrics({"../up": 1.0, "loss": 2.0}, 0)
    tracker.log_metrics({"loss": 3.0}, 1)
    assert tracker.close("FINISHED", PATIENCE) is None
    assert history(store, str(tracker.run_id), "loss") == [(0, 2.0), (1, 3.0)]
    assert "never-written.png is gone" in caplog.text
    assert "MLflow refuses ../up" in caplog.text


def test_processes_that_create_the_store_at_once(tmp_path: Path) -> None:
    """Each in silence, and without a change to MLflow's global state."""
    script = """if True:
        import sys
        from pathlib import Path
        from pipeline.runs.tracker import MlflowTracker
        tracker = MlflowTracker.open(uri=None, experiment="e", run_name=sys.argv[2],
            run_dir=Path(sys.argv[1]) / sys.argv[2], params={"a": 1}, tags={"b": "c"})
        for step in range(50):
            tracker.log_metrics({"loss": step}, step)
        assert tracker.close("FINISHED", 120.0) is None
        import mlflow
        assert sys.argv[1] not in mlflow.get_tracking_uri()
        assert mlflow.active_run() is None
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), f"run{i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    for process in processes:
        assert process.communicate(timeout=PATIENCE) == (b"", b"")
        assert process.returncode == 0
    uri = resolve_uri(None, tmp_path / "run0")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["run0", "run1"]
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    assert all(len(history(uri, run.info.run_id, "loss")) == 50 for run in runs)


@contextlib.contextmanager
def serving(store: str, port: int, end: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """A user who calls `serve`, and ends it with Ctrl-C (or `kill`)."""
    script = f"from pipeline.runs.mlflow_ui import serve; serve({store!r}, port={port})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)

    def up() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return True
        return False

    try:
        wait_for(up)
        yield
        process.send_signal(end)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0
    assert b"Traceback" not in errors
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_that_goes_and_comes_back(store: str, tmp_path: Path, caplog) -> None:
    """Away at the start, there, away in between, there again, and away at the end."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    run_dir = tmp_path / "run"
    picture = tmp_path / "picture.txt"
    picture.write_text("a picture")
    tracker = start(run_dir, uri=uri, params={"seed": 0})
    wait_for(lambda: "cannot be reached" in caplog.text)
    tracker.log_metrics({"loss": 0.0}, 0)
    assert tracker.run_id is None

    with serving(store, port):
        run_id = str(tracker.wait_for_run_id(PATIENCE))
        tracker.log_metrics({"loss": 1.0}, 1)
        wait_for(lambda: len(history(store, run_id, "loss")) == 2)
        assert "is back" in caplog.text
    caplog.clear()
    tracker.log_metrics({"loss": 2.0}, 2)
    wait_for(lambda: "cannot be reached" in caplog.text)
    tracker.log_metrics({"loss": 3.0}, 3)
    tracker.log_artifact(picture, "plots")

    with serving(store, port, signal.SIGTERM):
        wait_for(lambda: len(history(store, run_id, "loss")) == 4)
        wait_for(lambda: MlflowClient(store).list_artifacts(run_id, "plots"))
        assert MlflowClient(uri).get_experiment_by_name("maml") is not None
        # By the address under which the pages fetch it.
        address = f"{uri}/get-artifact?path=plots/picture.txt&run_uuid={run_id}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert answer.read() == b"a picture"

    tracker.log_metrics({"loss": 4.0}, 4)
    left = tracker.close("FINISHED", timeout=2)
    assert left == run_dir / UNSENT
    assert str(left) in caplog.text
    assert resend(left, timeout=2) is False
    assert left.exists()

    # To what a server would write to: the third start would teach nothing.
    left.write_text(left.read_text().replace(uri, store))
    assert resend(left, PATIENCE) is True
    assert not left.exists()
    assert history(store, run_id, "loss") == [(i, float(i)) for i in range(5)]
    client = MlflowClient(store)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0"}
    token = run.data.tags["maml.token"]
    same = client.search_runs([run.info.experiment_id], f"tags.`maml.token` = '{token}'")
    assert len(same) == 1


@pytest.fixture
def unreachable() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_resuming_sends_what_the_run_before_could_not(store, tmp_path, unreachable) -> None:
    first = start(tmp_path / "run", uri=unreachable, params={"seed": 0})
    first.log_metrics({"loss": math.nan, "x": 0.1 + 0.2}, 0)
    left = first.close("KILLED", timeout=0.5)
    assert left is not None
    # Pretend that the store is back, under the same address.
    left.write_text(left.read_text().replace(unreachable, store))
    second = start(tmp_path / "run", uri=store)
    second.log_metrics({"x": 1.0}, 1)
    assert second.close("FINISHED", PATIENCE) is None
    assert history(store, str(second.run_id), "x") == [(0, 0.1 + 0.2), (1, 1.0)]
    assert math.isnan(history(store, str(second.run_id), "loss")[0][1])
    run = MlflowClient(store).get_run(str(second.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0"}


def test_unsent_records_for_another_store_are_set_aside(store, tmp_path, unreachable) -> None:
    left = start(tmp_path / "run", uri=unreachable, params={"seed": 0}).close("KILLED", timeout=0.5)
    assert left is not None
    content = left.read_text()
    start(tmp_path / "run", uri=store).close("FINISHED", PATIENCE)
    assert not left.exists()
    [aside] = (tmp_path / "run").glob("unsent-tracking-*.jsonl")
    assert aside.read_text() == content


def test_a_file_that_holds_no_records_is_named(tmp_path: Path) -> None:
    path = tmp_path / "something.jsonl"
    for content in ("", "{}\n", "not json\n"):
        path.write_text(content)
        with pytest.raises(TrackingError, match=rf"{path} does not hold unsent records"):
            resend(path)


def test_interrupting_the_last_wait_loses_nothing(tmp_path, unreachable) -> None:
    tracker = start(tmp_path / "run", uri=unreachable)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tracker.close("KILLED", PATIENCE)
    timer.join()
    lines = (tmp_path / "run" / UNSENT).read_text().splitlines()
    assert [json.loads(line).get("kind") for line in lines] == [None, "Tags", "Params", "RunStatus"]


def test_the_store_is_found(tmp_path: Path, monkeypatch) -> None:
    run_dir = tmp_path / "runs" / "a"
    assert resolve_uri(None, run_dir) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///my.db", run_dir) == f"sqlite:///{tmp_path}/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:1")
    assert resolve_uri(None, run_dir) == "http://host:1"
    assert resolve_uri("postgresql://u@h/db", run_dir) == "postgresql://u@h/db"
    for folder in ("mlruns", "/abs/mlruns", "file:///abs/mlruns"):
        with pytest.raises(TrackingError, match=r"tracking\.uri: .*no longer .*sqlite:////"):
            resolve_uri(folder, run_dir)
    with pytest.raises(TrackingError, match=r"tracking\.uri: MLflow knows no stores like foo://x"):
        resolve_uri("foo://x", run_dir)


def test_tracking_can_be_off() -> None:
    trackers: list[Tracker] = [NullTracker()]
    for tracker in trackers:
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.log_params({"a": 1})
        tracker.set_tags({"a": "b"})
        tracker.log_artifact("x")
        assert tracker.wait_for_run_id(0) is None
        assert tracker.close("FINISHED") is None


def test_environment_tags() -> None:
    tags = environment_tags()
    assert {"host", "platform", "python", "cpu.usable", "torch", "ray", "mlflow"} <= tags.keys()
    assert all(isinstance(value, str) and value for value in tags.values())


def test_serving_what_cannot_be_served(store: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"there is no tracking store at .*train something"):
        serve(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(TrackingError, match="is an MLflow server already"):
        serve("http://127.0.0.1:5000")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(TrackingError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*--port"):
            serve(store, port=port)


def test_flush_delivers_now(store: str, tmp_path: Path) -> None:
    """What was recorded before a flush is there after it, the file too; the run goes on."""
    tracker = start(tmp_path / "run", uri=store)
    (tmp_path / "note.txt").write_text("here")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_artifact(tmp_path / "note.txt")
    assert tracker.flush(PATIENCE)
    assert tracker.run_id is not None
    assert history(store, tracker.run_id, "loss") == [(1, 1.0)]
    assert [a.path for a in MlflowClient(store).list_artifacts(tracker.run_id)] == ["note.txt"]
    assert MlflowClient(store).get_run(tracker.run_id).info.status == "RUNNING"
    assert tracker.close("FINISHED", PATIENCE) is None


def test_flush_gives_up(tmp_path: Path) -> None:
    """Although the server never comes back; no record is lost."""
    tracker = start(tmp_path / "run", uri="http://127.0.0.1:1")
    tracker.log_metrics({"loss": 1.0}, 1)
    assert not tracker.flush(0.3)
    assert tracker.close("KILLED", 0.1) == tmp_path / "run" / UNSENT
