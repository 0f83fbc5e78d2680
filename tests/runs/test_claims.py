"""Names of folders that are claimed, folders that have one writer, and writers that die."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.claims import LEASE, Lease, leased, named_folders, new_folder
from pipeline.runs.folder import RunFolderError
from tests.commands import clean_environment
from tests.conftest import experiment_of

HOLDER = """
import sys
from pathlib import Path
from pipeline.runs.claims import leased
with leased(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that has the lease of tmp_path/run."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_names_that_are_claimed_at_once_differ(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen runs of one experiment that start in the same second."""
    monkeypatch.chdir(tmp_path)
    experiment = experiment_of(quick)
    with ExitStack() as runs, ThreadPoolExecutor(16) as threads:
        claim = lambda _: runs.enter_context(new_folder(experiment))  # noqa: E731
        folders = list(threads.map(claim, range(16)))
        assert len(set(folders)) == 16
        assert all(folder.is_dir() and folder.parent == tmp_path / "runs" for folder in folders)
        assert set(named_folders(experiment)) == set(folders)
        (folders[0] / "config.yaml").touch()
    assert list((tmp_path / "runs").iterdir()) == [folders[0]], "empty ones are given back"


def test_the_newest_folder_comes_first(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAML_RUNS", str(tmp_path))
    names = ["quick-20260101-100000", "quick-20260101-100000-10", "quick-20260101-100000-9"]
    for name in [*names, "quick-search-20260101-100000", "quick-mine"]:
        (tmp_path / name).mkdir()
    assert [folder.name for folder in named_folders(experiment_of(quick))] == [
        names[1],
        names[2],
        names[0],
    ]


def test_the_folder_of_runs_must_be_writable(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAML_RUNS", str(tmp_path / "file"))
    with (
        pytest.raises(RunFolderError, match=r"run_dir: cannot write to .*file/quick"),
        new_folder(experiment_of(quick)),
    ):
        pass


def test_the_second_writer_is_told_who_is_the_first(holder: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = rf"run_dir: {tmp_path}/run is in use by process {holder.pid} on \S+ since 20\d\d-"
    with pytest.raises(RunFolderError, match=said), leased(tmp_path / "run"):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    holder.stdin.close()
    holder.wait()
    assert not (tmp_path / "run").exists(), "nothing was written to it"


def test_a_killed_writer_loses_its_lease_at_once(holder: Any, tmp_path: Path) -> None:
    holder.kill()  # and not yet waited for: a process that is nothing but a number
    began = time.monotonic()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with leased(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LEASE).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run" / LEASE).exists()


def test_another_process_of_the_same_number_is_not_the_writer(tmp_path: Path) -> None:
    with leased(tmp_path):
        lease = json.loads((tmp_path / LEASE).read_text())
    (tmp_path / LEASE).write_text(json.dumps({**lease, "token": "other", "started": "1"}))
    with leased(tmp_path):
        pass


def test_on_another_machine_signs_of_life_count(tmp_path: Path) -> None:
    with leased(tmp_path):
        lease = json.loads((tmp_path / LEASE).read_text())
    elsewhere = {**lease, "token": "other", "machine": "another", "host": "far-away", "pid": 1}
    (tmp_path / LEASE).write_text(json.dumps(elsewhere))
    with pytest.raises(RunFolderError, match="process 1 on far-away"), leased(tmp_path):
        pass
    long_ago = time.time() - 150
    os.utime(tmp_path / LEASE, (long_ago, long_ago))
    with leased(tmp_path):
        pass


def test_a_writer_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runs.claims._SIGN_OF_LIFE", 0.01)
    with leased(tmp_path):
        os.utime(tmp_path / LEASE, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LEASE).stat().st_mtime > time.time() - 60


def test_a_writer_that_was_silent_notices_that_it_is_none_any_more(tmp_path: Path) -> None:
    with leased(tmp_path) as lease:
        lease.check()
        other = json.loads((tmp_path / LEASE).read_text())
        (tmp_path / LEASE).write_text(json.dumps({**other, "token": "other", "pid": 17}))
        with pytest.raises(RunFolderError, match="was taken over by process 17"):
            lease.check()
    assert (tmp_path / LEASE).exists(), "it is the other's"


def test_of_many_only_one_gets_the_lease_of_a_dead_writer(holder: Any, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    ready = threading.Barrier(8)

    def attempt(_: int) -> bool:
        ready.wait()
        try:
            Lease(tmp_path / "run", "run_dir").take()
        except RunFolderError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(8))) == 1


def test_a_lease_that_was_cut_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text('{"token": "ab')
    with leased(tmp_path):
        assert re.search(r'"pid": \d+', (tmp_path / LEASE).read_text())
