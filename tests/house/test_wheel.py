"""The package as somebody installs it: built, installed, and run where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.newcomer import SHORT
from tests.places import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

PACKAGES = ("pipeline", "tasks", "tune_configs")
SHORT_TRAINING = ["train", "sinusoid", *SHORT, "cluster.workers=0"]


def tracked() -> list[Path]:
    """The files that git knows, relative to the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [Path(name) for name in listed.stdout.split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]


# Not isolated: nothing has to be fetched.
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
DROPPED = ("PYTHONPATH", "PYTHONSAFEPATH", "MLFLOW_TRACKING_URI", "MAML_RUNS", "MAML_DEBUG")
"""Variables of the tests' own environment that a newcomer does not have."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: what is left of an older build there would be packed too."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", str(out), str(source)], source)
    (built,) = out.glob("*.whl")
    return built


def dependencies() -> list[str]:
    """The folders of packages of the environment of the tests."""
    return sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})


def newcomers_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in DROPPED}


class Installed:
    """An environment that has the wheel, and the dependencies of the environment of the tests."""

    def __init__(self, folder: Path, wheel: Path):
        run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
        self.python, self.maml = folder / "bin" / "python", folder / "bin" / "maml"
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        run([*pip, "--no-deps", "--no-index", str(wheel)], folder)
        (self.packages,) = folder.glob("lib/python*/site-packages")
        # A folder on PYTHONPATH has no .pth files, by which an editable install of the checkout
        # would be found.
        path = os.pathsep.join([str(self.packages), *dependencies()])
        self.environment = {**newcomers_environment(), "PYTHONPATH": path}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("environment"), wheel)


def run(
    command: list[str], folder: Path, environment: dict[str, str] | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
    return done


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    expected = {
        str(name) for name in tracked() if name.parts[0] in PACKAGES and name.suffix != ".md"
    }
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"tasks/omniglot_splits.json", "tasks/py.typed", "pipeline/py.typed"} <= packed


def test_no_checkout_is_in_sight(installed: Installed, tmp_path: Path) -> None:
    """Also not for a module that the wheel lacks: an editable install would fill the gap."""
    code = (
        "import importlib.util as u, pipeline, tasks, tune_configs\n"
        "for module in (pipeline, tasks, tune_configs): print(module.__file__)\n"
        "assert u.find_spec('benchmarks') is None and u.find_spec('tests') is None\n"
        "assert u.find_spec('tasks.nothing') is None\n"
        "import sys; print(*sys.path, *sys.meta_path, sep='\\n')"
    )
    done = run([str(installed.python), "-c", code], tmp_path, installed.environment)
    files = done.stdout.splitlines()[: len(PACKAGES)]
    assert all(Path(file).is_relative_to(installed.packages) for file in files), files
    assert str(ROOT) not in done.stdout.splitlines()
    assert "editable" not in done.stdout.lower()


def test_the_console_script_works(installed: Installed, tmp_path: Path) -> None:
    def maml(*arguments: str) -> str:
        return run([str(installed.maml), *arguments], tmp_path, installed.environment).stdout

    assert maml("--version").startswith("maml-pipeline ")
    assert "sinusoid-paper" in maml("config", "list")
    assert "MSE after n gradient steps on 4 test tasks" in maml(*SHORT_TRAINING)
    assert (tmp_path / "runs" / "mlflow.db").is_file()


def test_the_module_works(installed: Installed, tmp_path: Path) -> None:
    """As jobs of a cluster start the command."""
    command = [str(installed.python), "-m", "pipeline.cli", *SHORT_TRAINING]
    done = run([*command, "tracking.enabled=false"], tmp_path, installed.environment)
    assert "MSE after n gradient steps on 4 test tasks" in done.stdout


@pytest.mark.parametrize("own", ["tasks.py", "tasks/__init__.py"])
def test_tasks_of_somebody_else_are_named(own: str, installed: Installed, tmp_path: Path) -> None:
    """Also where only Ray's workers would import them: they look into the current folder first."""
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("raise RuntimeError('imported')\n")
    module = [str(installed.python), "-m", "pipeline.cli"]
    for start in ([str(installed.maml)], module, [module[0], "-P", *module[1:]]):
        refused = run([*start, *SHORT_TRAINING], tmp_path, installed.environment, code=2)
        assert refused.stdout == ""
        assert refused.stderr == (
            f"error: {tmp_path / Path(own).parts[0]} hides the project's own package tasks: "
            "rename it, or start in another folder\n"
        )


def test_a_pipeline_of_somebody_else_is_named(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('imported')\n")
    refused = run([str(installed.maml), "--version"], tmp_path, installed.environment, code=2)
    assert f"{tmp_path / 'pipeline.py'} hides the project's own package pipeline" in refused.stderr


def test_tasks_of_somebody_else_on_the_path_are_named(installed: Installed, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tasks.py").write_text("raise RuntimeError('imported')\n")
    path = os.pathsep.join([str(other), installed.environment["PYTHONPATH"]])
    environment = {**installed.environment, "PYTHONPATH": path}
    refused = run([str(installed.maml), "--version"], tmp_path, environment, code=2)
    assert refused.stderr == (
        f"error: {other / 'tasks.py'} hides the project's own package tasks: rename it, or take "
        f"{other} off PYTHONPATH\n"
    )


def test_a_folder_called_tasks_does_no_harm_to_a_wheel(
    installed: Installed, tmp_path: Path
) -> None:
    """Without __init__.py it comes after every package on the path."""
    (tmp_path / "tasks").mkdir()
    run([str(installed.python), "-m", "pipeline.cli", "--version"], tmp_path, installed.environment)


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the checkout as `pip install -e .` installs it."""
    folder = tmp_path_factory.mktemp("editable")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Not PYTHONPATH, which would come before what is installed here.
    (packages / "dependencies.pth").write_text("\n".join(dependencies()))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    run([*pip, "install", *OFFLINE, "-e", str(source)], folder, newcomers_environment())
    return folder / "bin"


def test_a_folder_called_tasks_hides_an_editable_install(editable: Path, tmp_path: Path) -> None:
    """Which is not on the path: Python asks for it after it has looked there."""
    module = [str(editable / "python"), "-m", "pipeline.cli"]
    for command in ([str(editable / "maml")], module):
        run([*command, "--version"], tmp_path, newcomers_environment())
    (tmp_path / "tasks").mkdir()
    for command in ([str(editable / "maml")], module):
        refused = run([*command, "--version"], tmp_path, newcomers_environment(), code=2)
        assert refused.stderr == (
            f"error: {tmp_path / 'tasks'} hides the project's own package tasks: rename it, or "
            "start in another folder\n"
        )
