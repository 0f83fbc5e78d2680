"""Training the runs that a table of results is made of: one after the other, resumable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def train(
    runs: Mapping[str, tuple[str, ...]],
    folder: Path,
    names: Sequence[str],
    places: Sequence[str] = (),
) -> None:
    """`maml train` with each run's experiment and overrides, in folder/NAME, without MLflow.

    A finished one is left alone, an interrupted one goes on. `places` are overrides of all.
    """
    for name in names:
        experiment, *overrides = runs[name]
        target = (folder / name).absolute()
        if (target / "results.json").exists():
            continue
        resume = ["--resume", str(target)] if (target / "checkpoints").exists() else []
        given = [*overrides, *places, f"run_dir={target}", "tracking.enabled=false"]
        print(f"{name}: maml train {' '.join([experiment, *overrides])}", flush=True)
        command = [sys.executable, "-m", "pipeline.cli", "train", experiment]
        subprocess.run([*command, *(resume or given)], check=True)


def minutes(folder: Path, per_batch: int) -> float:
    """Of meta-updates, from the run's own records; validation and starting aside."""
    total, last = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "tasks_per_second" in record:
            total += (record["iteration"] - last) * per_batch / record["tasks_per_second"]
            last = record["iteration"]
    return total / 60
