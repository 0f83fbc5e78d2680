"""Trains the runs of a table of results one after the other, resumably, and reads them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.experiment import Experiment
from pipeline.config.loading import load


class Run(NamedTuple):
    """A run that is finished."""

    name: str
    folder: Path
    experiment: Experiment
    curves: list[dict[str, Any]]
    """Its meta-test, as in results.json."""


def finished(folder: Path, names: Sequence[str]) -> Iterator[Run]:
    """Those of the runs in folder/NAME that are finished."""
    for name in names:
        run = folder / name
        if (run / "results.json").exists():
            curves = json.loads((run / "results.json").read_text())
            yield Run(name, run, load(str(run / "config.yaml")), curves)


def parse(
    parser: argparse.ArgumentParser, what: Sequence[str], runs: Collection[str]
) -> argparse.Namespace:
    """Parse the arguments WHAT and NAME ...; `names` are all runs unless some are given."""
    parser.add_argument("what", choices=what)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(runs)}")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in runs]:
        parser.error(f"no run is called {', '.join(unknown)}; there are {', '.join(runs)}")
    arguments.names = arguments.names or list(runs)
    return arguments


def train(
    runs: Mapping[str, tuple[str, ...]],
    folder: Path,
    names: Sequence[str],
    places: Sequence[str] = (),
) -> None:
    """Train each run with its experiment and overrides, in folder/NAME, without MLflow.

    A finished run is left alone, an interrupted one continues. `places` are overrides of all runs.
    """
    for name in names:
        experiment, *overrides = runs[name]
        target = (folder / name).absolute()
        if (target / "results.json").exists():
            continue
        given = [*overrides, *places, f"run_dir={target}", "tracking.enabled=false"]
        print(f"{name}: maml train {' '.join([experiment, *overrides])}", flush=True)
        command = [sys.executable, "-m", "pipeline.cli", "train", experiment, "--resume", "auto"]
        subprocess.run([*command, *given], check=True)


def minutes(folder: Path, per_batch: int) -> float:
    """Minutes of meta-updates, from the run's records; starting and validating are left out."""
    total, last = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "tasks_per_second" in record:
            total += (record["iteration"] - last) * per_batch / record["tasks_per_second"]
            last = record["iteration"]
    return total / 60
