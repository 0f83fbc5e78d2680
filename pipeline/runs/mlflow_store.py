"""The addresses of MLflow's stores: databases, servers, and the credentials of both."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.credentials import HIDDEN, redacted
from tasks.errors import ReportedError

STORE = "MLFLOW_TRACKING_URI"
"""Environment variable that holds the default of `tracking.uri`."""


class TrackingError(ReportedError):
    """Tracking cannot work with these settings; `str()` says what to do."""


def with_credentials(uri: str) -> str:
    """A recorded address with the credentials that were left out of it: MLFLOW_TRACKING_URI's.

    Raises TrackingError where that is another address.
    """
    if HIDDEN not in uri:
        return uri
    known = os.environ.get(STORE, "")
    if redacted(known) != uri:
        raise TrackingError(
            f"the credentials of {uri} are not recorded: set {STORE} to the whole address"
        )
    return known


def sqlite_file(uri: str) -> Path | None:
    """The absolute path of a SQLite store, None for other stores."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None
