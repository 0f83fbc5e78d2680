"""Who compiles first, who waits, and that nobody is stopped by what is no concern of his."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import compile_lock
from pipeline.cluster.compile_lock import first_to_compile, program_key
from pipeline.worker.program_cache import identity
from tests.conftest import experiment_of

HOLDER = """
import sys
from pipeline.cluster.compile_lock import first_to_compile
with first_to_compile("p", print):
    print("compiling", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_lock, "_QUIET", 0.0)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of program p until its input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "compiling\n"
        yield process
        process.kill()


def somebody_compiles(tmp_path: Path) -> bool:
    """Whether the lock of program p is held, by this process or another."""
    with (tmp_path / "cache" / "maml" / "p.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_second_waits_and_says_for_whom(other: subprocess.Popen[str]) -> None:
    said: list[str] = []
    with first_to_compile("q", said.append):
        assert said == []  # another program is not waited for

    def notice(line: str) -> None:
        said.append(line)
        assert other.stdin is not None
        other.stdin.close()  # it has compiled

    with first_to_compile("p", notice):
        assert said == [f"process {other.pid} compiles the same program first; this one waits"]


def test_a_killed_compiler_stops_nobody(other: subprocess.Popen[str], tmp_path: Path) -> None:
    assert somebody_compiles(tmp_path)
    other.kill()
    with first_to_compile("p", lambda line: None):
        assert somebody_compiles(tmp_path)


def test_what_was_compiled_once_is_nobodys_turn() -> None:
    """The workers of a node warm up side by side once the first has compiled."""
    with first_to_compile("p", print):
        pass
    with first_to_compile("p", print), first_to_compile("p", print):
        pass  # a lock would wait for itself


def test_a_compilation_that_fails_leaves_its_turn_to_the_next(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"), first_to_compile("p", print):
        fail()
    assert not somebody_compiles(tmp_path)
    with first_to_compile("p", print):
        assert somebody_compiles(tmp_path)  # it was not taken for compiled


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_where_there_are_no_locks_the_block_runs(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with first_to_compile("p", print), first_to_compile("p", print):
        pass


def test_where_the_lock_cannot_be_made_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "cache" / "maml" / "p.lock").mkdir(parents=True)
    with first_to_compile("p", print), first_to_compile("p", print):
        pass


def test_a_cache_of_somebody_else_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with first_to_compile("p", print):
        pass
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with first_to_compile("p", print), first_to_compile("p", print):
        pass


def test_a_program_is_known_by_all_of_its_parts() -> None:
    keys = {program_key("a", "b"), program_key("ab"), program_key("a"), program_key("b", "a")}
    assert len(keys) == 4


def test_trials_that_differ_in_rates_alone_share_a_program(quick: dict[str, Any]) -> None:
    def of(**changed: dict[str, Any]) -> str:
        return identity(experiment_of(quick, **changed))

    same = of()
    assert of(inner={"lr": 0.5}) == same
    assert of(outer={"lr": 0.5, "iterations": 7, "optimizer": "sgd"}) == same
    others = [
        {"inner": {"steps": 3}},
        {"outer": {"query_losses": "all"}},
        {"model": {"hidden": [9]}},
    ]
    assert same not in [of(**other) for other in others]
