"""A trained model outside of training: in Python, as an MLflow model, over HTTP."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cluster.group import InProcess
from pipeline.config.experiment import Experiment
from pipeline.config.loading import load, load_run
from pipeline.evaluation.meta_test import EvaluationSpec, task_by_task
from pipeline.maml.flat_vector import flat_vector
from pipeline.runs.catalog import find_run
from pipeline.runs.export import (
    HOST,
    PORT,
    REQUEST,
    REQUIREMENTS,
    Exported,
    example_of,
    export_run,
    plain,
    request_for,
    requirements,
)
from pipeline.runs.folder import parameters_of
from pipeline.runs.mlflow_sender import client_class
from pipeline.runs.predictor import Adapter, Recipe
from pipeline.training.loop import train
from pipeline.worker.task_source import EVALUATION_SEED
from tests.commands import clean_environment, maml
from tests.conftest import experiment_of
from tests.places import ROOT
from tests.ports import free_port
from tests.readme import blocks

pytestmark = pytest.mark.long

WAYS = 3
BASE: dict[str, Any] = {
    "name": "small",
    "outer": {"lr": 0.005, "iterations": 4, "tasks_per_batch": 4},
    "compute": {"compile": "never", "device": "cpu", "threads": 1},
    "cluster": {"workers": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is trained in a folder of its own."""
    folder = tmp_path_factory.mktemp("export")
    experiment = experiment_of(
        {
            **BASE,
            "algorithm": "maml++",
            "task": {"kind": "glyphs", "ways": WAYS, "shots": 2, "queries": 3, "num_classes": 40},
            "model": {"kind": "conv4", "filters": 8},
            "inner": {"lr": 0.5, "steps": 2},
            "evaluation": {"tasks": 6, "validation_tasks": 4, "steps": [0, 2]},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "data": {"root": str(folder / "data")},
        }
    )
    train(experiment, folder / "run")
    return folder / "run"


def sampled(experiment: Experiment, count: int) -> Any:
    return experiment.build_task().sample(EVALUATION_SEED, "test", np.arange(count))


def inputs_of(run: Path) -> dict[str, Any]:
    """Test task 0 as the model takes it, with all of its queries."""
    support, query = sampled(load_run(run), 1)
    parts = {"support_x": support.x, "support_y": support.y, "query_x": query.x}
    return {name: values[0].numpy() for name, values in parts.items()}


def test_it_answers_as_evaluation_does(run: Path) -> None:
    experiment = load_run(run)
    theta = parameters_of(experiment, run)
    with InProcess(experiment, compile=False, warm_up=False) as workers:
        by_task = task_by_task(
            workers, experiment, flat_vector(theta), EvaluationSpec("test", 8, (0, 2))
        )
    adapter = Adapter.load(run)
    batch = sampled(experiment, 8)
    for position, steps in ((0, 0), (1, None)):
        accuracies = []
        for i in range(8):
            found = adapter.predict(
                batch.support.x[i], batch.support.y[i], batch.query.x[i], steps=steps
            )
            accuracies.append((found.predictions == batch.query.y[i].numpy()).mean())
            assert found.scores.sum(-1) == pytest.approx(np.ones(len(found.scores)))
        assert accuracies == pytest.approx(by_task["accuracy"][position].tolist())


def test_labels_are_the_callers_own_and_every_step_is_reported(run: Path) -> None:
    batch = sampled(load_run(run), 1)
    adapter = Adapter.load(run)
    x, y, query = batch.support.x[0], batch.support.y[0], batch.query.x[0]
    plain = adapter.predict(x, y, query)
    named = adapter.predict(x, 10 * y + 4, query)
    assert named.predictions.tolist() == (10 * plain.predictions + 4).tolist()
    assert plain.support_loss.shape == (3,)
    assert plain.support_loss[2] < plain.support_loss[0]
    again = adapter.predict(x, y, query)  # nothing is kept from one call to the next
    assert np.array_equal(plain.scores, again.scores)


def test_regression(quick: dict[str, Any], tmp_path: Path) -> None:
    experiment = experiment_of(quick, compute={"dtype": "float64"})
    train(experiment, tmp_path / "run")
    adapter = Adapter.load(tmp_path / "run")
    batch = sampled(experiment, 1)
    found = adapter.predict(batch.support.x[0], batch.support.y[0], batch.query.x[0])
    assert found.predictions.shape == (5, 1)
    assert found.support_loss[-1] < found.support_loss[0]
    # The request that is printed says the same of the same task, but for rounding.
    example = example_of(adapter.recipe)
    asked = adapter.predict(**json.loads(shlex.split(request_for(example, tmp_path))[-1])["inputs"])
    assert asked.predictions == pytest.approx(found.predictions[:3], rel=0.1, abs=0.01)
    assert asked.support_loss == pytest.approx(found.support_loss, rel=0.1)
    assert plain(example.targets) == pytest.approx(batch.query.y[0][:3].numpy(), rel=0.01)
    with pytest.raises(ValueError, match=r"support_y: must have the shape \[5, 1\]"):
        adapter.predict(batch.support.x[0], batch.support.y[0][:, 0], batch.query.x[0])
    with pytest.raises(ValueError, match="support_y: must be finite"):
        adapter.predict(batch.support.x[0], np.full((5, 1), np.nan), batch.query.x[0])
    with pytest.raises(ValueError, match="diverged"):
        adapter.predict(1e200 * batch.support.x[0].double(), batch.support.y[0], batch.query.x[0])


def test_the_readme_asks_what_export_would_ask() -> None:
    """Of sinusoids: a request that a person can read, and the truth about its queries."""
    example = example_of(Recipe.of(load("sinusoid")))
    (shown,) = (block for block in blocks("bash") if block.startswith("curl "))
    assert shown.strip() == request_for(example, Path("not needed"))
    assert f"`{plain(example.targets)}`" in (ROOT / "pipeline/evaluation/README.md").read_text()
    inputs = json.loads(shlex.split(shown)[-1])["inputs"]
    numbers = [number for rows in inputs.values() for (number,) in rows]
    assert len(numbers) == 10 + 10 + 3
    assert all(float(f"{number:.3g}") == number for number in numbers)
    assert len(set(numbers[-3:])) == 3


def test_an_example_of_classes_asks_about_one_image_of_each(run: Path) -> None:
    example = example_of(Recipe.of(load_run(run)))
    whole = inputs_of(run)
    assert example.inputs["support_x"] == pytest.approx(whole["support_x"], abs=5e-4)
    assert example.inputs["support_y"].tolist() == whole["support_y"].tolist()
    assert example.targets.tolist() == [0, 1, 2]
    assert example.inputs["query_x"] == pytest.approx(whole["query_x"][:3], abs=5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_x": np.zeros((6, 28, 28))}, r"support_x: must have the shape \[n, 1, 28, 28\]"),
        ({"query_x": np.zeros((0, 1, 28, 28))}, r"query_x: must have the shape .* got \[0, 1"),
        ({"query_x": np.full((2, 1, 28, 28), np.nan)}, "query_x: holds 1568 NaN"),
        ({"query_x": "image"}, "query_x: not an array of numbers"),
        ({"support_y": np.array([0, 1, 2])}, r"support_y: must have the shape \[6\]"),
        ({"support_y": np.array([0, 1, 0, 1, 0, 1])}, r"tells 3 classes apart.* has 2 \(0, 1\)"),
        ({"support_y": np.arange(6)}, r"tells 3 classes apart.* has 6"),
        ({"support_y": np.array([0.5] * 6)}, "labels must be integers"),
    ],
)
def test_bad_input_names_the_argument(run: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter.load(run).predict(**{**inputs_of(run), **change})


def test_two_files_are_enough(run: Path, tmp_path: Path) -> None:
    """Neither the data set nor the run's folder is needed afterwards."""
    Adapter.load(run).save(tmp_path / "model")
    recipe = json.loads((tmp_path / "model" / "recipe.json").read_text())
    recipe["experiment"]["data"]["root"] = str(tmp_path / "nowhere")
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe))
    inputs = inputs_of(run)
    one = Adapter.load(run).predict(**inputs)
    other = Adapter.load(tmp_path / "model").predict(**inputs)
    assert np.array_equal(one.scores, other.scores)
    assert not (tmp_path / "nowhere").exists()
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "recipe.json",
        "theta.safetensors",
    }


def test_the_code_imports_nothing_that_is_not_required() -> None:
    script = (
        "import sys; before = set(sys.modules); import pipeline.runs.predictor, tasks.omniglot\n"
        "import tasks.glyphs, tasks.image_folder, tasks.sinusoid, tasks.quadratic\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
    )
    imported = set(done.stdout.split())
    foreign = {"ray", "typer", "rich", "matplotlib", "filelock", "mlflow", "pandas", "pyarrow"}
    assert not imported & foreign
    assert {{"PyYAML": "yaml"}.get(name, name) for name in REQUIREMENTS} <= imported
    assert all("+" not in line for line in requirements())


@pytest.mark.long
@pytest.mark.timeout(400)
def test_in_an_environment_of_its_own_requirements(
    run: Path, exported: Exported, tmp_path: Path
) -> None:
    """A new virtual environment with what the model asks for, and nothing of this one."""
    (model,) = (run.parent / "mlartifacts").glob(f"**/{model_id(exported)}/artifacts")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    venv = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")]
    subprocess.run(venv, check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    # This environment's pip, for that one; compiling files that are never imported takes a minute.
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "-q", "--no-compile", "-r", str(model / "requirements.txt")]
    installed = subprocess.run(install, capture_output=True, text=True, env=environment)
    if "No matching distribution" in installed.stderr or "connection" in installed.stderr:
        pytest.skip(f"cannot install packages here: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    inputs = inputs_of(run)
    np.savez(tmp_path / "inputs.npz", **inputs)
    script = (
        "import sys, json, mlflow, numpy\n"
        f"model = mlflow.pyfunc.load_model({str(model)!r})\n"
        f"inputs = dict(numpy.load({str(tmp_path / 'inputs.npz')!r}))\n"
        "print(json.dumps([model.predict(inputs)['predictions'].tolist(), 'ray' in sys.modules]))"
    )
    done = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    predictions, has_ray = json.loads(done.stdout)
    assert predictions == Adapter.load(run).predict(**inputs).predictions.tolist()
    assert not has_ray


def model_id(exported: Exported) -> str:
    return exported.uri.removeprefix("models:/")


@pytest.fixture(scope="module")
def exported(run: Path) -> Exported:
    """The run's model in MLflow."""
    return export_run(load_run(run), run, register="few-shot", alias="champion")


@pytest.fixture(scope="module")
def served(run: Path, exported: Exported) -> Iterator[str]:
    """The exported model behind MLflow's own server; its address."""
    assert exported.version == "1"
    port = free_port()
    command = ["-m", "mlflow", "models", "serve", "-m", "models:/few-shot@champion"]
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with (run / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *command, *options],
            stdout=log,
            stderr=log,
            env={
                **clean_environment(),
                "MLFLOW_TRACKING_URI": exported.store,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{address}/ping", server)
            yield address
        finally:
            os.killpg(server.pid, 15)
            server.wait(20)


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(address)


def ask(address: str, inputs: dict[str, Any], **more: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations",
        json.dumps({"inputs": inputs, **more}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["predictions"]


def test_over_http(run: Path, served: str) -> None:
    inputs = {name: values.tolist() for name, values in inputs_of(run).items()}
    answer = ask(served, inputs)
    here = Adapter.load(run).predict(**inputs)
    assert answer["predictions"] == here.predictions.tolist()
    np.testing.assert_allclose(answer["scores"], here.scores, rtol=1e-4)
    np.testing.assert_allclose(answer["support_loss"], here.support_loss, rtol=1e-4)
    assert set(answer) == {"predictions", "scores", "support_loss"}
    unadapted = ask(served, inputs, params={"steps": 0})
    assert len(unadapted["support_loss"]) == 1
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(served, {**inputs, "support_y": [0, 1] * 3})
    with caught.value as error:
        assert error.code == 400
        assert "tells 3 classes apart" in json.loads(error.read())["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_request_that_is_printed_works_as_it_is(
    run: Path, exported: Exported, served: str
) -> None:
    """Also that of images, whose numbers are in a file."""
    assert f"@{run / REQUEST}" in exported.request
    shell = exported.request.replace(f"http://{HOST}:{PORT}", served)
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)["predictions"]
    here = Adapter.load(run).predict(**example_of(Recipe.of(load_run(run))).inputs)
    assert answer["predictions"] == here.predictions.tolist()
    np.testing.assert_allclose(answer["support_loss"], here.support_loss, rtol=1e-4)
    assert len(exported.targets) == len(answer["predictions"]) == WAYS


def test_as_mlflow_loads_it(run: Path, exported: Exported) -> None:
    import mlflow

    found = find_run(str(run), None)
    uri = f"sqlite:///{run.parent}/mlflow.db"
    assert not mlflow.is_tracking_uri_set(), "exporting leaves no trace in the process"
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model("models:/few-shot@champion")
    finally:
        mlflow.set_tracking_uri(None)
    inputs = inputs_of(run)
    here = Adapter.load(run).predict(**inputs)
    assert model.predict(inputs)["predictions"].tolist() == here.predictions.tolist()
    assert {spec.name for spec in model.metadata.signature.inputs} == set(inputs)
    # The run has the model, and is as it was.
    again = client_class()(uri).get_run(found.run_id)
    assert again.info.status == "FINISHED"
    assert again.info.end_time == round(found.ended.timestamp() * 1000) if found.ended else False
    assert model_id(exported) in {model.model_id for model in again.outputs.model_outputs}


def test_the_command(run: Path, tmp_path: Path) -> None:
    done = maml("export", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "models:/m-" in done.stdout
    assert "mlflow models serve" in done.stdout
    assert "\nask        curl " in done.stdout
    assert "\ntruth      [0, 1, 2] would be right" in done.stdout
    assert done.stderr == ""
    alone = maml("export", str(run), "--alias", "champion", cwd=tmp_path)
    assert alone.returncode == 2
    assert "--register" in alone.stderr
    for alias in ("latest", "v1", "my champion"):
        taken = maml("export", str(run), "--register", "x", "--alias", alias, cwd=tmp_path)
        assert taken.returncode == 2
        assert "--alias" in taken.stderr
    nowhere = maml("export", str(tmp_path), cwd=tmp_path)
    assert nowhere.returncode == 2
    assert list(tmp_path.iterdir()) == []
