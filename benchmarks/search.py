"""Measures what a search costs beyond its trainings: Ray Tune against a plain loop.

    python benchmarks/search.py                     16 sinusoid trials of 2,000 iterations (minutes)
    python benchmarks/search.py --iterations 500    shorter

Three ways to go through the same 16 settings, each in a process of its own, MLflow and validation
included: one after the other in one process without Tune; `maml search` with scheduler none; with
asha. Programs are compiled to disk before anything is timed; loading them is part of the time. The
plain loop runs before and after the searches, because the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.config.experiment import Experiment
from pipeline.config.loading import load, with_settings
from pipeline.search.run import run_search
from pipeline.search.trial import sized_as_trial
from pipeline.training.loop import MetaLearning, meta_train
from pipeline.training.opening import open_session
from pipeline.training.session import Watcher


def settings_of_trials() -> list[dict[str, object]]:
    """16 settings, none of which diverges: four rates, two numbers of steps, both orders."""
    return [
        {"inner.lr": rate, "inner.steps": steps, "inner.order": order}
        for rate in (0.001, 0.003, 0.01, 0.02)
        for steps in (1, 5)
        for order in ("second", "first")
    ]


def experiment(iterations: int, scheduler: str) -> Experiment:
    """The shipped search, over a grid of these settings."""
    trials = settings_of_trials()
    space = {path: sorted({str(t[path]) for t in trials}) for path in trials[0]}
    return load(
        "sinusoid-search",
        [
            f"outer.iterations={iterations}",
            f"search.scheduler={scheduler}",
            "search.algorithm=grid",
            *(f"search.space.{path}={{grid: [{', '.join(v)}]}}" for path, v in space.items()),
        ],
    )


def one_after_the_other(folder: Path, iterations: int) -> None:
    """Train the settings in a plain loop."""
    base = sized_as_trial(experiment(iterations, "none"))
    for number, settings in enumerate(settings_of_trials()):
        run_dir = folder / "runs" / str(number)
        with open_session(
            with_settings(base, settings), run_dir, MetaLearning(), False, Watcher()
        ) as session:
            meta_train(session)


def timed(way: str, iterations: int) -> float:
    """Seconds that one way takes, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--way", way, "--iterations", str(iterations)]
        # The same priority for all ways: Ray would let its processes give way to others.
        environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        started = time.perf_counter()
        subprocess.run([*command, "--folder", folder], check=True, env=environment)
        return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--way", choices=["loop", "none", "asha"], help="for its own processes")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.way == "loop":
        one_after_the_other(arguments.folder, arguments.iterations)
        return
    if arguments.way:
        found = run_search(
            experiment(arguments.iterations, arguments.way), arguments.folder / "runs" / "search"
        )
        assert len(found.trials) == 16
        return
    timed("loop", 20)  # compiles
    before = timed("loop", arguments.iterations)
    tune, asha = timed("none", arguments.iterations), timed("asha", arguments.iterations)
    loop = (before + timed("loop", arguments.iterations)) / 2
    what = f"16 sinusoid trials of {arguments.iterations:,} iterations"
    print("| measure | measured | ratio | target |\n|---|---|---|---|")
    print(
        f"| {what}: search, no early stopping / one after the other | {tune:.0f} s / {loop:.0f} s "
        f"| {tune / loop:.2f}x | at most 1.5x |"
    )
    print(
        f"| {what}: search with asha / one after the other | {asha:.0f} s / {loop:.0f} s "
        f"| {asha / loop:.2f}x | clearly less than without |"
    )


if __name__ == "__main__":
    main()
