"""What a run tells MLflow, record by record, and the file for records that could not be sent."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import json_text
from pipeline.runs.files import write_atomically
from pipeline.runs.mlflow_store import TrackingError
from tasks.credentials import redacted


@dataclass(frozen=True, slots=True)
class Metrics:
    """Values measured at one step; `time` in milliseconds since 1970."""

    values: dict[str, float]
    step: int
    time: int


@dataclass(frozen=True, slots=True)
class RunParams:
    """Settings of the run: MLflow's params."""

    values: dict[str, str]


@dataclass(frozen=True, slots=True)
class Tags:
    """Labels of the run."""

    values: dict[str, str]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A local file, and the folder among the run's artifacts that it goes to."""

    path: str
    folder: str | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """RUNNING again, or how the run ended; `time` in milliseconds since 1970."""

    status: str
    time: int


Record = Metrics | RunParams | Tags | Artifact | RunStatus
_KINDS: dict[str, type[Record]] = {
    "Metrics": Metrics,
    "Params": RunParams,
    "Tags": Tags,
    "Artifact": Artifact,
    "RunStatus": RunStatus,
}
"""Records by the name that they have in a file of unsent ones."""


@dataclass(frozen=True)
class Destination:
    """The MLflow run that records are for."""

    uri: str
    experiment: str
    run_name: str
    run_id: str | None = None
    """None: the run is not created yet, or nobody has confirmed it (see `token`)."""
    parent_run_id: str | None = None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Finds the run again if its creation was never confirmed."""
    start: int = field(default_factory=lambda: now())


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def write_unsent(path: Path, destination: Destination, records: Sequence[Record]) -> None:
    """Write records that MLflow has not confirmed, one per line, without the credentials of its
    address. Raises WriteError."""
    lines = [{**asdict(destination), "uri": redacted(destination.uri)}]
    names = {kind: name for name, kind in _KINDS.items()}
    lines += [{"kind": names[type(record)], **asdict(record)} for record in records]
    write_atomically(path, "".join(json_text.write(line, indent=None) + "\n" for line in lines))


def _record(kind: str, **fields: Any) -> Record:
    """The record that a line holds. Raises TypeError, KeyError."""
    if kind == "Metrics":
        values = fields["values"].items()
        fields["values"] = {name: math.nan if v is None else v for name, v in values}
    return _KINDS[kind](**fields)


def read_unsent(path: Path) -> tuple[Destination, list[Record]]:
    """Read what `write_unsent` wrote. Raises TrackingError."""
    try:
        first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
        return Destination(**first), [_record(**line) for line in rest]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrackingError(f"{path} does not hold unsent records of a run: {error!r}") from error
