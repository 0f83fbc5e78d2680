"""What a person sees of a search: a live line, one line per trial, the ranked table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.cli.console import LiveLine, duration, out
from pipeline.search.report import best_of, ranking_label, setting_text, settings_text, value_text
from pipeline.search.trial import COMPLETE, UNFINISHED, Plan, TrialResult, bundles, sized_as_trial
from pipeline.search.tune import SearchWatcher

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment
    from pipeline.search.run import SearchResult

_PLAIN_SECONDS = 15.0  # between progress lines where there is no terminal
_LIVE_SECONDS = 0.25


class SearchConsole(LiveLine, SearchWatcher):
    """Shows a person how a search gets on."""

    _plan: Plan
    """Set by `started`, which comes before `progress` and `ended`."""

    def __init__(self) -> None:
        super().__init__(_LIVE_SECONDS, _PLAIN_SECONDS)
        self._total = 0
        self._ended = 0
        self._counted_from: tuple[float, float] | None = None
        """Trials that were done, and the time, when this process first heard of one."""
        self._at_start: float | None = None

    def starting(self, experiment: Experiment, folder: Path) -> None:
        out.print(f"{experiment.name} -> {folder}", style="bold", markup=False, soft_wrap=True)

    def started(self, plan: Plan, trials: int) -> None:
        search = plan.search
        space = ", ".join(
            f"{path} {domain.kind} {list(domain.values)}" for path, domain in search.space.items()
        )
        wanted = bundles(sized_as_trial(plan.experiment))
        each = sum(bundle.get("CPU", 0.0) for bundle in wanted)
        self.say(f"searching {space}")
        self.say(
            f"{trials} trials of {plan.experiment.outer.iterations:,} iterations, {each:g} CPU "
            f"each; scheduler {search.scheduler}, algorithm {search.algorithm}; ranked by "
            f"validation {ranking_label(plan.experiment, plan.ranking)}"
        )
        self._plan, self._total = plan, trials
        self.begin()

    def progress(self, results: Sequence[TrialResult], running: int) -> None:
        over = [r for r in results if r.outcome != UNFINISHED]
        begun = [r for r in results if r.outcome == UNFINISHED and r.iteration]
        iterations = self._plan.experiment.outer.iterations
        done = len(over) + sum(min(1.0, r.iteration / iterations) for r in begun)
        eta = self._eta(done)
        if not self.is_due():
            return
        best = best_of(results, self._plan.ranking)
        so_far = ""
        if best is not None:
            value = value_text(self._plan.ranking, best.value)
            so_far = f"  best so far {value} ({settings_text(best.settings)})"
        line = f"{len(over)}/{self._total} trials done, {running} running{so_far}{eta}"
        self.show(done / max(1, self._total), line)

    def _eta(self, done: float) -> str:
        """The time that is left at the pace since the first trial was heard of.

        The time before, in which processes start, says nothing of that pace.
        """
        now = time.monotonic()
        if self._at_start is None:
            self._at_start = done
        if self._counted_from is None:
            if done > self._at_start:
                self._counted_from = done, now
            return ""
        before, then = self._counted_from
        if done == before:
            return ""
        return f"  ETA {duration((self._total - done) * (now - then) / (done - before))}"

    def ended(self, result: TrialResult) -> None:
        self._ended += 1
        known = not math.isnan(result.value)
        value = value_text(self._plan.ranking, result.value, result.ci95) if known else ""
        where = "" if result.outcome == COMPLETE else f" at {result.iteration:,}"
        reason = f": {result.failure}" if result.failure else ""
        self.say(
            f"trial {result.trial_id}  {settings_text(result.settings)}  "
            f"{result.outcome}{where}{reason}  {value}".rstrip()
        )


def search_table(result: SearchResult) -> Table:
    """A table of trials: a row per trial, the best first."""
    plan = result.plan
    label = ranking_label(plan.experiment, plan.ranking)
    percent = plan.ranking.metric == "accuracy"
    table = Table(
        title=f"{len(result.trials)} trials by validation {label}{' in %' if percent else ''}, "
        "± CI95, after n adaptation steps",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    names = _short_names(plan.search.space)
    header = ("trial", *names, label, "n", "iterations", "seconds", "tasks/s")
    rows = [_cells(r, 100 if percent else 1) for r in result.trials]
    for number, (name, *cells) in enumerate(zip(header, *rows, strict=True)):
        # Where space is short, the line runs on; numbers are not cut.
        width = max(len(text) for text in (name, *cells))
        justify: Literal["left", "right"] = "left" if number <= len(names) else "right"
        table.add_column(name, justify=justify, no_wrap=True, min_width=width)
    for r, cells in zip(result.trials, rows, strict=True):
        style = "bold" if r is result.best else "dim" if math.isnan(r.value) else None
        table.add_row(*cells, style=style)
    return table


def _cells(result: TrialResult, scale: int) -> list[str]:
    """The row of a trial; its value and interval are multiplied by `scale`."""
    known = not math.isnan(result.value)
    mark = "" if result.outcome == COMPLETE else f"{result.outcome.split()[0]} "
    tasks = result.tasks_per_second
    return [
        result.trial_id.rpartition("_")[2].lstrip("0") or "0",
        *(setting_text(value) for value in result.settings.values()),
        f"{scale * result.value:.4g} ± {scale * result.ci95:.2g}" if known else "-",
        "-" if result.step is None else str(result.step),
        f"{mark}{result.iteration:,}",
        f"{result.seconds:.1f}" if math.isfinite(result.seconds) else "-",
        f"{tasks:,.0f}" if tasks > 0 else "-",
    ]


def _short_names(paths: Iterable[str]) -> list[str]:
    """The last part of every path; the whole path where two end in the same part."""
    last = [path.rpartition(".")[2] for path in paths]
    return [name if last.count(name) == 1 else path for name, path in zip(last, paths, strict=True)]
