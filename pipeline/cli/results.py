"""`maml evaluate`, `compare`, `analyze`, `export`: what finished runs have learned."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.exit_codes import reporting_errors
from pipeline.cli.next_commands import typed
from pipeline.config import json_text
from tasks.credentials import redacted

_FORMATS = (".png", ".svg", ".pdf")
RunDir = Annotated[Path, typer.Argument(help="folder of a run", show_default=False)]
Tasks = Annotated[int | None, typer.Option(min=2, help="number of tasks")]
Steps = Annotated[str | None, typer.Option(help="gradient steps to report, such as 0,1,3,10")]
Split = Annotated[Literal["train", "validation", "test"], typer.Option(help="which tasks")]
Checkpoint = Annotated[
    Literal["final", "best"],
    typer.Option(help="the final parameters, or those of the best validation"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="change a setting, such as --set inner.lr=0.002"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, protocol included")]


@reporting_errors
def evaluate(
    run_dir: RunDir,
    tasks: Tasks = None,
    steps: Steps = None,
    split: Split = "test",
    checkpoint: Checkpoint = "final",
    video: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="folder for pictures of a policy's trajectories in a few of the tasks",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    overrides: Settings = None,
) -> None:
    """Meta-test a finished run on tasks that it was not trained on."""
    from pipeline.cli.console import curves_table, err, out
    from pipeline.config.loading import load_run
    from pipeline.evaluation.meta_test import evaluate_run, refuse_overridden
    from pipeline.evaluation.run_report import check_video, write_video
    from pipeline.runs.folder import check_writable, parameters_of

    loaded = load_run(run_dir, overrides or [])
    refuse_overridden(loaded.evaluation.variants, overrides or [])
    if video is not None:
        check_video(loaded)
        check_writable(video, "--video")
    wanted = _parsed_steps(steps)
    if not as_json:
        err.print(f"meta-test of {run_dir} ...", markup=False, soft_wrap=True)
    curves = evaluate_run(
        loaded,
        run_dir,
        split=split,
        num_tasks=tasks,
        steps=wanted,
        checkpoint=checkpoint,
    )
    if as_json:
        print(json_text.write([curve.to_json() for curve in curves]))
    else:
        out.print(curves_table(loaded.build_task(), curves))
    if video is not None:
        theta = parameters_of(loaded, run_dir, checkpoint)
        for path in write_video(loaded, theta, video, split=split, num_tasks=tasks, steps=wanted):
            err.print(f"video        {path}", markup=False, soft_wrap=True)


@reporting_errors
def compare(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="folders of two or more runs", show_default=False)
    ],
    tasks: Tasks = None,
    steps: Steps = None,
    split: Split = "test",
    checkpoint: Checkpoint = "final",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="where the figure goes; by default comparison.png in the folder of runs",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    overrides: Settings = None,
) -> None:
    """Compare runs on the very same test tasks: adaptation curves, and paired differences.

    `maml runs compare` shows what is recorded in MLflow instead, settings included.
    """
    from pipeline.cli.console import curves_table, differences_table, err, out, recipes_table
    from pipeline.config.loading import load_run
    from pipeline.evaluation.comparison import compare_runs
    from pipeline.evaluation.run_report import plot_comparison

    if len(run_dirs) < 2:
        raise ValueError("compare needs two runs or more: maml compare RUN RUN")
    plot = _place_of_plot(plot)
    if not as_json:
        err.print(f"meta-test of {len(run_dirs)} runs ...", markup=False)
    found = compare_runs(
        run_dirs,
        split=split,
        num_tasks=tasks,
        steps=_parsed_steps(steps),
        checkpoint=checkpoint,
        overrides=overrides or [],
    )
    task = load_run(run_dirs[0], overrides or []).build_task()
    plot_comparison(task, found, plot)
    if as_json:
        print(json_text.write([each.to_json() for each in found]))
        return
    if recipes := recipes_table(found):
        out.print(recipes)
    for each in found:
        out.print(curves_table(task, each.curves))
        out.print(differences_table(task, each))
    out.print(f"plot  {typed(plot)}", markup=False, soft_wrap=True)


def _place_of_plot(plot: Path | None) -> Path:
    """Where the figure of a comparison goes. Raises ValueError or RunFolderError for a place that
    nothing can be written to."""
    from pipeline.config.loading import runs_folder
    from pipeline.runs.folder import RunFolderError, check_writable

    if plot is not None and (plot.suffix not in _FORMATS or not plot.absolute().parent.is_dir()):
        raise ValueError(f"--plot: must be a file in a folder that exists, {', '.join(_FORMATS)}")
    chosen = runs_folder() / "comparison.png" if plot is None else plot
    elsewhere = "choose another place with --plot FILE"
    check_writable(chosen.parent, "--plot", elsewhere)
    if chosen.exists() and not os.access(chosen, os.W_OK):
        raise RunFolderError(f"--plot: cannot write to {chosen}; {elsewhere}")
    return chosen


def _without_queries(overrides: list[str]) -> list[str]:
    """The settings, none of which may be one that an analysis has an option for."""
    if any(override.startswith("task.queries=") for override in overrides):
        raise ValueError("--set task.queries: an analysis has its own number; give --queries N")
    return overrides


@reporting_errors
def analyze(
    run_dir: RunDir,
    tasks: Annotated[int, typer.Option(min=2, help="number of tasks")] = 100,
    steps: Annotated[
        int | None, typer.Option(min=1, help="gradient steps; by default those it is selected by")
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(min=1, help="query examples (per class); by default 15, if there are as many"),
    ] = None,
    split: Split = "test",
    checkpoint: Checkpoint = "final",
    as_json: Json = False,
    overrides: Settings = None,
) -> None:
    """Ask why a trained model adapts so well: feature reuse or rapid learning?

    Compares every layer before and after adaptation, and what is left when only the head, only the
    body or nothing adapts. Writes one page, RUN_DIR/analysis/index.html, and logs it to MLflow.
    """
    from pipeline.cli.console import err, out, plain_table
    from pipeline.config.loading import load_run
    from pipeline.evaluation.analysis import analysis_of
    from pipeline.evaluation.analysis_finding import finding
    from pipeline.evaluation.analysis_page import (
        ability_rows,
        layer_rows,
        protocol_text,
        write_analysis,
    )
    from pipeline.runs.folder import check_writable, parameters_of

    loaded = load_run(run_dir, _without_queries(overrides or []))
    theta = parameters_of(loaded, run_dir, checkpoint)
    folder = run_dir / "analysis"
    check_writable(folder, "analysis", "analyze a copy of the run's folder elsewhere")
    if not as_json:
        err.print(f"analysis of {run_dir} ...", markup=False, soft_wrap=True)
    with err.status(f"0 of {tasks} tasks") as status:
        found = analysis_of(
            loaded,
            theta,
            split=split,
            num_tasks=tasks,
            steps=steps,
            queries=queries,
            on_progress=lambda done: status.update(f"{done} of {tasks} tasks"),
        )
    files = write_analysis(loaded, found, run_dir, checkpoint)
    if as_json:
        print((folder / "analysis.json").read_text())
    else:
        for rows in (layer_rows(found), ability_rows(found)):
            out.print(plain_table(rows))
        out.print(protocol_text(found), style="dim", markup=False, soft_wrap=True)
        out.print(finding(found), markup=False, soft_wrap=True)
        out.print(f"page  {folder / 'index.html'}", markup=False, soft_wrap=True)
    if loaded.tracking.enabled:
        _log_analysis(run_dir, files)


def _log_analysis(run_dir: Path, files: Sequence[Path]) -> None:
    """Log the files of an analysis to the run's MLflow record; say so if that does not work."""
    from pipeline.cli.console import err
    from pipeline.runs.catalog import log_to_run
    from pipeline.runs.mlflow_store import TrackingError

    try:
        log_to_run(run_dir, files, "analysis")
    except TrackingError as error:
        err.print(f"not logged to MLflow: {error}", markup=False, soft_wrap=True)


@reporting_errors
def export(
    run_dir: RunDir,
    register: Annotated[
        str | None, typer.Option(help="register the model under this name", show_default=False)
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="of the registered version, such as champion")
    ] = None,
    checkpoint: Checkpoint = "final",
    code: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="file or package of a task or model of your own"),
    ] = None,
) -> None:
    """Log a trained model to MLflow: it takes a support set and queries, adapts, and answers."""
    from pipeline.cli.console import out
    from pipeline.config.loading import load_run
    from pipeline.runs.export import HOST, PORT, export_run

    exported = export_run(
        load_run(run_dir),
        run_dir,
        checkpoint=checkpoint,
        register=register,
        alias=alias,
        code=tuple(code or ()),
    )

    def say(line: str) -> None:
        out.print(line, markup=False, soft_wrap=True)

    say(f"model      {exported.uri}")
    uri = exported.uri
    if exported.version is not None:
        uri = f"models:/{register}@{alias}" if alias else f"models:/{register}/{exported.version}"
        say(f"registered {register}, version {exported.version}{f', {alias}' if alias else ''}")
    store = redacted(exported.store)
    say(f"store      {store}")
    say(
        f"serve      MLFLOW_TRACKING_URI={shlex.quote(store)} "
        f"mlflow models serve -m {uri} --env-manager local --host {HOST} --port {PORT}"
    )
    say(f"ask        {exported.request}")
    say('answer     {"predictions": {"predictions": ..., "scores": ..., "support_loss": ...}}')
    say(f"truth      {exported.targets} would be right: the request is about test task 0")


def _parsed_steps(text: str | None) -> tuple[int, ...] | None:
    """The numbers of `--steps 0,1,3`, ascending; None stays None. Raises ValueError."""
    if text is None:
        return None
    try:
        steps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--steps: must look like 0,1,3,10, got {text!r}") from None
    if steps[0] < 0:
        raise ValueError(f"--steps: must not be negative, got {text!r}")
    return steps
