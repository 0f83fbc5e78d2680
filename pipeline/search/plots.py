"""Figures of a search. All input is plain dictionaries and sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.plot_style import (
    COLORS,
    MARKERS,
    is_logarithmic,
    label_metric,
    legend,
    new_figure,
    save,
)

_OUTLIER = 10  # times the median: a loss of a run that diverged


def plot_search(
    points: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x_label: str,
    logarithmic: bool,
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """A metric over a searched setting, one point per trial.

    Each point holds "x", "y", "ci95", its "group" (one colour each), and whether it is "complete".
    """
    figure, axes = new_figure(8.6, 4.6)
    caption += _scatter(axes, metric, points)
    if logarithmic and all(p["x"] > 0 for p in points):
        axes.set_xscale("log")
    _finish(figure, axes, path, x_label, title, caption)


def plot_learning_curves(
    trials: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """A metric by iteration for every trial; those that did not end are marked where they stopped.

    Each trial holds its "curve" (iteration -> value), its "group", "complete" and "best".
    """
    figure, axes = new_figure(8.6, 4.6)
    colors = _colors_of(trials)
    for trial in trials:
        iterations = sorted(trial["curve"])
        values = [trial["curve"][iteration] for iteration in iterations]
        color, best = colors[trial["group"]], trial["best"]
        axes.plot(iterations, values, color=color, linewidth=3 if best else 1.2, alpha=0.8)
        if iterations:
            fill = color if trial["complete"] else "white"
            axes.plot(iterations[-1:], values[-1:], "o", color=color, markerfacecolor=fill)
    for group, color in colors.items():
        axes.plot([], [], color=color, label=group or "trials")
    axes.plot([], [], color="black", linewidth=3, label="the best (thick)")
    caption += _fit(axes, metric, [v for trial in trials for v in trial["curve"].values()])
    _finish(figure, axes, path, "iteration", title, caption)


def plot_cost(
    points: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """A metric over the seconds that it took; points as in `plot_search`."""
    figure, axes = new_figure(8.6, 4.6)
    caption += _scatter(axes, metric, points)
    axes.set_xlim(left=0)
    _finish(figure, axes, path, "seconds of meta-updates", title, caption)


def _finish(
    figure: Figure, axes: Axes, path: str | Path, x_label: str, title: str, caption: str
) -> None:
    """What all figures of a search end with."""
    axes.set_xlabel(x_label)
    axes.set_title(title)
    legend(axes)
    save(figure, path, caption)


def _fit(axes: Axes, metric: str, values: Sequence[float]) -> str:
    """Choose the scale of the metric; returns what a caption must say of values left outside.

    Rates that are too large make losses of any size, which would flatten all others.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    limit = _OUTLIER * finite[len(finite) // 2] if finite else math.inf
    shown = [value for value in finite if value <= limit]
    if metric.endswith("accuracy") or len(shown) == len(finite) or not shown or shown[0] <= 0:
        label_metric(axes, metric, is_logarithmic(metric, [finite]))
        return ""
    label_metric(axes, metric, is_logarithmic(metric, [shown]))
    axes.set_ylim(bottom=0.8 * shown[0], top=1.2 * shown[-1])
    return f"; {len(finite) - len(shown)} of {len(finite)} points are above the axis"


def _scatter(axes: Axes, metric: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Points with their intervals; returns what a caption must say of those left out."""
    hidden = _fit(axes, metric, [p["y"] for p in points])
    low, high = axes.get_ylim()
    points = [p for p in points if not hidden or p["y"] <= high]
    colors = _colors_of(points)
    for index, (group, color) in enumerate(colors.items()):
        for complete in (True, False):
            some = [p for p in points if p["group"] == group and p["complete"] == complete]
            axes.errorbar(
                [p["x"] for p in some],
                [p["y"] for p in some],
                yerr=[p["ci95"] for p in some],
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                markersize=6,
                color=color,
                markerfacecolor=color if complete else "white",
                elinewidth=1,
            )
        marker = MARKERS[index % len(MARKERS)]
        axes.plot([], [], marker=marker, color=color, linestyle="none", label=group or "trials")
    if hidden:
        axes.set_ylim(low, high)  # intervals may be longer
    return hidden


def _colors_of(items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each group, in the order of their names."""
    groups = sorted({item["group"] for item in items})
    return {group: COLORS[index % len(COLORS)] for index, group in enumerate(groups)}
