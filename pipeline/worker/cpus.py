"""How many CPUs this process may use, which is often fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs that this process may use: those it is bound to (taskset, Slurm), and no more than its
    container's quota (docker --cpus, limits in Kubernetes), rounded up. `cgroup` is where the
    control groups are mounted."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota(cgroup)
    return max(1, min(bound or 1, math.ceil(quota) if quota else bound or 1))


def _quota(cgroup: Path) -> float | None:
    """CPUs that the control group grants; None where it sets no limit."""
    for limit, period in (
        ("cpu.max", None),  # version 2: both in one file
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ):
        try:
            words = (cgroup / limit).read_text().split()
            if period is not None:
                words += (cgroup / period).read_text().split()
            granted, of = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):
            continue  # no such file; or "max", no limit
        if granted > 0 and of > 0:
            return granted / of
    return None
