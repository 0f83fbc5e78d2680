"""The thread that carries records of a run to MLflow.

Records are kept, in order, until MLflow has confirmed them, and every request can be repeated
without effect: a metric carries the time at which it was logged, which is part of its identity in
MLflow; a run carries a token by which it is found again; the rest overwrites itself. So a server
that dies in the middle of a request, or comes back after an hour, has each record exactly once.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.runs.files import make_folder
from pipeline.runs.mlflow_records import (
    Artifact,
    Destination,
    Metrics,
    Record,
    RunParams,
    RunStatus,
    Tags,
)
from pipeline.runs.mlflow_store import sqlite_file
from tasks.credentials import redacted
from tasks.errors import first_line

log = logging.getLogger(__name__)

TOKEN = "maml.token"
_INTERVAL = 1.0  # seconds between deliveries
_LONGEST_BACKOFF = 30.0  # seconds between attempts while MLflow is away
_LIMIT = {"metrics": 1000, "params": 100, "tags": 100}  # of entries per request, set by MLflow
_LONGEST_NAME, _LONGEST_PARAM, _LONGEST_TAG = 250, 6000, 8000  # characters, set by MLflow

# MLflow's client answers an unreachable server by waiting for minutes inside a call; here the
# sender waits instead, and can be told to stop. Variables that the user has set stay as they are.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


_AWAY = (
    "MLflow at %s cannot be reached; training goes on, and its records are sent when MLflow is "
    "back (%s)"
)
_REFUSED = (
    "MLflow at %s refuses the records of this run; training goes on, but nothing is recorded there "
    "until that is mended: restore the experiment or choose another with tracking.experiment, or "
    "log in (%s)"
)
_REFUSALS = (
    *("RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "INVALID_PARAMETER_VALUE", "BAD_REQUEST"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"),
)


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow answered, and will answer so again: the experiment was deleted, a login is
    wrong or missing."""
    code = getattr(error, "error_code", "")
    return code in _REFUSALS or re.search(r"\b40[13]\b", first_line(error)) is not None


class Sender:
    """The thread that carries records from the queue to MLflow."""

    def __init__(self, destination: Destination, queue: deque[Record]):
        self.destination = destination
        self.connected = threading.Event()
        # A daemon: a driver that dies must not hang on a server that does not answer.
        self.thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._queue = queue
        self._taken: list[Record] = []
        self._files: list[Artifact] = []
        self._ending: RunStatus | None = None
        self._client: Any = None
        self._recorded: set[tuple[str, int]] = set()
        self._complaints: set[str] = set()
        self._finishing = threading.Event()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._progress = time.monotonic()

    def flush(self, timeout: float) -> bool:
        """Send what there is now, within `timeout` seconds; whether all of it has arrived."""
        deadline = time.monotonic() + timeout
        self._wake.set()
        while self.unsent() and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self.unsent()

    def finish(self, timeout: float) -> None:
        """Wait until all is sent, or for `timeout` seconds without progress."""
        self._progress = time.monotonic()
        self._finishing.set()
        self._wake.set()
        try:
            while self.thread.is_alive() and time.monotonic() - self._progress < timeout:
                self.thread.join(0.05)
        finally:
            self._stopped.set()

    def unsent(self) -> list[Record]:
        """What MLflow has not confirmed."""
        ending = [self._ending] if self._ending is not None else []
        return [*self._files, *self._taken, *self._queue, *ending]

    def _run(self) -> None:
        away = 0.0  # seconds to wait before the next attempt, 0 while MLflow answers
        while not self._stopped.is_set():
            finishing = self._finishing.is_set()
            try:
                self._deliver()
                if away:
                    log.warning("MLflow at %s is back", redacted(self.destination.uri))
                away = 0.0
                if finishing:
                    return
            except Exception as error:  # whatever it is, training goes on
                if not away:
                    said = _REFUSED if _is_refusal(error) else _AWAY
                    log.warning(said, redacted(self.destination.uri), first_line(error))
                away = min(2 * away or _INTERVAL, _LONGEST_BACKOFF)
                if finishing:
                    self._stopped.wait(_INTERVAL)
            self._wake.wait(away or _INTERVAL)
            self._wake.clear()

    def _deliver(self) -> None:
        if self._client is None:
            self._connect()
        while self._queue:
            # In this order: at every moment a record is in one of the two.
            self._taken.append(self._queue[0])
            self._queue.popleft()
        while self._taken and not self._stopped.is_set():
            count = _batch(self._taken)
            self._send(self._taken[:count])
            del self._taken[:count]
            self._progress = time.monotonic()
        # Last: files may go to a store of their own, whose failure must not keep metrics waiting.
        while self._files and not self._stopped.is_set():
            self._send_file(self._files[0])
            del self._files[0]
            self._progress = time.monotonic()
        # After all else: whoever waits for the run's end finds everything there.
        if self._ending is not None and not self._stopped.is_set():
            ending = self._ending
            self._client.set_terminated(self.destination.run_id, ending.status, ending.time)
            self._ending = None

    def _connect(self) -> None:
        """Find or create the run."""
        new_client = client_class()
        database = sqlite_file(self.destination.uri)
        if database is None:
            client = new_client(self.destination.uri)
            run_id = self._find_or_create_run(client, None)
        else:
            make_folder(database.parent)
            # Two processes that create MLflow's tables at the same time both fail.
            with FileLock(f"{database}.lock"):
                client = new_client(self.destination.uri)
                artifacts = (database.parent / "mlartifacts").as_uri()
                run_id = self._find_or_create_run(client, artifacts)
        self.destination = replace(self.destination, run_id=run_id)
        self._client = client
        self._progress = time.monotonic()
        self.connected.set()

    def _find_or_create_run(self, client: Any, artifacts: str | None) -> str:
        wanted = self.destination
        run = None
        if wanted.run_id is not None:
            run = existing_run(client, wanted.run_id)
            if run is None:
                log.warning("MLflow run %s is gone; its record goes on as a new run", wanted.run_id)
        experiment_id = _experiment_id(client, wanted.experiment, artifacts)
        if run is None:
            found = client.search_runs([experiment_id], f"tags.`{TOKEN}` = '{wanted.token}'")
            run = found[0] if found else None
        if run is not None:
            # A resumed run repeats the iterations after its checkpoint: they are recorded once.
            run_id = str(run.info.run_id)
            self._recorded = {
                (name, metric.step)
                for name in run.data.metrics
                for metric in client.get_metric_history(run_id, name)
            }
            return run_id
        tags = {TOKEN: wanted.token}
        if wanted.parent_run_id is not None:
            tags["mlflow.parentRunId"] = wanted.parent_run_id
        run = client.create_run(experiment_id, wanted.start, tags, wanted.run_name)
        return str(run.info.run_id)

    def _send(self, records: list[Record]) -> None:
        """Send the records of one request: some of metrics, or a single one of another kind."""
        from mlflow.entities import Metric, Param, RunTag

        match records[0]:
            case Metrics():
                entries = [
                    (_name(name), value, record.time, record.step)
                    for record in records
                    if isinstance(record, Metrics)
                    for name, value in record.values.items()
                ]
                new = [e for e in entries if (e[0], e[3]) not in self._recorded]
                self._log("metrics", [Metric(*entry) for entry in new])
            case RunParams(values):
                self._log(
                    "params",
                    [Param(_name(k), _short(v, _LONGEST_PARAM)) for k, v in values.items()],
                )
            case Tags(values):
                self._log(
                    "tags", [RunTag(_name(k), _short(v, _LONGEST_TAG)) for k, v in values.items()]
                )
            case Artifact() as file:
                self._files.append(file)
            case RunStatus("RUNNING"):
                self._client.update_run(self.destination.run_id, "RUNNING")
            case RunStatus() as ending:
                self._ending = ending

    def _send_file(self, file: Artifact) -> None:
        if Path(file.path).exists():
            self._client.log_artifact(self.destination.run_id, file.path, file.folder)
        else:
            self._complain(f"{file.path} is gone: it was not recorded as an artifact")

    def _log(self, kind: str, entries: list[Any]) -> None:
        """Send entries of one kind; those that MLflow refuses for good are named and left out."""
        limit = _LIMIT[kind]
        if len(entries) > limit:
            self._log(kind, entries[:limit])
            self._log(kind, entries[limit:])
            return
        if not entries:
            return
        try:
            self._client.log_batch(self.destination.run_id, **{kind: entries})
        except Exception as error:
            if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            if len(entries) > 1:
                middle = len(entries) // 2
                self._log(kind, entries[:middle])
                self._log(kind, entries[middle:])
            elif kind == "params":
                from mlflow.entities import RunTag

                self._log("tags", [RunTag(f"changed.{entries[0].key}", entries[0].value)])
            else:
                self._complain(f"MLflow refuses {entries[0].key}: {first_line(error)}")

    def _complain(self, message: str) -> None:
        """Log a warning, each message only once."""
        if message not in self._complaints:
            self._complaints.add(message)
            log.warning("%s", message)


def _batch(records: Sequence[Record]) -> int:
    """The number of records, from the first on, that fit into one request."""
    count = size = 0
    for record in records:
        if not isinstance(record, Metrics):
            break
        size += len(record.values)
        if size > _LIMIT["metrics"]:
            break
        count += 1
    return max(1, count)


def client_class() -> Any:
    """Import MlflowClient, set to fail instead of waiting and to log no progress."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient


def existing_run(client: Any, run_id: str) -> Any:
    """MLflow's run with this id; None if it was deleted or belongs to another store."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another driver was faster
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _name(name: str) -> str:
    """A name that MLflow accepts: 'K=5/accuracy' becomes 'K_5/accuracy'."""
    return re.sub(r"[^\w./: -]", "_", name)[:_LONGEST_NAME]


def _short(value: str, longest: int) -> str:
    value = str(value)
    return value if len(value) <= longest else f"{value[: longest - 1]}…"
