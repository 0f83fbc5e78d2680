"""Vectors in shared memory: whole or refused, and nothing left when their processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.shared_vectors import Address, SharedVectors, StaleVector

READER = """
import sys, numpy as np
from pipeline.cluster.shared_vectors import Address, SharedVectors
address = Address(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5])
shared = SharedVectors.attach(address)
if shared is None:
    sys.exit("not this machine's")
shared.write(1, 8, shared.read(0, 7) * 2)
print("done", flush=True)
sys.stdin.read()
"""


def other_process(address: Address) -> subprocess.Popen[str]:
    """A process that attaches, doubles slot 0 into slot 1, and waits to be ended."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, *map(str, address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_another_process_reads_and_writes() -> None:
    shared = SharedVectors.create(2, 1000, "float32")
    vector = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    shared.write(0, 7, vector)
    with other_process(shared.address) as process:
        out, _ = process.communicate("")
        assert out == "done\n"
    assert np.array_equal(shared.read(1, 8), 2 * vector)
    shared.close()


def test_the_vector_of_another_call_is_refused() -> None:
    shared = SharedVectors.create(1, 3, "float64")
    with pytest.raises(StaleVector):
        shared.read(0, 0)
    shared.write(0, 5, np.arange(3.0))
    with pytest.raises(StaleVector, match="no vector of call 4"):
        shared.read(0, 4)
    with pytest.raises(ValueError, match=r"holds 3 numbers, got \(4,\)"):
        shared.write(0, 6, np.zeros(4))
    assert np.array_equal(shared.read(0, 5), np.arange(3.0)), "nothing was overwritten"


def test_what_was_read_stays_when_the_slot_is_written_again() -> None:
    shared = SharedVectors.create(1, 3, "float64")
    shared.write(0, 1, np.ones(3))
    taken = shared.read(0, 1)
    shared.write(0, 2, np.zeros(3))
    assert np.array_equal(taken, np.ones(3))


@pytest.mark.parametrize("wrong", ["token", "pid", "file"])
def test_memory_of_elsewhere_is_noticed(wrong: str, tmp_path: Path) -> None:
    """As on another machine, where the path leads to nothing or to something else."""
    shared = SharedVectors.create(1, 3, "float64")
    address = shared.address
    if wrong == "token":
        address = address._replace(token=address.token + 1)
    elif wrong == "pid":
        address = address._replace(path="/proc/4194304/fd/3")
    else:
        (tmp_path / "file").write_bytes(b"short")
        address = address._replace(path=str(tmp_path / "file"))
    assert SharedVectors.attach(address) is None


def test_a_killed_process_leaves_nothing() -> None:
    """The memory has no name: no file in /dev/shm, before or after."""
    before = set(os.listdir("/dev/shm"))
    script = (
        "import sys; from pipeline.cluster.shared_vectors import SharedVectors\n"
        "shared = SharedVectors.create(4, 100_000, 'float32')\n"
        "print(*shared.address, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        path, token, slots, size, dtype = owner.stdout.readline().split()
        address = Address(path, int(token), int(slots), int(size), dtype)
        assert SharedVectors.attach(address) is not None
        owner.send_signal(signal.SIGKILL)
    assert SharedVectors.attach(address) is None
    assert set(os.listdir("/dev/shm")) <= before


def test_no_memory_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match=r"space|large|memory"):
        SharedVectors.create(1, 2**50, "float32")
