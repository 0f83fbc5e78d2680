"""Draws curves of a run from plain dictionaries and sequences, as in a results file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from pipeline.evaluation.plot_style import (
    GREY,
    after_steps,
    color_of,
    finish,
    finish_panels,
    is_logarithmic,
    label_metric,
    marker_of,
    new_figure,
    new_panels,
    whole_numbers,
)

_STACKED, _MOST_PANELS = 3, 6  # panels one below the other; panels in a figure


def plot_adaptation_curve(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    metric: str = "loss",
    title: str = "Adaptation to new tasks",
    caption: str = "",
) -> None:
    """Draw a metric over gradient steps on new tasks: mean and 95 % confidence interval per series.

    `curves` maps a series' name to {"steps", "mean", "ci95"}, three sequences of the same length
    (ci95 is half the width of the interval). `metric` names the y axis; 'accuracy' is a fraction
    and drawn in percent. `caption` is for the protocol.
    """
    figure, axes = new_figure(7.2, 4.6)
    logarithmic = is_logarithmic(metric, [curve["mean"] for curve in curves.values()])
    _draw_curves(axes, curves, logarithmic)
    label_metric(axes, metric, logarithmic)
    caption = caption or "bands: 95% confidence intervals"
    whole_numbers(axes)
    finish(figure, axes, path, "gradient steps", title, caption)


def plot_adaptation_panels(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    path: str | Path,
    *,
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """Draw a panel for each kind of tasks, by its name, all with the same scale.

    Each holds the same series, as `plot_adaptation_curve` takes them. Where there are more than
    six, the caption says how many.
    """
    shown = dict(list(panels.items())[:_MOST_PANELS])
    if len(shown) < len(panels):
        caption += f"; the first {len(shown)} of {len(panels)} kinds of tasks"
    columns = 1 if len(shown) <= _STACKED else 2
    rows = math.ceil(len(shown) / columns)
    size = (7.2 if columns == 1 else 9.0), 2.4 * rows + 0.8
    figure, grid = new_panels(*size, rows, columns, sharex=True, sharey=True)
    means = [curve["mean"] for curves in shown.values() for curve in curves.values()]
    logarithmic = is_logarithmic(metric, means)
    for axes, (name, curves) in zip(grid.flat, shown.items(), strict=False):
        _draw_curves(axes, curves, logarithmic)
        label_metric(axes, metric, logarithmic)
        whole_numbers(axes)
        axes.set_title(name, fontsize="medium")
    labels = {"x_label": "gradient steps", "y_label": grid[0, 0].get_ylabel()}
    for axes in grid.flat:
        axes.set_ylabel("")
    finish_panels(figure, grid, len(shown), path, **labels, title=title, caption=caption)


def _draw_curves(
    axes: Axes, curves: Mapping[str, Mapping[str, Sequence[float]]], logarithmic: bool
) -> None:
    """Draw each series with its band."""
    for index, (name, curve) in enumerate(curves.items()):
        color = color_of(index)
        steps, mean = list(curve["steps"]), list(curve["mean"])
        low = [m - c for m, c in zip(mean, curve["ci95"], strict=True)]
        high = [m + c for m, c in zip(mean, curve["ci95"], strict=True)]
        marker = marker_of(index)
        label = f"{name} (= 0)" if logarithmic and not any(mean) else name
        axes.plot(steps, mean, color=color, marker=marker, markersize=5, label=label)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def plot_sinusoid_fits(
    path: str | Path,
    tasks: Sequence[Mapping[str, Any]],
    *,
    title: str = "Fits before and after adaptation",
    caption: str = "",
) -> None:
    """Draw regression tasks side by side: truth, support points, the fit after some gradient steps.

    Each task holds {"x_grid", "truth", "support_x", "support_y", "fits": {steps: y over x_grid}},
    and optionally a "title".
    """
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    size = 3.6 * columns + 0.6, 2.5 * rows + 0.9
    figure, grid = new_panels(*size, rows, columns, sharex=True, sharey=True)
    for axes, task in zip(grid.flat, tasks, strict=False):
        axes.plot(task["x_grid"], task["truth"], color=GREY, linewidth=3, alpha=0.5, label="truth")
        for index, (steps, fit) in enumerate(sorted(task["fits"].items(), key=lambda f: int(f[0]))):
            axes.plot(
                task["x_grid"],
                fit,
                color=color_of(index),
                linestyle=("--", "-.", "-")[min(index, 2)],
                label=after_steps(int(steps)),
            )
        axes.plot(
            task["support_x"],
            task["support_y"],
            linestyle="none",
            marker="o",
            color="black",
            markersize=5,
            label="support points",
        )
        axes.set_title(task.get("title", ""), fontsize="medium")
    finish_panels(
        figure, grid, len(tasks), path, x_label="x", y_label="y", title=title, caption=caption
    )


def plot_training(
    history: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    metric: str = "loss",
    title: str = "Meta-training",
    caption: str = "",
) -> None:
    """Draw a metric by iteration.

    `history` holds "iteration" and one sequence of that length per series, for example "support"
    (the loss that adaptation starts from) and "query" (the one that is meta-learned). Long series
    are drawn faintly, with their moving mean on top.
    """
    figure, axes = new_figure(7.2, 4.2)
    iterations = list(history["iteration"])
    series = {name: list(values) for name, values in history.items() if name != "iteration"}
    window = max(1, len(iterations) // 50)
    smooth = {name: _moving_mean(values, window) for name, values in series.items()}
    for index, name in enumerate(series):
        color = color_of(index)
        if window > 1:
            axes.plot(iterations, series[name], color=color, alpha=0.25, linewidth=0.8)
        axes.plot(iterations, smooth[name], color=color, linewidth=1.8, label=name)
    label_metric(axes, metric, is_logarithmic(metric, list(smooth.values())))
    whole_numbers(axes)
    finish(figure, axes, path, "iteration", title, caption)


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over up to `window` values around each; values that are not finite are left out."""
    means = []
    for index in range(len(values)):
        near = values[max(0, index - window // 2) : index + (window + 1) // 2]
        finite = [value for value in near if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means
