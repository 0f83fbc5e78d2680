"""What survives a crash: checkpoints of the meta-training state.

A checkpoint is two files: tensors (safetensors, bit for bit), then a manifest (JSON) that names the
tensor file and its SHA-256. The manifest is written last and moved into place, so that its
existence means completeness: whatever happens before leaves the previous checkpoint in charge and
at most a leftover, which is ignored, and removed by the next save. On a local disk both files and
the folder are synced before an older checkpoint goes. Nothing is pickled, so loading a checkpoint
runs no code.

    FOLDER/iteration-00000120-1f9c2a7e.safetensors
    FOLDER/iteration-00000120.json

The folder is a local path or any URI that pyarrow.fs knows (file://, s3://, gs://, hdfs://).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.config.experiment import Experiment
from pipeline.config.wording import shown
from pipeline.maml.flat_vector import Params
from pipeline.runs.files import sync, unique_suffix, write_atomically
from tasks.errors import ReportedError

log = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = re.compile(r"iteration-(\d{8,})\.json")
# What this module writes, finished or not; it removes nothing else from the folder.
_OURS = re.compile(r"iteration-\d{8,}(-[0-9a-f]{8}\.safetensors|\.json(\.[0-9a-f]{8}\.tmp)?)")


_KINDS: dict[str, type | tuple[type, ...]] = {
    "scheduler": dict,
    "best": (dict, NoneType),
    "bad_updates": int,
    "config": dict,
    "mlflow_run_id": (str, NoneType),
    "extra": dict,
}
"""The kinds of the values in a state."""


class CheckpointError(ReportedError):
    """A checkpoint that cannot be written or read; `str()` says where, why and what to do."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that meta-training needs to go on as if it had never been stopped."""

    iteration: int
    """Completed meta-updates."""
    tensors: dict[str, Tensor]
    """θ as `theta.NAME` (see `theta_of`), the optimiser's state as `optimizer.KEY.NAME` for what it
    keeps per parameter, `optimizer.KEY` otherwise; loaded on the CPU."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """State of the learning rate schedule; plain JSON values, as all that follows."""
    best: dict[str, Any] | None = None
    """{'iteration', 'value', 'metric'} of the best validation so far."""
    bad_updates: int = 0
    """Non-finite meta-gradients in a row, up to this iteration."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved experiment."""
    mlflow_run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise TypeError for a value of another kind, as an edited manifest has."""
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"state.{name} is {shown(getattr(self, name))}")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a store."""

    iteration: int
    best: bool
    """Whether it was the best on validation when it was saved."""


class CheckpointStore:
    """The checkpoints of one run: the `keep` newest, and the best on validation.

    'Best' is a fact about the moment of saving: it is stored with the checkpoint and never changed,
    and the newest checkpoint that has it is the best one. There is one writer, the driver that has
    the lease of the run's folder (see `claims`).
    """

    def __init__(self, uri_or_path: str | Path, keep: int):
        """Open a store; reads and writes nothing. Raises CheckpointError for an unknown URI."""
        import pyarrow.fs  # here, because a served model reads its parameters without it

        self.folder = str(uri_or_path)
        self.keep = keep
        try:
            if "://" in self.folder:
                self._fs, self._root = pyarrow.fs.FileSystem.from_uri(self.folder)
            else:
                self._fs = pyarrow.fs.LocalFileSystem()
                self._root = str(Path(self.folder).expanduser().absolute())
            self._is_local = isinstance(self._fs, pyarrow.fs.LocalFileSystem)
            self._selector = pyarrow.fs.FileSelector
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint folder {self.folder}: {error}; use a local path or a URI such as "
                "file:///..., s3://BUCKET/..., gs://BUCKET/..."
            ) from error

    @classmethod
    def of_run(cls, experiment: Experiment, run_dir: Path) -> CheckpointStore:
        """The checkpoints of an experiment's run: in its folder, unless configured elsewhere."""
        settings = experiment.checkpoint
        return cls(settings.uri or run_dir / "checkpoints", settings.keep)

    @property
    def local_folder(self) -> Path | None:
        """The folder, where it is on a file system of this machine."""
        return Path(self._root) if self._is_local else None

    def check_writable(self) -> None:
        """Create the folder and write to it once, so that a run fails at its start if it must.

        Raises CheckpointError.
        """
        probe = self._path(f"iteration-00000000.json.{unique_suffix()}.tmp")
        try:
            self._fs.create_dir(self._root, recursive=True)
            self._write(probe, b"")
            self._fs.delete_file(probe)
        except OSError as error:
            raise self._unwritable(error) from error

    def save(self, state: TrainingState, *, best: bool) -> None:
        """Write a checkpoint, then remove those that are no longer kept.

        Checkpoints of later iterations are removed too: the run was resumed before them, because
        they were damaged. So a new run needs a folder of its own (see `list`).

        Raises CheckpointError; the checkpoints before this one stay as they were.
        """
        name = f"iteration-{state.iteration:08d}"
        values = {
            key: getattr(state, key)
            for key in ("scheduler", "best", "bad_updates", "config", "mlflow_run_id", "extra")
        }
        _check_json(values, "state")
        tensors = _to_bytes(state.tensors)
        tensor_file = f"{name}-{unique_suffix()}.safetensors"
        manifest = {
            "format": _FORMAT,
            "iteration": state.iteration,
            "is_best": best,
            "tensors": {
                "file": tensor_file,
                "bytes": len(tensors),
                "sha256": hashlib.sha256(tensors).hexdigest(),
            },
            "state": values,
        }
        unfinished = self._path(f"{name}.json.{unique_suffix()}.tmp")
        try:
            self._fs.create_dir(self._root, recursive=True)
            self._write(self._path(tensor_file), tensors)
            self._write(unfinished, json.dumps(manifest, indent=1).encode())
            self._fs.move(unfinished, self._path(f"{name}.json"))
            self._sync(self._root)  # before those that it supersedes go
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._remove_superseded(state.iteration)
        except OSError as error:
            # The new checkpoint is safe; the next save tries again.
            log.warning("checkpoint folder %s: could not clean up: %s", self.folder, error)

    def latest(self) -> TrainingState | None:
        """The newest intact checkpoint; None if there is none at all.

        Damaged ones are passed over with a warning. Raises CheckpointError if all are damaged.
        """
        iterations = sorted(self._iterations(), reverse=True)
        for iteration in iterations:
            try:
                return self._load(iteration)
            except CheckpointError as error:
                log.warning("%s; looking for an older one", error)
        if not iterations:
            return None
        raise CheckpointError(
            f"checkpoint folder {self.folder}: none of its checkpoints is intact (iteration "
            f"{', '.join(map(str, iterations))}); restore the folder from a copy, or start a new "
            "run in another folder"
        )

    def best(self) -> TrainingState | None:
        """The best checkpoint on validation; None if none was marked as such.

        Raises CheckpointError if it is damaged: another one would be a worse model unannounced.
        """
        for iteration in sorted(self._iterations(), reverse=True):
            if self._manifest(iteration)["is_best"]:
                return self._load(iteration)
        return None

    def list(self) -> tuple[CheckpointInfo, ...]:
        """The checkpoints with a readable manifest, oldest first."""
        infos = []
        for iteration in sorted(self._iterations()):
            try:
                manifest = self._manifest(iteration)
            except CheckpointError:
                continue
            infos.append(CheckpointInfo(iteration, manifest["is_best"]))
        return tuple(infos)

    def _load(self, iteration: int) -> TrainingState:
        """Read a checkpoint and verify it. Raises CheckpointError if it is damaged."""
        manifest = self._manifest(iteration)
        described = manifest["tensors"]
        try:
            content = self._read(self._path(described["file"]))
            if hashlib.sha256(content).hexdigest() != described["sha256"]:
                raise ValueError(
                    f"{described['file']} is not the file that was written "
                    f"({len(content)} bytes, {described['bytes']} were written)"
                )
            tensors = safetensors.torch.load(content)
            return TrainingState(iteration=iteration, tensors=tensors, **manifest["state"])
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise self._damaged(iteration, error) from error

    def _manifest(self, iteration: int) -> dict[str, Any]:
        try:
            manifest = json.loads(self._read(self._path(f"iteration-{iteration:08d}.json")))
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']} is of another version of maml")
            if manifest["iteration"] != iteration or not {"is_best", "tensors", "state"} <= set(
                manifest
            ):
                raise ValueError("the manifest is incomplete")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged(iteration, error) from error
        return dict(manifest)

    def _damaged(self, iteration: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint of iteration {iteration} in {self.folder} is damaged: {error}"
        )

    def _iterations(self) -> set[int]:
        """The iterations that have a manifest, also a damaged one."""
        return {int(m[1]) for name in self._names() if (m := _MANIFEST.fullmatch(name))}

    def _remove_superseded(self, newest: int) -> None:
        """Remove what neither `keep` nor 'best' holds, and leftovers of interrupted saves.

        Manifests go first: a checkpoint must never look complete without its tensors.
        """
        intact = [info for info in self.list() if info.iteration <= newest]
        kept = {info.iteration for info in intact[-self.keep :]}
        kept |= {info.iteration for info in [i for i in intact if i.best][-1:]}
        wanted = set()
        for iteration in kept:
            manifest = self._manifest(iteration)
            wanted |= {f"iteration-{iteration:08d}.json", manifest["tensors"]["file"]}
        unwanted = [name for name in self._names() if _OURS.fullmatch(name) and name not in wanted]
        for name in sorted(unwanted, key=lambda name: not name.endswith(".json")):
            self._fs.delete_file(self._path(name))

    def _names(self) -> set[str]:
        try:
            selector = self._selector(self._root, allow_not_found=True)
            return {info.base_name for info in self._fs.get_file_info(selector)}
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {self.folder} cannot be read: {error}"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _write(self, path: str, content: bytes) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(content)
        self._sync(path)

    def _sync(self, path: str) -> None:
        """Have a file or a folder of this machine on the disk itself; other stores see to it."""
        if self._is_local:
            sync(path)

    def _read(self, path: str) -> bytes:
        with self._fs.open_input_file(path) as file:
            return bytes(file.read())

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoint folder {self.folder} cannot be written: {error}; "
            "choose another with checkpoint.uri or run_dir"
        )


def save_theta(path: str | Path, params: Mapping[str, Tensor]) -> None:
    """Write meta-parameters alone, for use outside of training. Raises WriteError."""
    write_atomically(path, _to_bytes(params))


def load_theta(path: str | Path) -> Params:
    """The meta-parameters that `save_theta` wrote, on the CPU. Raises CheckpointError."""
    try:
        return safetensors.torch.load(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: no meta-parameters can be read here ({error}); "
            "it must be a theta.safetensors that a training run wrote"
        ) from error


def theta_of(tensors: Mapping[str, Tensor]) -> Params:
    """The meta-parameters by name among the tensors of a `TrainingState`, there `theta.NAME`."""
    prefix = "theta."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # Cloned, because safetensors refuses tensors that share memory, such as views of a flat vector.
    return safetensors.torch.save(
        {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
    )


def _check_json(value: Any, path: str) -> None:
    """Raise CheckpointError unless JSON gives exactly this value back.

    `json` itself would turn a tuple into a list, and the key 1 into the key '1', without a word.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{path} cannot be saved: the key {key!r} is a {type(key).__name__}, not a str"
                )
            _check_json(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(inner, f"{path}[{index}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise CheckpointError(
            f"{path} cannot be saved: it is a {type(value).__name__}, not a JSON value"
        )
