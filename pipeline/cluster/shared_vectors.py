"""Vectors that processes of one machine share, beside Ray's object store.

A large vector that goes through Ray is copied several times on its way, also within a machine. Here
the driver owns a piece of anonymous memory (`memfd_create`), and workers of the same machine map it
by way of /proc: a call then carries a few numbers, and each vector is written once and read once.

The memory has no name. It is gone when the last process that maps it ends, however that ends, so
nothing can be left behind. A worker that cannot map it (another machine, another container) finds
that out at once, and is sent vectors through Ray instead.

A slot holds one vector and the number of the call that it is for. The number is written last and
looked at before and after reading, so a reader never takes a vector that is half of another one.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pipeline.maml.flat_vector import FlatVector

_PAGE = mmap.PAGESIZE
_UNWRITTEN = -1
_PATIENCE = 30.0  # seconds for a vector to arrive on the node
_TICK = 0.05  # seconds between looks at whether its writer is alive


class Address(NamedTuple):
    """How another process of the machine finds the memory."""

    path: str
    token: int
    """A random number at its start: the same path elsewhere is other memory, or none."""
    slots: int
    size: int
    """Numbers in a slot."""
    dtype: str


class StaleVector(Exception):
    """A slot no longer holds, or does not yet hold, the vector of the call that was asked for."""


class SharedVectors:
    """Slots of one vector each. Made by `create`, or by `attach` in another process."""

    def __init__(self, memory: mmap.mmap, address: Address):
        self.address = address
        dtype = np.dtype(address.dtype)
        stride = _stride(address.size, dtype)
        self._memory = memory
        self._calls = [
            np.frombuffer(memory, np.int64, 1, _PAGE + slot * stride)
            for slot in range(address.slots)
        ]
        self._vectors = [
            np.frombuffer(memory, dtype, address.size, _PAGE + slot * stride + 64)
            for slot in range(address.slots)
        ]

    @classmethod
    def create(cls, slots: int, size: int, dtype: str) -> SharedVectors:
        """New memory of this process. Raises OSError where it would take more than half of what is
        left: the system gives all that it has, and then ends processes."""
        length = _PAGE + slots * _stride(size, np.dtype(dtype))
        if length > _memory_left() / 2:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        descriptor = os.memfd_create("maml-vectors", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, length)  # an error now, not a signal later
            memory = mmap.mmap(descriptor, length)
        except BaseException:
            os.close(descriptor)
            raise
        token = secrets.randbits(62)
        np.frombuffer(memory, np.int64, 1)[0] = token
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        made = cls(memory, Address(path, token, slots, size, dtype))
        made._descriptor = descriptor
        for call in made._calls:
            call[0] = _UNWRITTEN
        return made

    @classmethod
    def attach(cls, address: Address) -> SharedVectors | None:
        """The memory of another process; None where it is not this machine's."""
        try:
            descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            length = _PAGE + address.slots * _stride(address.size, np.dtype(address.dtype))
            if os.fstat(descriptor).st_size != length:
                return None
            memory = mmap.mmap(descriptor, length)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)
        if np.frombuffer(memory, np.int64, 1)[0] != address.token:
            return None
        return cls(memory, address)

    def takes(self, vector: FlatVector | None) -> bool:
        """Whether a vector is one that a slot holds, number for number."""
        return (
            vector is not None
            and vector.shape == (self.address.size,)
            and vector.dtype == np.dtype(self.address.dtype)
        )

    def write(self, slot: int, call: int, vector: FlatVector) -> None:
        """Put the vector of a call into a slot. Raises ValueError for one of another size."""
        if vector.shape != (self.address.size,):
            raise ValueError(f"a slot holds {self.address.size} numbers, got {vector.shape}")
        self._calls[slot][0] = _UNWRITTEN
        self._vectors[slot][:] = vector
        self._calls[slot][0] = call

    def read(self, slot: int, call: int) -> FlatVector:
        """A copy of the vector of a call. Raises StaleVector where the slot has another one."""
        if self.holds(slot, call):
            vector: FlatVector = self._vectors[slot].copy()
            if self.holds(slot, call):
                return vector
        raise StaleVector(f"slot {slot} has no vector of call {call}")

    def holds(self, slot: int, call: int) -> bool:
        """Whether a slot has the vector of a call."""
        return bool(self._calls[slot][0] == call)

    def awaited(self, slot: int, call: int) -> FlatVector:
        """The vector of a call, not copied, to be read only; waits for one that is not there yet.
        Whoever uses it asks `holds` afterwards whether it was there all the time.

        Raises StaleVector where the slot has that of a later call, or where the writer has ended or
        does not write.
        """
        began = time.monotonic()
        while not self.holds(slot, call):
            waited = time.monotonic() - began
            if self._calls[slot][0] > call or waited > _PATIENCE:
                raise StaleVector(f"slot {slot} has no vector of call {call}")
            if waited > _TICK and not os.path.exists(self.address.path):
                raise StaleVector(f"the process that writes slot {slot} has ended")
            time.sleep(_TICK if waited > _TICK else _TICK / 100)
        vector: FlatVector = self._vectors[slot]
        return vector

    def close(self) -> None:
        """Let go of the descriptor; the memory lives until nobody maps it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    _descriptor: int | None = None


def shared_vectors(slots: int, size: int, dtype: str) -> SharedVectors | None:
    """Memory that workers of this machine can map; None where the system has none of the kind."""
    try:
        return SharedVectors.create(slots, size, dtype)
    except (OSError, AttributeError):  # no memory left; no Linux
        return None


def _memory_left() -> float:
    """Bytes that this machine, and this container, may still use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    (left,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # 'max' where the container has no limit
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text())
        left = min(left, limit - int((cgroup / "memory.current").read_text()))
    return left


def _stride(size: int, dtype: np.dtype[np.generic]) -> int:
    """Bytes of a slot: its call in a line of its own, then the vector, up to a whole page."""
    return -(-(64 + size * dtype.itemsize) // _PAGE) * _PAGE
