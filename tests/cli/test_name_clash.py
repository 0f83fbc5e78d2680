"""Which packages `pipeline` and `tasks` the command accepts, in copies of an installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import clean_environment
from tests.places import ROOT

# As the console script starts the command: the current folder is not on Python's own path.
SCRIPT = [sys.executable, "-P", "-c", "from pipeline.cli.__main__ import main; main()", "--version"]
MODULE = [sys.executable, "-m", "pipeline.cli", "--version"]


def copy_of_packages(folder: Path) -> Path:
    for package in ("pipeline", "tasks"):
        source, unwanted = ROOT / package, shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / package, ignore=unwanted)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the packages and nothing else, as site-packages."""
    return copy_of_packages(tmp_path / "site")


def start(command: list[str], folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", [SCRIPT, MODULE])
def test_our_own_packages_are_accepted(command: list[str], site: Path, tmp_path: Path) -> None:
    done = start(command, tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("maml-pipeline ")


def test_a_distribution_that_replaced_our_files_is_named(site: Path, tmp_path: Path) -> None:
    """In the same folder, so that only its content tells it from ours; our other files stay."""
    (site / "tasks" / "__init__.py").write_text("from tasks.queue import Queue\n")
    done = start(SCRIPT, tmp_path, site)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {site / 'tasks'} is not the project's own package tasks: another distribution "
        "has replaced its files; uninstall that one, and install this one again\n"
    )


def test_another_checkout_is_called_one(site: Path, tmp_path: Path) -> None:
    other = copy_of_packages(tmp_path / "other")
    done = start(SCRIPT, other, site)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {other / 'pipeline'} belongs to another checkout of this project than this "
        f"command, which is installed from {site}: install that checkout (pip install -e "
        f"{other}), or start in another folder\n"
    )


@pytest.mark.parametrize("command", [SCRIPT, MODULE])
def test_a_current_folder_that_is_gone_does_no_harm(
    command: list[str], site: Path, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    deleting = ["sh", "-c", 'rmdir ../gone && exec "$@"', "sh", *command]
    done = start(deleting, tmp_path / "gone", site)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
