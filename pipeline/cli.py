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

from pipeline.cli_data import data_app
from pipeline.cli_errors import (
    DEBUG,
    StopRequest,
    reporting_errors,
    show_tracebacks,
    typed,
    ui_command,
)
from pipeline.cli_jobs import jobs_app, submit
from pipeline.cli_runs import runs_app
from pipeline.cli_search import search

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
RunDir = Annotated[Path, typer.Argument(help="folder of a run", show_default=False)]


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
    from pipeline.console import ConsoleWatcher, curves_table, out
    from pipeline.experiments import load, load_to_resume, new_run_dir
    from pipeline.session import Interrupted
    from pipeline.training import TrainingFailed
    from pipeline.training import train as meta_train

    if resume is not None:
        run_dir = resume.expanduser().absolute()
        loaded = load_to_resume(run_dir, experiment, overrides or [])
    else:
        loaded = load(experiment, overrides or [])
        run_dir = new_run_dir(loaded)

    def say(line: str) -> None:
        out.print(line, markup=False, soft_wrap=True)

    watcher = ConsoleWatcher()
    stop = StopRequest(watcher, "stopping after this iteration (again to stop at once)")
    try:
        curves = meta_train(
            loaded,
            run_dir,
            resume=resume is not None,
            watcher=watcher,
            should_stop=lambda: stop.requested,
        )
    except (Exception, KeyboardInterrupt) as error:
        watcher.stop()
        if not watcher.has_started:
            raise
        say(f"to continue: maml train {experiment} --resume {typed(run_dir)}")
        if show_tracebacks() or isinstance(error, Interrupted | TrainingFailed | KeyboardInterrupt):
            raise
        # What would be bad input before the start is a failed run now.
        raise TrainingFailed(f"{type(error).__name__}: {error} (--debug shows where)") from error
    out.print(curves_table(loaded.build_task(), curves))
    say(f"run folder   {run_dir}")
    say(f"meta-test    maml evaluate {typed(run_dir)}")
    if loaded.tracking.enabled:
        say(f"MLflow       {ui_command(loaded, run_dir)}")


app.command()(search)


@app.command()
@reporting_errors
def evaluate(
    run_dir: RunDir,
    tasks: Annotated[int | None, typer.Option(min=2, help="number of tasks")] = None,
    steps: Annotated[
        str | None, typer.Option(help="gradient steps to report, such as 0,1,3,10")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    checkpoint: Annotated[
        str, typer.Option(help="final parameters, or those of the best validation: final, best")
    ] = "final",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, protocol included")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="change a setting, such as --set task.queries=15"),
    ] = None,
) -> None:
    """Meta-test a finished run on tasks that it was not trained on."""
    from pipeline.console import curves_table, err, out
    from pipeline.evaluation import evaluate_run
    from pipeline.experiments import load_run
    from tasks.base import SPLITS

    if split not in SPLITS:
        raise ValueError(f"--split: must be one of {', '.join(SPLITS)}, got {split!r}")
    if checkpoint not in ("final", "best"):
        raise ValueError(f"--checkpoint: must be final or best, got {checkpoint!r}")
    loaded = load_run(run_dir, overrides or [])
    if not as_json:
        err.print(f"meta-test of {run_dir} ...", markup=False, soft_wrap=True)
    curves = evaluate_run(
        loaded,
        run_dir,
        split=split,
        num_tasks=tasks,
        steps=_parsed_steps(steps),
        checkpoint="best" if checkpoint == "best" else "final",
    )
    if as_json:
        print(json.dumps([curve.to_json() for curve in curves], indent=1))
    else:
        out.print(curves_table(loaded.build_task(), curves))


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
    from pipeline.console import out
    from pipeline.mlflow_ui import serve
    from pipeline.runs import default_store

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
    from pipeline.console import out
    from pipeline.mlflow_sender import TrackingError
    from pipeline.tracking import resend as send

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

    from pipeline.console import out
    from pipeline.experiments import experiments

    table = Table.grid(padding=(0, 2))
    for name, description in experiments().items():
        table.add_row(f"[bold]{name}[/]", description)
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
    from pipeline.experiments import load

    print(load(experiment, overrides or []).to_yaml(), end="")


@config_app.command("schema")
@reporting_errors
def config_schema() -> None:
    """Print the JSON schema of experiments."""
    from pipeline.experiments import json_schema

    print(json.dumps(json_schema(), indent=1))


def _parsed_steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        steps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--steps: must look like 0,1,3,10, got {text!r}") from None
    if steps[0] < 0:
        raise ValueError(f"--steps: must not be negative, got {text!r}")
    return steps


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


if __name__ == "__main__":
    main()
