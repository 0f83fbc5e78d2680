"""Reads what this machine was busy with from Linux (/proc)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def machine_time() -> tuple[int, int]:
    """Ticks of all cores since boot: the busy ones, and all."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def nodes_time() -> float:
    """Processor time in seconds of all living descendants of this process."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            process = int(path.parent.name)
            parents[process], ticks[process] = int(fields[1]), int(fields[11]) + int(fields[12])
    total = 0
    for process, spent in ticks.items():
        ancestor = parents[process]
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        total += spent if ancestor == os.getpid() else 0
    return total / os.sysconf("SC_CLK_TCK")


def loopback_bytes() -> int:
    """Bytes that the loopback device has received since boot."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def free_memory() -> int:
    """Bytes of memory that are available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
