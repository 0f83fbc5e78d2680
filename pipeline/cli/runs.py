"""`maml runs ...`: what was trained, in the terminal."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pipeline.cli.arguments import StoreUri
from pipeline.cli.clear_errors import ClearTyper
from pipeline.cli.exit_codes import reporting_errors
from pipeline.config import json_text
from tasks.credentials import redacted

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from pipeline.maml.confidence import Estimate
    from pipeline.runs.catalog import Run, SideBySide

runs_app = ClearTyper(help="List runs and searches, newest first; compare some of them.")

_TRIALS_SHOWN = 5  # of a search, unless its trials are what was asked for
_NOTHING = "–"
_BRANCH = "└ "
_ONE_LINE = (
    "run", "name", "algorithm", "status", "started", "took", "validation", "mean ± CI95"
)  # fmt: skip
_TWO_LINES = ("name\nrun, status, algorithm", "started\ntook", "validation\nmean ± CI95")
_WITHOUT_LIMIT = 10_000  # characters in a line, where there is no terminal
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


class _Row(NamedTuple):
    """What the list says of a run, as plain text."""

    run: str
    name: str
    algorithm: str = ""
    status: str = ""
    started: str = ""
    took: str = ""
    metric: str = ""
    """The metric of the last validation and after how many steps; of a search, its trials."""
    value: str = ""
    branch: str = ""
    """What stands before a name that belongs to the search above it."""
    style: str = ""
    """Of the name."""


def _print_runs(runs: list[Run], text: str) -> None:
    """Print the runs: a line for each, or two if the terminal is too narrow for one."""
    from pipeline.cli.console import out

    rows = list(_rows(runs, text))
    table = _in_one_line(rows)
    if out.is_terminal and _natural_width(table) > out.width:
        table = _in_two_lines(rows, out.width)
    _print_wide(table)


def _rows(runs: list[Run], text: str) -> Iterator[_Row]:
    """The rows of runs and searches, with the best trials below a search."""
    from pipeline.config.wording import counted

    for run in runs:
        if not run.is_search:
            yield _row(run)
            continue
        trials = counted(len(run.trials), "trial") + (", best first" if len(run.trials) > 1 else "")
        yield _row(run)._replace(metric=trials, value="", style="bold")
        # Where trials were asked for, all of them are shown.
        shown = run.trials if text else run.trials[:_TRIALS_SHOWN]
        for trial in shown:
            yield _row(trial)._replace(branch=_BRANCH)
        if hidden := len(run.trials) - len(shown):
            more = f"{hidden} more: --filter {run.short_id}"
            yield _Row("", more, branch=_BRANCH, style="dim")


def _row(run: Run) -> _Row:
    """The row of one run."""
    from pipeline.cli.console import duration

    # A name that was not chosen begins with the experiment's.
    experiment = "" if run.name.startswith(run.experiment) else run.experiment
    found = run.validation
    return _Row(
        run.short_id,
        run.name,
        ", ".join(filter(None, (experiment, run.algorithm, run.order))),
        run.status,
        _day_and_time(run.started),
        duration(run.seconds),
        _NOTHING if found is None else _metric_after(found.metric, found.step),
        "" if found is None else _estimate(found.value, found.metric == "accuracy"),
    )


def _in_one_line(rows: list[_Row]) -> Table:
    """The list with a line for each run."""
    from rich.text import Text

    table = _table(*_ONE_LINE)
    table.columns[_ONE_LINE.index("took")].justify = "right"
    for row in rows:
        table.add_row(
            row.run,
            Text(row.branch + row.name, row.style),
            Text(row.algorithm),
            _status(row),
            row.started,
            row.took,
            row.metric,
            row.value,
        )
    return table


def _in_two_lines(rows: list[_Row], width: int) -> Table:
    """The list with two lines for each run; a name without room is folded."""
    from rich.text import Text

    from pipeline.cli.console import folded

    table = _table(*_TWO_LINES)
    table.columns[0].no_wrap = False
    cells = [(f"{row.started}\n{row.took}", f"{row.metric}\n{row.value}") for row in rows]
    others = zip(_TWO_LINES[1:], *cells, strict=True)
    widths = [max(len(line) for text in column for line in text.splitlines()) for column in others]
    room = width - 2 - sum(widths) - 2 * len(widths)  # the edges, and between columns
    for row, others_of_row in zip(rows, cells, strict=True):
        space = " " * len(row.branch)
        name = folded(row.name, room - len(space)).replace("\n", f"\n{space}")
        cell = Text(row.branch + name, row.style)
        if row.run:
            cell += Text.assemble(f"\n{space}{row.run}  ", _status(row), f"  {row.algorithm}")
        table.add_row(cell, *others_of_row)
    return table


def _table(*columns: str) -> Table:
    """An empty table in which nothing is folded."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _status(row: _Row) -> Text:
    """The status of a run, in its colour."""
    from rich.text import Text

    return Text(row.status, _COLORS.get(row.status, ""))


def _comparison_table(comparison: SideBySide) -> Table:
    """A column per run; rows of settings that differ, then of metrics."""
    from pipeline.cli.console import duration

    runs = comparison.runs
    labels = {name: _metric_label(name, _titles(runs)) for name in comparison.metrics}
    table, fit = _columns_of_runs(runs, [*comparison.settings, *labels.values()])

    def add(label: str, values: Iterable[str]) -> None:
        table.add_row(_plain(label), *(_plain(fit(value)) for value in values))

    add("status", (run.status for run in runs))
    add("started", (run.started.strftime("%Y-%m-%d %H:%M") for run in runs))
    add("took", (duration(run.seconds) for run in runs))
    table.add_section()
    for path, values in comparison.settings.items():
        add(path, (_NOTHING if value is None else value for value in values))
    if not comparison.settings:
        table.add_row("[dim]all settings are the same[/]")
    table.add_section()
    for name, estimates in comparison.metrics.items():
        if "oracle" in name and not any(value and value.mean for value in estimates):
            continue  # one that makes no mistake: the same zeros after every step
        add(labels[name], (_estimate(value, "accuracy" in name) for value in estimates))
    if not comparison.metrics:
        table.add_row("[dim]no validation or meta-test yet[/]")
    return table


def _columns_of_runs(runs: list[Run], labels: Sequence[str]) -> tuple[Table, Callable[[str], str]]:
    """An empty table with a column for labels and one per run, and what folds a text for the
    latter. On a terminal labels have what the runs leave of the width, a third at least."""
    from pipeline.cli.console import folded, out

    table = _table("")
    room = _WITHOUT_LIMIT
    if out.is_terminal:
        width = min(max(map(len, labels), default=0), out.width // 3)
        room = (out.width - 2 - width) // len(runs) - 2
        table.columns[0].no_wrap = False

    def fit(text: str) -> str:
        return folded(text, room)

    for run in runs:
        table.add_column(f"{_plain(fit(run.name))}\n[dim]{run.short_id}[/]", no_wrap=True)
    return table, fit


def _titles(runs: Iterable[Run]) -> dict[str, str]:
    """The titles of the curves of meta-tests, by what the names of metrics have in their place."""
    from pipeline.runs.tracker import CURVES, recorded_title

    found: dict[str, str] = {}
    for run in runs:
        with contextlib.suppress(ValueError):  # of hundreds of titles, which MLflow has cut
            titles = json.loads(run.tags.get(CURVES, "[]"))
            found |= {recorded_title(title): title for title in titles}
    return found


def _metric_label(name: str, titles: Mapping[str, str]) -> str:
    """The name of a metric in words: 'test/K-5/loss_step1' is 'test, K=5: query loss, 1 step'."""
    *where, last = name.split("/")
    metric, _, step = last.rpartition("_step")
    if not metric or not step.isdecimal():
        return name  # not one of ours
    return f"{', '.join(titles.get(part, part) for part in where)}: {_metric_after(metric, step)}"


def _metric_after(metric: str, step: int | str) -> str:
    """A metric of query sets and the steps of adaptation before it, in words."""
    from pipeline.config.wording import counted

    return f"{'query loss' if metric == 'loss' else metric}, {counted(int(step), 'step')}"


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

    return Measurement.get(out, out.options.update(width=_WITHOUT_LIMIT), table).maximum
