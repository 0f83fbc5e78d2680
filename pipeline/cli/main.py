"""The `maml` command: parses arguments and calls the library."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.data import data_app
from pipeline.cli.errors import (
    DEBUG,
    StopRequest,
    reporting_errors,
    resumable,
    show_tracebacks,
    typed,
    ui_command,
)
from pipeline.cli.jobs import jobs_app, submit
from pipeline.cli.results import analyze, compare, evaluate, export
from pipeline.cli.runs import runs_app
from pipeline.cli.search import search

app = typer.Typer(
    name="maml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Distributed model-agnostic meta-learning: train, search, test, browse runs.",
    epilog="--debug anywhere shows the traceback of an error.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at experiments and their settings.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(jobs_app, name="jobs")
app.add_typer(runs_app, name="runs")
app.command()(submit)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="settings to change, such as inner.lr=0.1 cluster.workers=4", show_default=False
    ),
]


@app.command()
@reporting_errors
def train(
    experiment: Annotated[
        str, typer.Argument(help="name of a shipped experiment, or a YAML file", show_default=False)
    ],
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
    from pipeline.config.loading import load, load_to_resume, new_run_dir, trained_baseline
    from pipeline.evaluation.health import verdict
    from pipeline.evaluation.run_report import read_diagnoses
    from pipeline.training.loop import train as meta_train

    if resume is not None:
        run_dir = resume.expanduser().absolute()
        loaded = load_to_resume(run_dir, experiment, overrides or [])
    else:
        loaded = load(experiment, overrides or [])
        run_dir = new_run_dir(loaded)

    watcher = ConsoleWatcher()
    stop = StopRequest(watcher, "stopping and saving (again to stop at once)")
    with resumable(watcher, f"maml train {experiment} --resume {typed(run_dir)}"):
        curves = meta_train(
            loaded,
            run_dir,
            resume=resume is not None,
            watcher=watcher,
            should_stop=lambda: stop.requested,
        )
    out.print(curves_table(loaded.build_task(), curves))
    watcher.say(f"run folder   {run_dir}")
    if diagnoses := read_diagnoses(run_dir):
        plots = typed(run_dir / "plots" / "health_*.png")
        watcher.say(f"health       {verdict(loaded, diagnoses)}; {plots}")
    watcher.say(f"meta-test    maml evaluate {typed(run_dir)}")
    if baseline := trained_baseline(loaded):
        other = f"maml train {baseline}, then maml compare {typed(run_dir)} OTHER"
        watcher.say(f"baseline     {other}")
    if loaded.tracking.enabled:
        watcher.say(f"MLflow       {ui_command(loaded, run_dir)}")


app.command()(search)
app.command()(evaluate)
app.command()(compare)
app.command()(analyze)
app.command()(export)


@app.command()
@reporting_errors
def ui(
    uri: Annotated[
        str | None,
        typer.Option(help="tracking store; by default MLFLOW_TRACKING_URI, else runs/mlflow.db"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow's pages on the runs of this folder."""
    from pipeline.cli.console import out
    from pipeline.runs.catalog import default_store
    from pipeline.runs.mlflow_ui import serve

    def say(address: str) -> None:
        out.print(f"MLflow: {address} (Ctrl-C ends it)", markup=False, soft_wrap=True)

    serve(default_store(uri), host=host, port=port, on_up=say)


@app.command()
@reporting_errors
def resend(
    file: Annotated[
        Path, typer.Argument(help="unsent-tracking.jsonl of a run", show_default=False)
    ],
) -> None:
    """Send MLflow what a run could not, because the server was away."""
    from pipeline.cli.console import out
    from pipeline.runs.mlflow_sender import TrackingError
    from pipeline.runs.tracker import resend as send

    if not file.is_file():
        raise ValueError(f"{file} is not a file; a run names it when MLflow could not be reached")
    if not send(file):
        raise TrackingError(f"MLflow still cannot be reached; {file} is kept")
    out.print("sent")


@config_app.command("list")
@reporting_errors
def config_list() -> None:
    """The shipped experiments."""
    from rich.table import Table

    from pipeline.cli.console import out
    from pipeline.config.loading import experiments

    table = Table.grid(padding=(0, 2))
    for name, description in experiments().items():
        table.add_row(f"[bold]{name}[/]", description)
    out.print(table)


@config_app.command("algorithms")
@reporting_errors
def config_algorithms() -> None:
    """The MAML family: what `algorithm:` may be, and what each one sets."""
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.console import out
    from pipeline.config.algorithms import DESCRIPTIONS, PRESETS

    table = Table.grid(padding=(0, 2))
    for name, description in DESCRIPTIONS.items():
        settings = "\n".join(f"{path}={value}" for path, value in PRESETS[name].items())
        table.add_row(f"[bold]{name}[/]", f"{description}\n[dim]{escape(settings)}[/]".rstrip())
    out.print(table)


@config_app.command("show")
@reporting_errors
def config_show(
    experiment: Annotated[
        str, typer.Argument(help="name of a shipped experiment, or a YAML file", show_default=False)
    ],
    overrides: Overrides = None,
) -> None:
    """Print an experiment with every default filled in."""
    from pipeline.config.loading import load

    print(load(experiment, overrides or []).to_yaml(), end="")


@config_app.command("schema")
@reporting_errors
def config_schema() -> None:
    """Print the JSON schema of experiments."""
    from pipeline.config.loading import json_schema

    print(json.dumps(json_schema(), indent=1))


def main() -> None:
    """Entry point of the console script."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ[DEBUG] = "1"
    if not show_tracebacks():
        # A library's deprecation is no news for somebody who trains.
        warnings.filterwarnings("ignore")
    logging.basicConfig(
        level=logging.INFO if show_tracebacks() else logging.WARNING, format="%(message)s"
    )
    for chatty in ("ray", "torch", "matplotlib", "mlflow", "alembic", "urllib3", "PIL", "filelock"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    app()
