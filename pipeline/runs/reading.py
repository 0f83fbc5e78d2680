"""Opens MLflow's stores to read them, without creating any."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.loading import runs_folder
from pipeline.runs.mlflow_sender import client_class
from pipeline.runs.mlflow_store import TrackingError, sqlite_file
from pipeline.runs.tracker import resolve_uri
from tasks.errors import first_line


def default_store(uri: str | None = None) -> str:
    """The store that `maml ui` shows here. Raises TrackingError."""
    return resolve_uri(uri, runs_folder() / "any")


def store_of_folder(folder: Path, uri: str | None) -> str:
    """The tracking store of the run in a folder; `uri` wins. Raises TrackingError."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        tracking = config.get("tracking") or {}
        wanted, enabled = tracking.get("uri"), tracking.get("enabled", True)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise TrackingError(f"{folder / 'config.yaml'} is not a run's configuration") from error
    if not enabled:
        raise TrackingError(f"{folder}: this run was made with tracking.enabled=false")
    return resolve_uri(uri or wanted, folder)


@contextlib.contextmanager
def reading(uri: str, must_exist: bool = False) -> Iterator[Any]:
    """A client that reads this store, or None where there is nothing to read.

    Raises TrackingError, also for what goes wrong while reading.
    """
    database = sqlite_file(uri)
    if database is not None and not _has_runs(database):
        if must_exist:
            raise TrackingError(f"there are no runs in {database}: train something first")
        yield None
        return
    try:
        yield client_class()(uri)
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if not isinstance(error, MlflowException):
            raise
        raise TrackingError(f"cannot read the runs of {uri}: {first_line(error)}") from error


def _has_runs(database: Path) -> bool:
    """Whether there is anything in a SQLite store; MLflow would create it by looking.

    Raises TrackingError for what cannot be read.
    """
    try:
        database.stat()  # which, unlike is_file, also tells where nobody may look
        if database.is_dir():
            raise TrackingError(f"{database} is not a tracking store: it is a folder")
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as store:
            tables = store.execute("SELECT name FROM sqlite_master WHERE name = 'runs'").fetchall()
            return bool(tables) and bool(store.execute("SELECT 1 FROM runs LIMIT 1").fetchall())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, sqlite3.OperationalError) as error:
        why = getattr(error, "strerror", None) or error
        raise TrackingError(
            f"cannot open {database}: {why}; make it readable, or name another store"
        ) from error
    except sqlite3.Error as error:
        raise TrackingError(f"{database} is not a tracking store: {error}") from error
