"""What this machine was busy with, by Linux."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def machine_time() -> tuple[int, int]:
    """Ticks of all cores since boot: busy, and all."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def nodes_time() -> float:
    """Processor time of everything that this process has started, and is alive, in seconds."""
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
    """Received through the loopback device since boot, by everybody."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
