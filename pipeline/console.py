"""What a person sees: a live line while training, tables at the end. Prints, decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from pipeline.evaluation import Curve, cell, metric_label
from pipeline.session import Session, Watcher

if TYPE_CHECKING:
    from pipeline.config import Experiment

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal
_LIVE_SECONDS = 0.1


class ConsoleWatcher(Watcher):
    """A live progress line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.training = False
        """Between the start of the loop and the meta-test: a Ctrl-C then ends in a checkpoint."""
        self.has_started = False
        self.on_started: Callable[[], None] = lambda: None
        self._progress: Progress | None = None
        self._line: TaskID | None = None
        self._total = 0
        self._first = 0
        self._began = 0.0
        self._shown = 0.0
        self._tasks_per_batch = 0
        self._metric_name, self._percent = "loss", False

    def starting(self, experiment: Experiment, run_dir: Path) -> None:
        out.print(f"{experiment.name} -> {run_dir}", style="bold", markup=False, soft_wrap=True)

    def started(self, session: Session) -> None:
        experiment = session.experiment
        workers = f"{session.workers.size} Ray actors" if session.workers.size else "in process"
        out.print(
            f"{experiment.task.kind} tasks, {experiment.model.kind} with "
            f"{session.update.layout.size:,} parameters; inner steps: {experiment.inner.steps}, "
            f"{experiment.inner.order} order; {experiment.outer.tasks_per_batch} tasks per "
            f"meta-batch, {session.tasks_per_chunk} per chunk; {workers}; "
            f"{'compiled' if session.compile else 'not compiled'}",
            soft_wrap=True,
        )
        if session.iteration:
            out.print(f"continuing after iteration {session.iteration:,}")
        task = experiment.build_task()
        self._metric_name, self._percent = metric_label(task, task.primary_metric)
        self._total, self._first = experiment.outer.iterations, session.iteration
        self._tasks_per_batch = experiment.outer.tasks_per_batch
        self._began = self._shown = time.monotonic()
        self.training = self.has_started = True
        self.on_started()
        if out.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=out
            )
            self._progress.start()
            self._line = self._progress.add_task("", total=self._total, completed=self._first)

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        wait = _LIVE_SECONDS if self._progress else _PLAIN_SECONDS
        if now - self._shown < wait and iteration != self._total:
            return
        self._shown = now
        per_second = (iteration - self._first) / max(now - self._began, 1e-9)
        line = (
            f"iteration {iteration:,}/{self._total:,}  "
            f"query loss {metrics['train/query_loss']:.4g}  "
            f"support loss {metrics['train/support_loss']:.4g}  "
            f"{per_second * self._tasks_per_batch:,.0f} tasks/s  "
            f"ETA {duration((self._total - iteration) / per_second)}"
        )
        if self._progress is not None and self._line is not None:
            self._progress.update(self._line, completed=iteration, description=line)
        else:
            out.print(line, markup=False, soft_wrap=True)

    def validated(self, iteration: int, curve: Curve, best: bool) -> None:
        metric = "accuracy" if "accuracy" in curve.mean else "loss"
        values = "  ".join(
            f"{step}: {cell(curve, metric, position, self._percent)}"
            for position, step in enumerate(curve.steps)
        )
        mark = "  best so far" if best else ""
        self._print(f"validation at {iteration:,}, {self._metric_name} after steps  {values}{mark}")

    def testing(self, experiment: Experiment) -> None:
        self.training = False
        self.stop()
        out.print(f"meta-test on {experiment.evaluation.tasks} tasks ...")

    def notice(self, message: str) -> None:
        self._print(message)

    def stop(self) -> None:
        """Take the live line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, message: str) -> None:
        console = self._progress.console if self._progress else out
        console.print(message, markup=False, soft_wrap=True)


def curves_table(task: Any, curves: Sequence[Curve]) -> Table:
    """One row per curve, one column per gradient step, mean ± CI95."""
    metric = task.primary_metric
    label, percent = metric_label(task, metric)
    protocol = curves[0].protocol
    table = Table(
        title=f"{label}{' in %' if percent else ''} after n gradient steps on "
        f"{protocol['tasks']} {protocol['split']} tasks, ± CI95",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    rows = [[cell(c, metric, p, percent) for p in range(len(c.steps))] for c in curves]
    table.add_column("", overflow="fold")
    for step, column in zip(curves[0].steps, zip(*rows, strict=True), strict=True):
        # Where space is short, names are folded, not numbers cut.
        width = max(len(text) for text in column)
        table.add_column(f"n = {step}", justify="right", no_wrap=True, min_width=width)
    for curve, row in zip(curves, rows, strict=True):
        table.add_row(curve.title, *row, style=None if curve.who == "trained" else "dim")
    return table


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
