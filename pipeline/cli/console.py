"""What a person sees of a run: a live line while training, tables at the end.

This file only prints; it decides nothing.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.comparison import PairedComparison, recipes
from pipeline.evaluation.meta_test import BASELINES, Curve, cell, metric_label
from pipeline.maml.confidence import interval
from pipeline.training.session import Session, Updates, Watcher

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment
    from tasks.base import TaskDistribution

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal
_LIVE_SECONDS = 0.1
_LOSSES = {
    "train/query_loss": "query loss",
    "train/support_loss": "support loss",
    "train/loss": "loss",
    "train/accuracy": "accuracy",
}


class LiveLine:
    """Shows progress: a line that changes on a terminal, a plain line now and then elsewhere."""

    def __init__(self, live_seconds: float, plain_seconds: float) -> None:
        self.training = False
        """Whether the work is under way, so that the first Ctrl-C saves its state."""
        self.has_started = False
        self.began = 0.0
        self._live_seconds, self._plain_seconds = live_seconds, plain_seconds
        self._progress: Progress | None = None
        self._line: TaskID | None = None
        self._shown = 0.0
        self._last = ""

    def begin(self) -> None:
        """Start the clock, and on a terminal the bar."""
        self.began = self._shown = time.monotonic()
        self.training = self.has_started = True
        if out.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=out
            )
            self._progress.start()
            self._line = self._progress.add_task("", total=1.0)

    def is_due(self) -> bool:
        """Whether the last line is old enough for another one."""
        wait = self._live_seconds if self._progress else self._plain_seconds
        return time.monotonic() - self._shown >= wait

    def show(self, fraction: float, line: str) -> None:
        """Show a line of progress and the part of the work that is done, from 0 to 1."""
        self._shown = time.monotonic()
        if self._progress is not None and self._line is not None:
            self._progress.update(self._line, completed=fraction, description=line)
        elif line != self._last:
            self.say(line)
            self._last = line

    def say(self, line: str) -> None:
        """Print a line that stays."""
        console = self._progress.console if self._progress else out
        console.print(line, markup=False, soft_wrap=True)

    def notice(self, message: str) -> None:
        """Print what a watcher is told."""
        self.say(message)

    def stop(self) -> None:
        """Remove the bar; the work is over."""
        self.training = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class ConsoleWatcher(LiveLine, Watcher):
    """Shows a person how a run gets on."""

    def __init__(self) -> None:
        super().__init__(_LIVE_SECONDS, _PLAIN_SECONDS)
        self._total = 0
        self._first = 0
        self._updates = Updates(0, "tasks", "")
        self._metric, self._metric_name, self._percent = "loss", "loss", False
        self._shown_metrics: dict[str, str] = {}

    def starting(self, experiment: Experiment, run_dir: Path) -> None:
        out.print(f"{experiment.name} -> {run_dir}", style="bold", markup=False, soft_wrap=True)

    def started(self, session: Session) -> None:
        experiment = session.experiment
        out.print(
            f"{experiment.task.kind} tasks, {experiment.model.kind} with "
            f"{session.optimizer.layout.size:,} parameters; {session.method.describe(session)}",
            soft_wrap=True,
        )
        if session.iteration:
            out.print(f"continuing after iteration {session.iteration:,}")
        task = experiment.build_task()
        self._metric = task.primary_metric
        self._metric_name, self._percent = metric_label(task, self._metric)
        self._shown_metrics = _shown_metrics(experiment)
        self._total, self._first = experiment.outer.iterations, session.iteration
        self._updates = session.method.updates(experiment)
        self.begin()

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        if not self.is_due() and iteration != self._total:
            return
        per_second = (iteration - self._first) / max(time.monotonic() - self.began, 1e-9)
        self.show(
            iteration / self._total,
            f"iteration {iteration:,}/{self._total:,}  "
            + "".join(
                f"{name} {metrics[key]:.4g}  "
                for key, name in self._shown_metrics.items()
                if key in metrics
            )
            + f"{per_second * self._updates.size:,.0f} {self._updates.unit}/s  "
            f"ETA {duration((self._total - iteration) / per_second)}",
        )

    def validated(self, iteration: int, curve: Curve, best: bool) -> None:
        values = "  ".join(
            f"{step}: {cell(curve, self._metric, position, self._percent)}"
            for position, step in enumerate(curve.steps)
        )
        mark = "  best so far" if best else ""
        name = f"{self._metric_name}{' in %' if self._percent else ''}"
        self.say(f"validation at {iteration:,}, {name} after steps  {values}{mark}")

    def testing(self, experiment: Experiment) -> None:
        self.stop()
        out.print(f"meta-test on {experiment.evaluation.tasks} tasks ...")


def _shown_metrics(experiment: Experiment) -> dict[str, str]:
    """The metrics of an update that the live line shows where they are there, and what they are
    called: in reinforcement learning returns, which say more than the surrogate loss."""
    if experiment.reinforcement is None:
        return _LOSSES
    steps = experiment.inner.steps
    adapted = {f"train/return_step{steps}": "return after adaptation"} if steps else {}
    return {"train/return_step0": "return", **adapted}


def curves_table(task: TaskDistribution, curves: Sequence[Curve]) -> Table:
    """A table of adaptation curves: a row per curve, a column per gradient step, mean ± CI95."""
    metric = task.primary_metric
    label, percent = metric_label(task, metric)
    protocol = curves[0].protocol
    title = (
        f"{label}{' in %' if percent else ''} after n gradient steps on "
        f"{protocol['tasks']} {protocol['split']} tasks, ± CI95"
    )
    rows = [
        (
            curve.title,
            [cell(curve, metric, position, percent) for position in range(len(curve.steps))],
            "dim" if curve.who in BASELINES else None,
        )
        for curve in curves
    ]
    return _table_by_step(title, curves[0].steps, rows)


def recipes_table(found: Sequence[PairedComparison]) -> Table | None:
    """A table of the settings in which the runs differ, a column per run; None if none differs."""
    different = recipes(found)
    if not different:
        return None
    names = [curve.who for curve in found[0].curves]
    room = (out.width - max(map(len, different))) // len(names) - 2
    header = ["", *(folded(name, room) for name in names)]
    return plain_table([header, *([name, *values] for name, values in different.items())])


def differences_table(task: TaskDistribution, comparison: PairedComparison) -> Table:
    """A table of paired differences: a row per pair of runs, a column per gradient step, each with
    the difference ± CI95 and its p-value."""
    label, percent = metric_label(task, comparison.metric)
    variant = f"{comparison.variant}: " if comparison.variant else ""
    title = f"{variant}difference in {label}{' in %' if percent else ''}, task by task, ± CI95"
    rows = [
        (
            f"{found.one}\nminus {found.other}",
            [
                f"{interval(mean, half, percent, signed=True)}\n{_p_text(p)}"
                for mean, half, p in zip(found.mean, found.ci95, found.p, strict=True)
            ],
            None,
        )
        for found in comparison.differences
    ]
    return _table_by_step(title, comparison.steps, rows)


def _table_by_step(
    title: str, steps: Sequence[int], rows: Sequence[tuple[str, Sequence[str], str | None]]
) -> Table:
    """A row per name, with its cells and style; a column per gradient step.

    Where space is short, names are folded, not numbers cut.
    """
    table = Table(
        title=Text(title, style="bold", no_wrap=True, overflow="ignore"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", overflow="fold")
    room = out.width - 2  # the edges
    columns = zip(*(cells for _, cells, _ in rows), strict=True)
    for step, column in zip(steps, columns, strict=True):
        width = max(len(line) for text in column for line in text.splitlines())
        width = max(width, len(f"n = {step}"))
        table.add_column(f"n = {step}", justify="right", no_wrap=True, min_width=width)
        room -= width + 2
    for name, cells, style in rows:
        table.add_row(folded(name, room), *cells, style=style)
    return table


class _AtHyphens(textwrap.TextWrapper):
    """Wraps text after any hyphen, also between digits, as in the dates in the names of runs."""

    wordsep_re = re.compile(r"(\s+|[^\s-]+-)")


def folded(name: str, width: int) -> str:
    """The name in lines of at most `width` characters: broken after hyphens and at spaces; where
    there are none, a … says that the name goes on."""
    width = max(width, 2)

    def cut(part: re.Match[str]) -> str:
        text, pieces = part[0], []
        while len(text) > width:
            pieces.append(f"{text[: width - 1]}… ")
            text = text[width - 1 :]
        return "".join([*pieces, text])

    lines = re.sub(r"[^\s-]+-?", cut, name).splitlines()
    wrapper = _AtHyphens(width=width)
    return "\n".join(part for line in lines for part in wrapper.wrap(line))


def _p_text(p: float) -> str:
    """A p-value as a table has it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def plain_table(rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts; the first row is the header."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03, or 2:03 without hours."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
