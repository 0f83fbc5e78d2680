"""The MLflow record of a run, kept by a background thread so that training never waits for it.

    training ──log_*──▶ queue of records ──▶ sender thread ──log_batch──▶ MLflow
                                                   └──▶ RUN_DIR/unsent-tracking.jsonl, if it is away

Every call appends one record to the queue and returns; the sender takes what is there once a
second. Only `MlflowClient` is used, and only by the sender: MLflow's notion of an active run stays
untouched, and its import, which takes seconds, does not delay training.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import logging
import os
import platform
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.runs.mlflow_records import (
    Artifact,
    Destination,
    Metrics,
    Record,
    RunParams,
    RunStatus,
    Tags,
    now,
    read_unsent,
    write_unsent,
)
from pipeline.runs.mlflow_sender import Sender
from pipeline.runs.mlflow_store import STORE, TrackingError, sqlite_file, with_credentials
from pipeline.runs.source import output_of, source_tags
from pipeline.worker.cpus import available_cpus
from tasks.credentials import redacted, refusal

log = logging.getLogger(__name__)

UNSENT = "unsent-tracking.jsonl"
SELECTED_BY = "selected_by"
"""Tag of a run: the metric of a validation that chooses its best checkpoint."""
RANKED_BY, RANKED_MODE = "search.ranked_by", "search.ranked_mode"
"""Tags of a search: the metric that ranks its trials, METRIC or METRIC_stepK; 'min' or 'max'."""
CURVES = "test_curves"
"""Tag of a run: the titles of the curves of its meta-test, a JSON list. Names of metrics have them
as `recorded_title` makes them."""
_STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


class Tracker(Protocol):
    """What training needs of a tracker. Only `wait_for_run_id`, `flush` and `close` ever wait."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run, as soon as it is known."""

    def wait_for_run_id(self, timeout: float) -> str | None:
        """`run_id`, waiting for it for up to `timeout` seconds."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of one step; NaN is a value too."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings, as text. One that changes while a run is resumed becomes a tag."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record labels; the last value of a label stays."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a file. It is read later, so it must stay where it is."""

    def flush(self, timeout: float) -> bool:
        """Send what is recorded, within `timeout` seconds; whether all of it has arrived."""

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> Path | None:
        """End the run and send what is left, giving up after 30 seconds without progress.

        Returns the file that holds what could not be sent (see `resend`), or None.
        """


class NullTracker:
    """The tracker of a run that is not recorded: does nothing."""

    run_id = None

    def wait_for_run_id(self, timeout: float) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None: ...
    def flush(self, timeout: float) -> bool:
        return True

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None: ...


class MlflowTracker:
    """Records one run in MLflow. `Tracker` says what its methods promise."""

    def __init__(self, destination: Destination, unsent_path: Path, records: Sequence[Record]):
        """Start to send `records` and those logged later; `open` is for experiments."""
        self._unsent_path = unsent_path
        self._queue: deque[Record] = deque(records)
        self._sender = Sender(destination, self._queue)
        self._closed = False
        self._sender.thread.start()

    @classmethod
    def open(
        cls,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        run_dir: Path,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
        token: str | None = None,
        parent_run_id: str | None = None,
    ) -> MlflowTracker:
        """The tracker of the run in `run_dir`; with a `run_id`, of that run's continuation.

        `token` is a name of the caller's choice for a run whose id it may not live to see: the run
        that carries it is continued too.

        What an interrupted run left unsent in `run_dir` is sent first.
        Raises TrackingError if `uri` cannot work (see `resolve_uri`).
        """
        uri = resolve_uri(uri, run_dir)
        destination = Destination(uri, experiment, run_name, run_id, parent_run_id)
        if token is not None:
            destination = replace(destination, token=token)
        records: list[Record] = []
        unsent_path = run_dir / UNSENT
        if unsent_path.exists():
            before, unsent = read_unsent(unsent_path)
            if before.uri == redacted(uri) and run_id in (None, before.run_id):
                destination = replace(before, uri=uri)
                records += [record for record in unsent if not isinstance(record, RunStatus)]
            else:
                aside = unsent_path.with_name(f"unsent-tracking-{before.token}.jsonl")
                unsent_path.replace(aside)
                log.warning("%s holds records of this run for %s", aside, before.uri)
        if run_id is not None or token is not None:
            records.append(RunStatus("RUNNING", now()))
        tracker = cls(destination, unsent_path, records)
        tracker.set_tags(tags)
        tracker.log_params(params)
        return tracker

    @property
    def run_id(self) -> str | None:
        return self._sender.destination.run_id

    def wait_for_run_id(self, timeout: float) -> str | None:
        self._sender.connected.wait(timeout)
        return self.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._queue.append(Metrics({k: float(v) for k, v in metrics.items()}, step, now()))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._queue.append(RunParams({name: str(value) for name, value in params.items()}))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._queue.append(Tags(dict(tags)))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        self._queue.append(Artifact(str(Path(path).absolute()), folder))

    def flush(self, timeout: float) -> bool:
        return self._sender.flush(timeout)

    def close(
        self, status: Literal["FINISHED", "FAILED", "KILLED"], timeout: float = 30.0
    ) -> Path | None:
        if not self._closed:
            self._queue.append(RunStatus(status, now()))
        return self._finish(timeout)

    def _finish(self, timeout: float) -> Path | None:
        """Send what is left; returns the file that holds what could not be sent, or None."""
        if self._closed:
            return self._unsent_path if self._unsent_path.exists() else None
        self._closed = True
        try:
            self._sender.finish(timeout)
        finally:  # interrupting the wait loses nothing either
            unsent = self._sender.unsent()
            if unsent:
                write_unsent(self._unsent_path, self._sender.destination, unsent)
                log.warning(
                    "%d records did not reach MLflow at %s; they are in %s",
                    len(unsent),
                    redacted(self._sender.destination.uri),
                    self._unsent_path,
                )
            else:
                self._unsent_path.unlink(missing_ok=True)
        return self._unsent_path if unsent else None


def resend(path: str | Path, timeout: float = 30.0) -> bool:
    """Send what a run left in its `unsent-tracking.jsonl`; the file goes when all has arrived.

    Raises TrackingError if it is not such a file.
    """
    path = Path(path)
    destination, records = read_unsent(path)
    destination = replace(destination, uri=with_credentials(destination.uri))
    return MlflowTracker(destination, path, records)._finish(timeout) is None


def resolve_uri(uri: str | None, run_dir: Path) -> str:
    """The tracking store: `uri`, else MLFLOW_TRACKING_URI, else SQLite beside `run_dir`.

    Only the variable may hold credentials; a recorded `uri` is given them back. Raises
    TrackingError for others, and for what MLflow cannot write to, such as a folder of files.
    """
    known = os.environ.get(STORE)
    if uri and uri != known and (refused := refusal("tracking.uri", uri)):
        raise TrackingError(refused)
    uri = with_credentials(uri or known or "")
    if not uri:
        return f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"
    if uri.startswith("file:") or not (":" in uri or uri.startswith("databricks")):
        raise TrackingError(
            f"tracking.uri: MLflow no longer writes to folders such as {uri}; use a database "
            "(sqlite:////absolute/path/mlflow.db) or a server (http://HOST:PORT)"
        )
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _STORES:
        raise TrackingError(
            f"tracking.uri: MLflow knows no stores like {uri}; there are {', '.join(_STORES)}: a "
            "database (sqlite:////absolute/path/mlflow.db) or a server (http://HOST:PORT)"
        )
    database = sqlite_file(uri)
    # Absolute: another working directory must not mean another database.
    return uri if database is None else f"sqlite:///{database}"


def recorded_title(title: str) -> str:
    """The title of a curve, as the names of its metrics have it: MLflow refuses = and commas."""
    return title.replace("=", "-").replace(",", "")


def environment_tags() -> dict[str, str]:
    """Tags that say what a run ran with: code, packages, machine. Imports nothing slow."""
    tags = {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpu.usable": str(available_cpus()),
    }
    for package in ("torch", "ray", "mlflow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[package] = importlib.metadata.version(package)
    if shutil.which("nvidia-smi"):
        gpus = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        tags["gpus"] = ", ".join(gpus.splitlines())
    tags |= source_tags()
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return {name: value for name, value in tags.items() if value}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
