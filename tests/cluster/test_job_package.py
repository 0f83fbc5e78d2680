"""What travels with a job, and what does not."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipeline.cluster.job_package import LIMIT, JobError, files_to_ship, hash_of, packed
from pipeline.runs.source import SOURCE, source_tags
from pipeline.runs.tracker import environment_tags
from tests.commands import maml
from tests.places import ROOT


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def own(folder: Path) -> set[str]:
    """What travels beside the project's packages."""
    packages = ("pipeline/", "tasks/", "tune_configs/")
    return {name for name in files_to_ship(folder).files if not name.startswith(packages)}


def test_git_decides(tmp_path: Path) -> None:
    git(tmp_path, "init")
    write(tmp_path, "mine.yaml", "gone.py", "big.bin", "data/split.csv", "notes.txt", ".env")
    (tmp_path / ".gitignore").write_text("*.bin\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "x")
    (tmp_path / "gone.py").unlink()
    write(tmp_path, "new.py", "data/store/images.arrow", "runs/a/config.yaml", "sub/venv/x.py")
    write(tmp_path, ".ssh/id_rsa", ".aws/credentials", ".hidden/x.py", "id_rsa", "weights.pt")
    assert own(tmp_path) == {"mine.yaml", "new.py", "notes.txt", "data/split.csv"}
    assert "3 that git tracks, 1 new *.py and *.yaml" in files_to_ship(tmp_path).summary()
    write(tmp_path, "sub/inner.py")
    assert own(tmp_path / "sub") == {"inner.py"}, "the current folder, not its repository"


def test_without_git_code_and_settings(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "b/c.py", "b/d.yml", "data/x.py", "runs/y.yaml", ".venv/z.py")
    write(tmp_path, "b/__pycache__/c.py", "secrets.json", ".netrc", ".ray/auth_token", "venv/v.py")
    assert own(tmp_path) == {"a.yaml", "b/c.py", "b/d.yml"}
    assert "*.py and *.yaml outside of git" in files_to_ship(tmp_path).summary()


@pytest.mark.parametrize("where", [".", "..", "/"])
def test_a_home_directory_is_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "me"
    write(home / "experiments", "mine.py")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(JobError, match="is a home directory, or holds one"):
        files_to_ship(home / where)
    assert own(home / "experiments") == {"mine.py"}


def test_a_folder_that_its_repository_ignores_travels_too(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("scratch/\n")
    write(tmp_path / "scratch", "mine.yaml")
    assert own(tmp_path / "scratch") == {"mine.yaml"}


def test_the_project_travels_with_any_folder(tmp_path: Path) -> None:
    """Its code as it is here, so that nodes need only its dependencies."""
    for folder in (tmp_path, ROOT):
        files = files_to_ship(folder).files
        for name in (
            "pipeline/cli/__main__.py",
            "tasks/omniglot_splits.json",
            "tune_configs/sinusoid.yaml",
        ):
            assert files[name].read_bytes() == (ROOT / name).read_bytes()
        assert not [name for name in files if "__pycache__" in name or ".venv" in name]
    assert "pyproject.toml" in own(ROOT)


def test_a_package_of_the_same_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "tasks/notes.txt")
    assert own(tmp_path) == set()
    write(tmp_path, "tasks/__init__.py")
    with pytest.raises(JobError, match="would hide the project's own package tasks"):
        files_to_ship(tmp_path)


def test_the_same_files_are_the_same_package(tmp_path: Path) -> None:
    """A head that has it already is sent nothing."""
    write(tmp_path, "a.py", "b.py")
    digests = []
    for seconds in (1e9, 1.5e9):
        os.utime(tmp_path / "a.py", (seconds, seconds))
        with packed(files_to_ship(tmp_path)) as package:
            assert hash_of(package) == hashlib.sha256(package.read_bytes()).hexdigest()
            digests.append(hash_of(package))
            with zipfile.ZipFile(package) as zipped:
                assert zipped.read("a.py") == b"a.py"
    assert digests[0] == digests[1]
    write(tmp_path, "c.py")
    with packed(files_to_ship(tmp_path)) as package:
        assert hash_of(package) != digests[0]


@pytest.mark.parametrize("kind", ["noise", "huge"])
def test_what_does_not_fit_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    write(tmp_path, "small.py")
    with (tmp_path / "weights.yaml").open("wb") as file:
        if kind == "noise":
            file.write(os.urandom(LIMIT))  # cannot be packed smaller
        else:
            file.truncate(11 * LIMIT)
    selection = files_to_ship(tmp_path)
    with pytest.raises(JobError, match=r"takes 100 MiB") as caught, packed(selection):
        pass
    assert "weights.yaml" in str(caught.value).splitlines()[0]
    assert "data.root" in str(caught.value)


def test_a_broken_repository_is_named(tmp_path: Path) -> None:
    """Guessing would ship what git ignores."""
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    write(tmp_path, "a.py")
    with pytest.raises(JobError, match="git cannot list"):
        files_to_ship(tmp_path)


def test_a_dry_run_lists_the_files_and_submits_nothing(tmp_path: Path) -> None:
    """It needs no head."""
    write(tmp_path, "mine.py", "photo.jpg", ".env")
    done = maml(
        *("submit", "--dry-run", "--env", "API_KEY", "--address", "127.0.0.1:9"),
        *("--", "train", "sinusoid"),
        cwd=tmp_path,
        API_KEY="hunter2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("          7  mine.py\n")
    assert "pipeline/cli/__main__.py" in done.stdout
    assert not {"photo.jpg", ".env", "hunter2"} & set(done.stdout.replace("  ", "\n").split("\n"))
    assert "hunter2" not in done.stdout + done.stderr
    assert "API_KEY" in done.stdout
    assert "*.py and *.yaml outside of git, and the project's packages" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("nothing was submitted")


def test_a_run_says_which_commits_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's and that of the user's own repository; in a job, those of where it began."""
    git(tmp_path, "init")
    write(tmp_path, "mine.py")
    monkeypatch.chdir(tmp_path)
    assert "own.git.commit" not in source_tags(), "nothing is committed"
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "x")
    clean = source_tags()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert clean["own.git.commit"] == head.stdout.strip()
    assert clean["own.git.dirty"] == "false"
    write(tmp_path, "mine.py", "new.py")
    (tmp_path / "mine.py").write_text("changed")
    assert source_tags() == {**clean, "own.git.dirty": "true"}
    monkeypatch.chdir(ROOT)
    assert not any(name.startswith("own.") for name in source_tags())
    monkeypatch.setenv(SOURCE, '{"mlflow.source.git.commit": "abc", "job.package": "def"}')
    assert source_tags() == {"mlflow.source.git.commit": "abc", "job.package": "def"}
    assert environment_tags()["job.package"] == "def"
