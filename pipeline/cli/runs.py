"""`maml runs ...`: what was trained, in the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.arguments import StoreUri
from pipeline.cli.exit_codes import reporting_errors
from pipeline.config import json_text
from tasks.credentials import redacted

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.maml.confidence import Estimate
    from pipeline.runs.catalog import Run, SideBySide

runs_app = typer.Typer(help="List runs and searches, newest first; compare some of them.")

_TRIALS_SHOWN = 5  # of a search, unless its trials are what was asked for
_NOTHING = "–"
_COLORS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "yellow"}

Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@runs_app.callback(invoke_without_command=True)
@reporting_errors
def list_all(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="number of runs and searches")] = 20,
    text: Annotated[
        str,
        typer.Option(
            "--filter",
            help="running, finished, failed or killed; or part of a name, an experiment, an "
            "algorithm; or the beginning of a run id",
            show_default=False,
        ),
    ] = "",
    uri: StoreUri = None,
    as_json: Json = False,
) -> None:
    """List runs and searches, newest first: `maml runs`. Compare some: `maml runs compare A B`."""
    context.obj = uri
    if context.invoked_subcommand is not None:
        return
    from pipeline.cli.console import out
    from pipeline.runs.catalog import list_runs
    from pipeline.runs.reading import default_store

    store = default_store(uri)
    runs = list_runs(store, limit=limit, text=text)
    if as_json:
        print(json_text.write([run.to_json() for run in runs]))
    elif runs:
        _print_runs(runs, text)
    elif text:
        out.print(f"no run in {redacted(store)} matches {text!r}", markup=False, soft_wrap=True)
    else:
        out.print(
            f"no runs in {redacted(store)} yet; maml train makes one, --uri names another store",
            markup=False,
            soft_wrap=True,
        )


@runs_app.command("compare")
@reporting_errors
def compare_some(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(
            help="two or more: ids (a unique beginning is enough), names or folders of runs",
            show_default=False,
        ),
    ],
    uri: StoreUri = None,
    as_json: Json = False,
) -> None:
    """Show the settings that differ, and the validation and meta-test of runs, side by side."""
    from pipeline.runs.catalog import compare, find_run

    if len(runs) < 2:
        raise ValueError("compare needs two runs or more: maml runs compare A B")
    comparison = compare([find_run(name, uri or context.obj) for name in runs])
    if as_json:
        print(json_text.write(comparison.to_json()))
    else:
        _print_wide(_comparison_table(comparison))


def _print_runs(runs: list[Run], text: str) -> None:
    """Print the runs: a line for each, or two if the terminal is too narrow for one."""
    from pipeline.cli.console import out

    rows = list(_rows(runs, text))
    table = _table("run", "name", "algorithm", "status", "started", "took", "validation (steps)")
    for row in rows:
        table.add_row(*row)
    if out.is_terminal and _natural_width(table) > out.width:
        table = _table("run", "name", "started", "validation (steps)")
        for number, name, algorithm, status, started, took, validation in rows:
            table.add_row(
                f"{number}\n{status}", f"{name}\n{algorithm}", f"{started}\n{took}", validation
            )
    _print_wide(table)


def _rows(runs: list[Run], text: str) -> Iterator[list[str]]:
    """The rows of runs and searches, with the best trials below a search."""
    from pipeline.config.wording import counted

    for run in runs:
        if not run.is_search:
            yield _row(run, _plain(run.name), _validation(run))
            continue
        trials = counted(len(run.trials), "trial") + (", best first" if len(run.trials) > 1 else "")
        yield _row(run, f"[bold]{_plain(run.name)}[/]", trials)
        # Where trials were asked for, all of them are shown.
        shown = run.trials if text else run.trials[:_TRIALS_SHOWN]
        for trial in shown:
            yield _row(trial, f"└ {_plain(trial.name)}", _validation(trial))
        if hidden := len(run.trials) - len(shown):
            yield ["", f"[dim]└ {hidden} more: --filter {run.short_id}[/]", *[""] * 5]


def _row(run: Run, name: str, validation: str) -> list[str]:
    """The cells of one run."""
    from pipeline.cli.console import duration

    return [
        run.short_id,
        name,
        # A name that was not chosen begins with the experiment's.
        ", ".join(
            filter(
                None,
                (
                    "" if run.name.startswith(run.experiment) else run.experiment,
                    run.algorithm,
                    run.order,
                ),
            )
        ),
        f"[{_COLORS.get(run.status, 'default')}]{run.status}[/]",
        _day_and_time(run.started),
        duration(run.seconds),
        validation,
    ]


def _table(*columns: str) -> Table:
    """An empty table in which long names are folded."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        folds = column in ("name", "algorithm")
        table.add_column(
            column,
            overflow="fold",
            no_wrap=not folds,
            justify="right" if column == "took" else "left",
        )
    return table


def _comparison_table(comparison: SideBySide) -> Table:
    """A column per run; rows of settings that differ, then of metrics."""
    from pipeline.cli.console import duration

    table = _table("")
    for run in comparison.runs:
        table.add_column(f"{_plain(run.name)}\n[dim]{run.short_id}[/]", overflow="fold")
    runs = comparison.runs
    table.add_row("status", *(run.status for run in runs))
    table.add_row("started", *(run.started.strftime("%Y-%m-%d %H:%M") for run in runs))
    table.add_row("took", *(duration(run.seconds) for run in runs), end_section=True)
    for path, values in comparison.settings.items():
        table.add_row(path, *(_NOTHING if value is None else _plain(value) for value in values))
    if not comparison.settings:
        table.add_row("[dim]all settings are the same[/]")
    table.add_section()
    for name, estimates in comparison.metrics.items():
        if "oracle" in name and not any(value and value.mean for value in estimates):
            continue  # one that makes no mistake: the same zeros after every step
        label = _plain(name.replace("/", " ").replace("_step", ", step "))
        table.add_row(label, *(_estimate(value, "accuracy" in name) for value in estimates))
    if not comparison.metrics:
        table.add_row("[dim]no validation or meta-test yet[/]")
    return table


def _validation(run: Run) -> str:
    """The last validation of a run and its number of gradient steps, or a dash."""
    found = run.validation
    if found is None:
        return _NOTHING
    return f"{_estimate(found.value, found.metric == 'accuracy')} ({found.step})"


def _day_and_time(moment: datetime.datetime) -> str:
    """A date and a time of day; of another year, the date alone with its year."""
    this_year = moment.year == datetime.datetime.now().year
    return moment.strftime("%d %b %H:%M" if this_year else "%d %b %Y")


def _estimate(value: Estimate | None, percent: bool) -> str:
    """A mean ± CI95, or a dash."""
    from pipeline.maml.confidence import interval

    if value is None:
        return _NOTHING
    unit = " %" if percent else ""
    if value.ci95 is None:
        return f"{100 * value.mean if percent else value.mean:.4g}{unit}"
    return interval(value.mean, value.ci95, percent) + unit


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    from rich.markup import escape

    return escape(text)


def _print_wide(table: Table) -> None:
    """Print a table. Without a terminal a row stays one line, for grep and for files."""
    from rich.console import Console

    from pipeline.cli.console import out

    (out if out.is_terminal else Console(width=_natural_width(table))).print(table)


def _natural_width(table: Table) -> int:
    """The width of a table, in characters, if nothing has to be folded."""
    from rich.measure import Measurement

    from pipeline.cli.console import out

    return Measurement.get(out, out.options.update(width=10_000), table).maximum
