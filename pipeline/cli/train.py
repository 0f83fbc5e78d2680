"""`maml train`: meta-train an experiment and meta-test it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.arguments import Overrides
from pipeline.cli.exit_codes import reporting_errors
from pipeline.cli.next_commands import typed, ui_command
from pipeline.cli.resumable import Kind, carry_out, new_or_resumed

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment


@reporting_errors
def train(
    experiment: Annotated[
        str | None,
        typer.Argument(
            help="name of a shipped experiment, or a YAML file; not with --resume RUN_DIR",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_DIR|URI|auto",
            help="continue the run in this folder, which says all but what overrides change; the "
            "run whose checkpoint.uri this was, in a new folder; or auto: the newest unfinished "
            "run of EXPERIMENT with these settings (or that in run_dir), or begin one",
        ),
    ] = None,
) -> None:
    """Meta-train an experiment, then meta-test it.

    `maml config list` shows the shipped experiments, `maml config show NAME` all their settings.
    """
    from pipeline.cli.console import ConsoleWatcher, curves_table, out
    from pipeline.config.loading import load_to_resume
    from pipeline.runs.continuing import (
        experiment_at,
        has_checkpoints_elsewhere,
        run_to_continue,
    )
    from pipeline.training.loop import train as meta_train

    kind = Kind(load_to_resume, run_to_continue, has_checkpoints_elsewhere, experiment_at)
    watcher = ConsoleWatcher()
    with new_or_resumed(kind, experiment, overrides or [], resume) as request:
        curves = carry_out(
            meta_train,
            request,
            watcher=watcher,
            command="maml train",
            on_stop="stopping and saving (again to stop at once)",
        )
    out.print(curves_table(request.experiment.build_task(), curves))
    for line in _what_next(request.experiment, request.folder):
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
