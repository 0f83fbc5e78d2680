"""A run's folder: what is where, what is refused, and how it is written.

RUN_DIR/config.yaml          the resolved configuration
RUN_DIR/checkpoints/         the newest ones and the best (elsewhere with `checkpoint.uri`)
RUN_DIR/metrics.jsonl        what was logged while training, one line per record
RUN_DIR/theta.safetensors    the final parameters
RUN_DIR/results.json         the meta-test, every number with its protocol
RUN_DIR/plots/               PNG
RUN_DIR/analysis/            what `maml analyze` found
RUN_DIR/request.json         what asks a served model of images (`maml export`)
RUN_DIR/.lease               who writes to it at the moment, see `claims`
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.config import json_text
from pipeline.config.experiment import Experiment
from pipeline.config.loading import load_run
from pipeline.config.wording import shown
from pipeline.maml.flat_vector import Layout, Params
from pipeline.runs.checkpoint import (
    CheckpointError,
    CheckpointStore,
    TrainingState,
    load_theta,
    theta_of,
)
from pipeline.runs.files import make_folder, write_atomically
from pipeline.worker.learner import initial_parameters
from tasks.errors import ReportedError

Which = Literal["final", "best"]
"""Whose parameters: those of the last iteration, or of the best validation."""
_TRAINED = ("metrics.jsonl", "theta.safetensors", "results.json")  # what training leaves


class RunFolderError(ReportedError):
    """The run's folder cannot be used as asked; `str()` says what to do."""


def check_writable(
    folder: Path, setting: str = "run_dir", otherwise: str = "choose another folder"
) -> None:
    """Make a folder, by default that of a run or a search, for its user alone (`make_folder`).

    Raises RunFolderError if nothing can be written; it names the `setting` that chose the folder,
    and what to do.
    """
    try:
        make_folder(folder)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise RunFolderError(
            f"{setting}: cannot write to {folder}: {error.strerror}; {otherwise}"
        ) from error


@contextlib.contextmanager
def taken_back_if_it_fails(run_dir: Path) -> Iterator[None]:
    """Around the start of a new run: where it ends early, what it wrote goes again, so that the
    folder does not look like a run that can be continued.

    Everything stays where the folder has gained more than the start of a run writes.
    """
    before = {path.name for path in run_dir.iterdir()}
    config = run_dir / "config.yaml"  # of a run that was killed before it had a checkpoint
    killed = config.read_bytes() if config.is_file() else None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what cannot be removed stays
            _take_back(run_dir, before)
        if killed is not None:
            write_atomically(config, killed)
        raise


def _take_back(run_dir: Path, before: set[str]) -> None:
    """Remove what a start wrote; `before` is what the folder held. Raises OSError."""
    gained = {path.name for path in run_dir.iterdir()} - before
    if not gained <= {"config.yaml", "checkpoints"}:
        return
    if "checkpoints" in gained:
        (run_dir / "checkpoints").rmdir()  # raises if there is one in it: then all of it stays
    if "config.yaml" in gained:
        (run_dir / "config.yaml").unlink()


def refuse_to_overwrite(run_dir: Path, store: CheckpointStore) -> None:
    """Raise RunFolderError if the folder or its checkpoint folder already holds a run.

    A run that was killed before its first checkpoint has nothing that could be lost: it is none.
    """
    if store.list() or _has_trained(run_dir):
        raise RunFolderError(
            f"run_dir: {run_dir} (or its checkpoint folder) already holds a run; continue it with "
            f"--resume {run_dir}, or choose another folder"
        )


def state_to_resume(run_dir: Path, store: CheckpointStore) -> TrainingState | None:
    """Load the newest state; None if the run was killed before it had one.

    Raises RunFolderError if there is no run, or if it has trained but its checkpoints are gone;
    CheckpointError if all are damaged.
    """
    state = store.latest()
    begun = (run_dir / "config.yaml").is_file()
    if state is None and (not begun or _has_trained(run_dir)):
        raise RunFolderError(f"{store.folder} holds no checkpoint to resume from")
    if state is not None:
        _check_state(state, store)
    return state


def _has_trained(run_dir: Path) -> bool:
    """Whether the folder holds anything that training wrote, or checkpoints elsewhere say so."""
    if any((run_dir / name).exists() for name in _TRAINED):
        return True
    if not (run_dir / "config.yaml").exists():
        return False
    try:
        return bool(CheckpointStore.of_run(load_run(run_dir), run_dir).list())
    except ReportedError:
        return True  # a configuration that cannot be read may be that of a run


_GOES_ON_WITH: dict[str, dict[str, Any]] = {
    "scheduler": {"steps": int},
    "extra": {"compile": bool, "threads": int, "tracking_token": str},
    "best": {"iteration": int, "value": (int, float), "metric": str},
}
"""What a run needs of its checkpoint's state, and of which kind."""


def _check_state(state: TrainingState, store: CheckpointStore) -> None:
    """Raise CheckpointError where the state of a checkpoint lacks what a run goes on with: somebody
    has edited it."""
    found = {"scheduler": state.scheduler, "extra": state.extra, "best": state.best}
    for name, values in found.items():
        if values is None:  # no validation yet
            continue
        for key, kind in _GOES_ON_WITH[name].items():
            if not isinstance(values.get(key), kind):
                raise CheckpointError(
                    f"checkpoint of iteration {state.iteration} in {store.folder} is damaged: "
                    f"state.{name}.{key} is {shown(values.get(key))}"
                )


def parameters_of(experiment: Experiment, run_dir: Path, checkpoint: Which = "final") -> Params:
    """Load the meta-parameters of a run: those of the last iteration, or of the best validation.

    Raises CheckpointError if they cannot be read or do not fit the experiment's model.
    """
    if checkpoint == "final":
        theta = load_theta(run_dir / "theta.safetensors")
    else:
        store = CheckpointStore.of_run(experiment, run_dir)
        state = store.best()
        if state is None:
            raise CheckpointError(
                f"{store.folder} holds no checkpoint that was the best on validation"
            )
        theta = theta_of(state.tensors)
    layout = Layout.of(initial_parameters(experiment))
    if Layout.of(theta).shapes_by_name != layout.shapes_by_name:
        raise CheckpointError(f"the parameters in {run_dir} do not fit the model of config.yaml")
    return {name: theta[name] for name, _ in layout.shapes}


class History:
    """The records in RUN_DIR/metrics.jsonl: one line each, its iteration and metrics by name."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "metrics.jsonl"

    def append(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an iteration."""
        with self._path.open("a") as file:
            file.write(_line({"iteration": iteration, **metrics}))

    def records(self) -> list[dict[str, float]]:
        """All records, oldest first; none where there is no file. NaN stands for a value that was
        not finite. The half of a line that a crash left, or that is being written, is left out,
        and so is whatever else is no record."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        return [record for line in lines if (record := _record(line))]

    def content(self) -> bytes:
        """The file; nothing where there is none."""
        return self._path.read_bytes() if self._path.exists() else b""

    def rebuild(self, content: bytes) -> None:
        """Write the file anew from what `content` was, unless it is there."""
        if not self._path.exists():
            write_atomically(self._path, content)

    def first(self, name: str) -> float | None:
        """The first finite value of a metric; None if there is none."""
        values = (record.get(name, math.nan) for record in self.records())
        return next(filter(math.isfinite, values), None)

    def forget_after(self, iteration: int) -> None:
        """Drop the records after a checkpoint: they will be made again."""
        if self._path.exists():
            kept = [record for record in self.records() if record["iteration"] <= iteration]
            write_atomically(self._path, "".join(map(_line, kept)))


def _line(record: Mapping[str, float]) -> str:
    return json_text.write(dict(record), indent=None) + "\n"


def _record(line: bytes) -> dict[str, float] | None:
    """The record in a line; None if there is none."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            return None
        record = {name: math.nan if v is None else v for name, v in values.items()}
        return record if all(map(_is_number, record.values())) and "iteration" in record else None
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
