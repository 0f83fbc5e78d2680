"""Who compiles first, who waits, and that nobody is stopped by what is no concern of his."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster import compile_lock
from pipeline.cluster.compile_lock import first_to_compile, program_key

HOLDER = """
import sys, time
from pipeline.cluster.compile_lock import first_to_compile
with first_to_compile(sys.argv[1], print):
    print("compiling", flush=True)
    sys.stdin.read()
    if sys.argv[2] == "fails":
        raise RuntimeError("no compiler")
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def holder(program: str, ending: str = "ends") -> subprocess.Popen[str]:
    """Another process that holds the lock until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, program, ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    return process


def test_the_second_waits_and_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_lock, "_QUIET", 0.0)
    said: list[str] = []
    with holder("p") as other:
        assert other.stdin is not None

        def notice(line: str) -> None:
            said.append(line)
            other.stdin.close()  # it has compiled

        with first_to_compile("p", notice):
            assert said == [f"process {other.pid} compiles the same program first; this one waits"]


def test_another_program_is_not_waited_for() -> None:
    with holder("p"):
        began = time.monotonic()
        with first_to_compile("q", print):
            assert time.monotonic() - began < 5


def test_what_was_compiled_once_is_nobodys_turn() -> None:
    """The workers of a node warm up side by side once the first has compiled."""
    with first_to_compile("p", print):
        pass
    with first_to_compile("p", print), first_to_compile("p", print):
        pass  # a lock would wait for itself


def test_a_compilation_that_fails_leaves_its_turn_to_the_next() -> None:
    with holder("p", "fails") as other:
        other.communicate("")
    done = []
    with first_to_compile("p", print):
        done.append("compiled")
    assert done == ["compiled"]


def test_a_killed_compiler_stops_nobody() -> None:
    with holder("p") as other:
        other.kill()
    with first_to_compile("p", print):
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
