"""Draws the figures of a search from plain dictionaries and sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes

from pipeline.evaluation.plot_style import (
    color_of,
    finish,
    is_logarithmic,
    label_metric,
    marker_of,
    new_figure,
)

_OUTLIER = 10  # losses above this many medians lie outside the axis: runs that diverged


def plot_points(
    points: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x_label: str,
    x_scale: Literal["linear", "log", "from zero"],
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """Draw one point per trial: a metric over a searched setting, or over what the trial cost.

    Each point holds "x", "y", "ci95", its "group" (one colour each), and whether it is "complete".
    """
    figure, axes = new_figure(8.6, 4.6)
    caption += _scatter(axes, metric, points)
    if x_scale == "log" and all(p["x"] > 0 for p in points):
        axes.set_xscale("log")
    if x_scale == "from zero":
        axes.set_xlim(left=0)
    finish(figure, axes, path, x_label, title, caption)


def plot_learning_curves(
    trials: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """Draw a metric by iteration for every trial; a hollow end marks one that was not completed.

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
    finish(figure, axes, path, "iteration", title, caption)


def _fit(axes: Axes, metric: str, values: Sequence[float]) -> str:
    """Choose the scale of the metric's axis; return words for the caption on values outside it.

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
    """Draw points with their intervals; return words for the caption on points left out."""
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
                marker=marker_of(index),
                markersize=6,
                color=color,
                markerfacecolor=color if complete else "white",
                elinewidth=1,
            )
        label = group or "trials"
        axes.plot([], [], marker=marker_of(index), color=color, linestyle="none", label=label)
    if hidden:
        axes.set_ylim(low, high)  # the intervals of points may have widened it
    return hidden


def _colors_of(items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each group, in the order of the groups' names."""
    groups = sorted({item["group"] for item in items})
    return {group: color_of(index) for index, group in enumerate(groups)}
