"""A run as an MLflow model: code, parameters and recipe, loaded without pickle.

The model brings the packages `pipeline` and `tasks` with it, and asks for torch, numpy and a few
small libraries: neither for Ray nor for the data set.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.experiment import Experiment
from pipeline.runs.catalog import find_run
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import Which, check_writable, parameters_of
from pipeline.runs.mlflow_store import TrackingError
from pipeline.runs.predictor import Adapter, Array, Recipe
from pipeline.runs.reading import store_of_folder
from pipeline.worker.task_source import EVALUATION_SEED
from tasks.base import Examples, supervised

HOST, PORT = "127.0.0.1", 5001
"""Where a served model is told to listen; MLflow's own pages take 5000."""
REQUEST = "request.json"
"""The file in a run's folder that asks its model about a test task, where that is of images."""
REQUIREMENTS = ("torch", "numpy", "pydantic", "PyYAML", "safetensors")
"""What the exported code imports; MLflow adds itself."""
_QUERIES = 3  # of an example
_MAX_NUMBERS = 100  # of a request that a person can read
_ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r"[^/:]+")
_ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]+", re.IGNORECASE)  # as MLflow has it


class Exported(NamedTuple):
    """A logged model."""

    uri: str
    """What `mlflow.pyfunc.load_model` and `mlflow models serve` take."""
    store: str
    """The tracking store that has it."""
    version: str | None
    """The version in the registry; None: it was not registered."""
    request: str
    """A shell command that asks the model about a test task when it is served at HOST:PORT."""
    targets: Any
    """The right answer: the labels of the request's queries, or their targets, as nested lists."""


def export_run(
    experiment: Experiment,
    run_dir: Path,
    *,
    checkpoint: Which = "final",
    register: str | None = None,
    alias: str | None = None,
    code: tuple[Path, ...] = (),
) -> Exported:
    """Log the model of a run to the run's own MLflow record, and register it under a name.

    `code` are the files or packages that a task or model of one's own is imported from. Raises
    CheckpointError if the parameters cannot be read, RunFolderError if a request of images cannot
    be written into the folder, TrackingError if MLflow does not take the model, ValueError for a
    name or an alias that MLflow refuses and for `code` that is missing.
    """
    _check_arguments(experiment, register, alias, code)
    adapter = Adapter(Recipe.of(experiment), parameters_of(experiment, run_dir, checkpoint))
    example = example_of(adapter.recipe)
    kept = run_dir.absolute() / REQUEST
    if not example.can_be_read:
        check_writable(run_dir, REQUEST, "export a copy of the run's folder elsewhere")
    run = find_run(str(run_dir), None)
    store = store_of_folder(run_dir.absolute(), None)
    with _mlflow_at(store) as mlflow, tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        mlflow.set_experiment(run.tracking_experiment)
        # Not log_model under start_run: that would open a run again that has ended.
        info = mlflow.models.Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run.run_id,
            registered_model_name=register,
            python_model=str(_ROOT / "pipeline" / "runs" / "mlflow_model.py"),
            artifacts={"adapter": folder},
            code_paths=[str(_ROOT / "pipeline"), str(_ROOT / "tasks"), *map(str, code)],
            pip_requirements=requirements(),
            signature=signature_of(adapter),
            input_example=example.inputs,
        )
        number = info.registered_model_version
        if alias is not None:
            mlflow.MlflowClient().set_registered_model_alias(register, alias, str(number))
    version = None if number is None else str(number)
    if not example.can_be_read:
        write_atomically(kept, body(example))
    request = request_for(example, kept)
    return Exported(info.model_uri, store, version, request, plain(example.targets))


def _check_arguments(
    experiment: Experiment, register: str | None, alias: str | None, code: tuple[Path, ...]
) -> None:
    """Raise ValueError for what MLflow would refuse after all the work."""
    if alias is not None and register is None:
        raise ValueError("--alias: names a version of a registered model; give --register NAME")
    if register is not None and not _NAME.fullmatch(register):
        raise ValueError(f"--register: {register!r} is empty or has a / or : in it")
    if alias is not None and not _ALIAS.fullmatch(alias):
        raise ValueError(
            f"--alias: {alias!r} must be letters, digits, _ and -; latest, v1, v2, ... are taken"
        )
    own = [kind for kind in (experiment.task.kind, experiment.model.kind) if ":" in kind]
    if own and not code:
        raise ValueError(
            f"--code: the model needs {', '.join(own)}; name the file or package that holds it"
        )


@contextmanager
def _mlflow_at(store: str) -> Iterator[Any]:
    """MLflow, which speaks to this store and prints nothing. Raises TrackingError."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(store)
    try:
        # What MLflow has to say there, the caller says more clearly.
        with redirect_stderr(io.StringIO()):
            yield mlflow
    except MlflowException as error:
        raise TrackingError(f"MLflow at {store} did not take the model: {error}") from error
    finally:
        mlflow.set_tracking_uri(before)  # it is this process's, and its children's


def requirements() -> list[str]:
    """pip requirements with the versions that are installed here."""
    names = ("mlflow", *REQUIREMENTS)
    # What follows a + names a build (of torch, for CUDA or CPU), not a version.
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


class Example(NamedTuple):
    """What somebody may ask the model, and what a right answer is."""

    inputs: dict[str, Array]
    """The support set and m queries, as the model's `predict` takes them."""
    targets: Array
    """The true labels of the queries [m], or their targets [m, outputs]."""

    @property
    def can_be_read(self) -> bool:
        """Whether its numbers are so few that a person may read them."""
        return sum(values.size for values in self.inputs.values()) <= _MAX_NUMBERS


def example_of(recipe: Recipe) -> Example:
    """Test task 0 of the experiment: its support set, and three different queries, of different
    classes where there are classes. Inputs have three digits, so that a person can read them.

    Raises ValueError or StoreError if such tasks cannot be sampled.
    """
    task = supervised(recipe.experiment.build_task(), "an exported model")
    batch = task.sample(EVALUATION_SEED, "test", np.arange(1))
    support, query = (Examples(part.x[0], part.y[0]) for part in batch)
    different = query.y if task.has_classes else query.x
    _, first = np.unique(different.numpy(), axis=0, return_index=True)
    chosen = np.sort(first)[:_QUERIES]
    inputs = {"support_x": support.x, "support_y": support.y, "query_x": query.x[chosen]}
    return Example(
        {name: _with_three_digits(x.numpy(), np.float32) for name, x in inputs.items()},
        query.y[chosen].numpy(),
    )


def plain(values: Array) -> Any:
    """Values as nested lists, with three digits; labels as they are."""
    return _with_three_digits(values, np.float64).tolist()


def _with_three_digits(values: Array, dtype: type) -> Array:
    """The values in another precision; labels as they are."""
    if values.dtype.kind == "i":
        return values
    return np.array([float(f"{value:.3g}") for value in values.flat], dtype).reshape(values.shape)


def request_for(example: Example, kept: Path) -> str:
    """A shell command that asks the served model with the example; where that has too many numbers
    to be read, by the file `kept`, which holds its `body`."""
    curl = f"curl http://{HOST}:{PORT}/invocations -H 'Content-Type: application/json' -d"
    return f"{curl} {shlex.quote(body(example) if example.can_be_read else f'@{kept}')}"


def body(example: Example) -> str:
    """The body of a request to the served model, in JSON."""
    inputs = {name: plain(values) for name, values in example.inputs.items()}
    return json.dumps({"inputs": inputs})


def signature_of(adapter: Adapter) -> Any:
    """MLflow's signature of the model; the support set is an input, leading dimensions are free."""
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    recipe = adapter.recipe
    examples, outputs = (-1, *recipe.input_shape), (-1, recipe.output_size)
    labels = TensorSpec(np.dtype(np.int64), (-1,), "support_y")
    targets = TensorSpec(np.dtype(np.float32), outputs, "support_y")
    answer = np.dtype(np.int64 if adapter.classifies else np.float32)
    return ModelSignature(
        inputs=Schema(
            [
                TensorSpec(np.dtype(np.float32), examples, "support_x"),
                labels if adapter.classifies else targets,
                TensorSpec(np.dtype(np.float32), examples, "query_x"),
            ]
        ),
        outputs=Schema(
            [
                TensorSpec(answer, (-1,) if adapter.classifies else outputs, "predictions"),
                TensorSpec(np.dtype(np.float32), outputs, "scores"),
                TensorSpec(np.dtype(np.float64), (-1,), "support_loss"),
            ]
        ),
        # Gradient steps; below 0: as many as the recipe says.
        params=ParamSchema([ParamSpec("steps", "long", -1)]),
    )
