"""The `maml` command, put together from its parts: one file per command or group of commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from pipeline.cli.clear_errors import ClearTyper
from pipeline.cli.config import config_app
from pipeline.cli.data import data_app
from pipeline.cli.exit_codes import DEBUG, show_tracebacks
from pipeline.cli.jobs import jobs_app, submit
from pipeline.cli.results import analyze, compare, evaluate, export
from pipeline.cli.runs import runs_app
from pipeline.cli.search import search
from pipeline.cli.tracking import resend, ui
from pipeline.cli.train import train
from pipeline.config.version import DISTRIBUTION, __version__

app = ClearTyper(
    name="maml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit it
    help="Distributed model-agnostic meta-learning: train, search, test, browse runs.",
)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(jobs_app, name="jobs")
app.add_typer(runs_app, name="runs")
for command in (submit, train, search, evaluate, compare, analyze, export, ui, resend):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{DISTRIBUTION} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version, and end"
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="tracebacks of errors; may stand anywhere"),
    ] = False,
) -> None:
    """Options of `maml` itself, here for --help: the callback `_print_version` handles --version,
    `main` takes --debug from wherever it stands."""


def main() -> None:
    """Run the command that `sys.argv` asks for; ends the process with its exit code."""
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
