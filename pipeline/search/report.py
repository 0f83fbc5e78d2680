"""Reports what a search has found: a ranked table, an answer in words, best.yaml, and plots.

SEARCH/results.csv, results.parquet    one row per trial, the best first
SEARCH/best.yaml                       the experiment of the best trial, ready for `maml train`
SEARCH/plots/                          PNG
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.config.loading import with_settings
from pipeline.config.wording import counted
from pipeline.evaluation.meta_test import metric_label
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import History
from pipeline.search.plots import plot_learning_curves, plot_points
from pipeline.search.trial import (
    COMPLETE,
    FAILED,
    STOPPED,
    UNFINISHED,
    Plan,
    Ranking,
    TrialResult,
)

_ORDER = "inner.order"


@dataclass(frozen=True)
class Interval:
    """A mean over pairs, and its 95 % confidence interval by Student's t; NaN for one pair."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class OrderComparison:
    """First order against second order, in pairs of trials with all other settings equal."""

    pairs: int
    """Pairs that were compared."""
    to_the_end: int
    """Pairs compared after their last iteration; the others at their last common validation."""
    metric: Interval
    """metric(first) − metric(second). Of a loss, the ratio metric(first) / metric(second): a rate
    that is too large makes a loss of any size, which would dominate a mean of differences."""
    cost: Interval
    """Seconds per update, first / second."""
    left_out: int
    """Pairs that could not be compared: one of the two failed, or has no common validation."""


def ranked(results: Sequence[TrialResult], ranking: Ranking) -> list[TrialResult]:
    """The trials sorted, best value first; those without a value are last."""
    sign = 1 if ranking.mode == "min" else -1
    return sorted(
        results,
        key=lambda r: (
            math.isnan(r.value),
            0.0 if math.isnan(r.value) else sign * r.value,
            r.trial_id,
        ),
    )


def best_of(results: Sequence[TrialResult], ranking: Ranking) -> TrialResult | None:
    """The trial with the best value, if any has one."""
    first = ranked(results, ranking)[:1]
    return first[0] if first and not math.isnan(first[0].value) else None


def learning_curve(plan: Plan, result: TrialResult) -> dict[int, float]:
    """A trial's validations by iteration, from its folder."""
    key = f"validation/{plan.ranking.metric}_step{result.step}"
    records = History(plan.trial_dir(result.trial_id)).records()
    return {int(record["iteration"]): record[key] for record in records if key in record}


def compare_orders(
    results: Sequence[TrialResult],
    curves: Mapping[str, Mapping[int, float]],
    ranking: Ranking,
) -> OrderComparison | None:
    """Compare pairs of trials that differ in inner.order alone; None where there is no such pair.

    `curves` are validations by iteration, by trial (`learning_curve`).
    """
    groups: dict[str, dict[str, TrialResult]] = {}
    for result in results:
        rest = {path: value for path, value in result.settings.items() if path != _ORDER}
        if _ORDER in result.settings:
            key = json.dumps(rest, sort_keys=True)
            groups.setdefault(key, {})[str(result.settings[_ORDER])] = result
    pairs = [(g["first"], g["second"]) for g in groups.values() if {"first", "second"} <= set(g)]
    values, costs, to_the_end = [], [], 0
    for first, second in pairs:
        one, other = curves[first.trial_id], curves[second.trial_id]
        common = [t for t in one if t in other and math.isfinite(one[t] + other[t])]
        if FAILED in (first.outcome, second.outcome) or not common:
            continue
        values.append((one[max(common)], other[max(common)]))
        speeds = second.tasks_per_second, first.tasks_per_second
        if min(speeds) > 0:  # the speed of a trial that was resumed at its end is unknown
            costs.append(speeds[0] / speeds[1])
        to_the_end += first.outcome == second.outcome == COMPLETE
    if not pairs:
        return None
    if ranking.metric == "loss":
        metric = _ratio([one / other for one, other in values if one > 0 and other > 0])
    else:
        metric = _interval([one - other for one, other in values])
    return OrderComparison(
        len(values), to_the_end, metric, _ratio(costs), left_out=len(pairs) - len(values)
    )


def in_words(plan: Plan, results: Sequence[TrialResult]) -> list[str]:
    """The answer for a person, one or two sentences per line."""
    ranking, search = plan.ranking, plan.search
    best = best_of(results, ranking)
    if best is None:
        return ["No trial has a result."]
    label = ranking_label(plan.experiment, ranking)
    steps = counted(ranking.step_of(best_experiment(plan, best)), "adaptation step")
    lines = [
        f"Best: {settings_text(best.settings)}. Validation {label} after {steps} is "
        f"{value_text(ranking, best.value, best.ci95)} (trial {best.trial_id}, {best.outcome}, "
        f"{best.iteration:,} iterations in {best.seconds:.1f} s)."
    ]
    # By the interval of the best: the interval of a trial that diverged would hold every value.
    close = [r for r in results if r is not best and abs(r.value - best.value) <= best.ci95]
    if close:
        others = "one other trial is" if len(close) == 1 else f"{len(close)} other trials are"
        lines.append(f"Within this confidence interval {others} as good.")
    if search.scheduler == "pbt":
        lines.append("Settings changed in flight; those named are the last ones.")
    if _ORDER in search.space:
        curves = {r.trial_id: learning_curve(plan, r) for r in results}
        lines += _compared_in_words(compare_orders(results, curves, ranking), ranking, label)
    return lines


def _compared_in_words(found: OrderComparison | None, ranking: Ranking, label: str) -> list[str]:
    """First order against second order, in sentences."""
    if found is None:
        return [
            "First order against second order: no two trials differ in inner.order alone, so there "
            "is nothing to compare (inner.order: {grid: [second, first]} makes pairs)."
        ]
    if not found.pairs:
        return [
            f"First order against second order: nothing to compare, none of {found.left_out} pairs "
            "at equal settings has validations of both."
        ]
    pairs = f"{counted(found.pairs, 'pair')} at equal settings"
    pairs += f", {found.to_the_end} of them trained to the end"
    if found.left_out:
        pairs += f"; {found.left_out} more without a validation"
    ratio = ranking.metric == "loss"
    metric, equal = found.metric, 1.0 if ratio else 0.0
    scale = 100 if ranking.metric == "accuracy" else 1
    unit = " points of" if scale == 100 else ""
    difference = f"{scale * metric.mean:+.3g}{unit} {label}"
    amount = f"{metric.mean:.3g} times the {label}" if ratio else difference
    if found.pairs == 1:
        return [
            f"First order against second order ({pairs}): {amount}, {found.cost.mean:.2f} times "
            "the time per update. One pair has no confidence interval."
        ]
    if metric.low <= equal <= metric.high:
        verdict = "no difference that these pairs can show"
    else:
        worse = (metric.mean > equal) == (ranking.mode == "min")
        verdict = "first order is worse" if worse else "first order is better"
    return [
        f"First order against second order ({pairs}): {amount} "
        f"(CI95 {scale * metric.low:.3g} to {scale * metric.high:.3g}): {verdict}.",
        f"First order takes {found.cost.mean:.2f} times the time per update "
        f"(CI95 {found.cost.low:.2f} to {found.cost.high:.2f}).",
    ]


def ranking_label(experiment: Experiment, ranking: Ranking) -> str:
    """The name for people of the metric that trials are ranked by."""
    return metric_label(experiment.build_task(), ranking.metric)[0]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings for people, as in `inner.lr=0.0123, inner.steps=5`."""
    return ", ".join(f"{path}={setting_text(value)}" for path, value in settings.items())


def value_text(ranking: Ranking, value: float, ci95: float | None = None) -> str:
    """A value that trials are ranked by for people: `0.5676 ± 0.12`; an accuracy is in percent."""
    scale, unit = (100, " %") if ranking.metric == "accuracy" else (1, "")
    half = "" if ci95 is None else f" ± {scale * ci95:.2g}"
    return f"{scale * value:.4g}{half}{unit}"


def setting_text(value: Any) -> str:
    """The value of a setting for people, floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def best_experiment(plan: Plan, best: TrialResult) -> Experiment:
    """The search's own experiment with the settings of the best trial and without the search."""
    alone = plan.experiment.changed(search=None, run_dir=None)
    own = {
        "name": f"{alone.name}-best",
        "description": f"The best setting of {plan.folder.name}: {settings_text(best.settings)}.",
    }
    return with_settings(alone, {**own, **best.settings})


def write_report(
    plan: Plan, results: Sequence[TrialResult], run_ids: Mapping[str, str]
) -> list[Path]:
    """Write the table, best.yaml and the plots; returns the files."""
    import pandas

    rows = [
        {
            "trial": r.trial_id,
            "outcome": r.outcome,
            **{path: _cell(value) for path, value in r.settings.items()},
            f"validation_{plan.ranking.metric}": r.value,
            "ci95": r.ci95,
            "adaptation_steps": r.step,
            "iteration": r.iteration,
            "seconds": r.seconds,
            "tasks_per_second": r.tasks_per_second,
            "mlflow_run_id": run_ids.get(r.trial_id, ""),
            "failure": r.failure,
        }
        for r in ranked(results, plan.ranking)
    ]
    table = pandas.DataFrame(rows)
    table.to_csv(plan.folder / "results.csv", index=False)
    table.to_parquet(plan.folder / "results.parquet", index=False)
    written = [plan.folder / "results.csv", plan.folder / "results.parquet"]
    best = best_of(results, plan.ranking)
    if best is not None:
        path = plan.folder / "best.yaml"
        write_atomically(path, best_experiment(plan, best).to_yaml())
        written += [path, *write_plots(plan, results)]
    return written


def write_plots(plan: Plan, results: Sequence[TrialResult]) -> list[Path]:
    """Draw the metric over the inner rate (or the first searched range), learning curves, cost."""
    space, folder = plan.search.space, plan.folder / "plots"
    metric = f"validation {ranking_label(plan.experiment, plan.ranking)}"
    name, caption = plan.experiment.name, _caption(plan, results)
    shown = [r for r in results if not math.isnan(r.value)]
    ranges = [path for path, domain in space.items() if _is_axis(domain.values)]
    groups = [path for path in space if path in (_ORDER, "inner.steps")]
    written = []
    if ranges:
        path = "inner.lr" if "inner.lr" in ranges else ranges[0]
        written.append(folder / f"{plan.ranking.metric}_by_{path}.png")
        others = [g for g in groups if g != path]
        plot_points(
            [{"x": float(r.settings[path]), **_point(r, others)} for r in shown],
            written[-1],
            x_label=path,
            x_scale="linear" if space[path].kind == "uniform" else "log",
            metric=metric,
            title=f"{name}: what {path} does",
            caption=caption,
        )
    best = best_of(results, plan.ranking)
    written += [folder / "learning_curves.png", folder / "cost.png"]
    plot_learning_curves(
        [{"curve": learning_curve(plan, r), "best": r is best, **_point(r, groups)} for r in shown],
        written[-2],
        metric=metric,
        title=f"{name}: learning curves of all trials",
        caption=caption,
    )
    plot_points(
        [{"x": r.seconds, **_point(r, groups)} for r in shown],
        written[-1],
        x_label="seconds of meta-updates",
        x_scale="from zero",
        metric=metric,
        title=f"{name}: what quality costs",
        caption=caption,
    )
    return written


def _point(result: TrialResult, groups: Sequence[str]) -> dict[str, Any]:
    """A trial as `pipeline.search.plots` takes it; `groups` are the settings that colours show."""
    return {
        "y": result.value,
        "ci95": result.ci95,
        "group": settings_text({path: result.settings[path] for path in groups}),
        "complete": result.outcome == COMPLETE,
    }


def outcomes(results: Sequence[TrialResult]) -> str:
    """How trials ended, for people: `7 complete, 8 stopped early, 1 failed`."""
    counts = {o: sum(r.outcome == o for r in results) for o in (COMPLETE, STOPPED, FAILED)}
    counts[UNFINISHED] = sum(r.outcome == UNFINISHED for r in results)
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


def _caption(plan: Plan, results: Sequence[TrialResult]) -> str:
    """What the numbers in the figures mean."""
    tasks = plan.experiment.evaluation.validation_tasks
    steps = {r.step for r in results if r.step is not None}
    chosen = (
        counted(steps.pop(), "adaptation step")
        if len(steps) == 1
        else "the adaptation steps trained"
    )
    return (
        f"{len(results)} trials: {outcomes(results)}; {tasks} validation tasks, after {chosen}; "
        "± CI95 over tasks; hollow: not trained to the end"
    )


def _is_axis(values: Sequence[Any]) -> bool:
    """Whether a setting can be an axis: it has several values, all of them numbers."""
    return len(set(map(str, values))) > 1 and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    )


def _cell(value: Any) -> int | float | str:
    """A value for a column of the table; lists and sections become JSON."""
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _interval(values: Sequence[float]) -> Interval:
    """The mean and its interval, t(0.975, n − 1)·sd/√n on either side."""
    from scipy import stats  # here: importing it takes about a second

    n = len(values)
    mean = statistics.fmean(values) if values else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _ratio(values: Sequence[float]) -> Interval:
    """The geometric mean and its interval, from the logarithms."""
    found = _interval([math.log(value) for value in values])
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high))
