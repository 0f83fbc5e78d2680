"""`maml train`: meta-train an experiment and meta-test it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.arguments import ExperimentName, Overrides
from pipeline.cli.exit_codes import reporting_errors
from pipeline.cli.next_commands import typed, ui_command
from pipeline.cli.resumable import carry_out, load_new_or_resumed

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment


@reporting_errors
def train(
    experiment: ExperimentName,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="continue the run in this folder from its last checkpoint"),
    ] = None,
) -> None:
    """Meta-train an experiment, then meta-test it.

    `maml config list` shows the shipped experiments, `maml config show NAME` all their settings.
    """
    from pipeline.cli.console import ConsoleWatcher, curves_table, out
    from pipeline.config.loading import load_to_resume
    from pipeline.training.loop import train as meta_train

    loaded, run_dir = load_new_or_resumed(experiment, overrides or [], resume, load_to_resume)
    watcher = ConsoleWatcher()
    curves = carry_out(
        meta_train,
        loaded,
        run_dir,
        resume=resume is not None,
        watcher=watcher,
        command=f"maml train {experiment}",
        on_stop="stopping and saving (again to stop at once)",
    )
    out.print(curves_table(loaded.build_task(), curves))
    for line in _what_next(loaded, run_dir):
        watcher.say(line)


def _what_next(experiment: Experiment, run_dir: Path) -> list[str]:
    """Where the results of a finished run are, whether it was healthy, and what to do with it."""
    from pipeline.config.loading import trained_baseline
    from pipeline.evaluation.health import verdict
    from pipeline.evaluation.run_report import read_diagnoses

    lines = [f"run folder   {run_dir}"]
    if diagnoses := read_diagnoses(run_dir):
        plots = typed(run_dir / "plots" / "health_*.png")
        lines.append(f"health       {verdict(experiment, diagnoses)}; {plots}")
    lines.append(f"meta-test    maml evaluate {typed(run_dir)}")
    if baseline := trained_baseline(experiment):
        other = f"maml train {baseline}, then maml compare {typed(run_dir)} OTHER"
        lines.append(f"baseline     {other}")
    if experiment.tracking.enabled:
        lines.append(f"MLflow       {ui_command(experiment, run_dir)}")
    return lines
