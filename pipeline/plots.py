"""Figures of a run, drawn without pyplot: nothing global, no display, any thread.

All input is plain dictionaries and sequences, as it comes out of a results file.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe & Ito: told apart by readers of every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_GREY = "#666666"
_CAPTION_WIDTH, _CAPTION_LINE = 15, 0.14  # characters per inch, inches per line
_OUTLIER = 10  # times the median: a loss of a run that diverged
_LOG_RANGE = 20  # losses that span more than this are drawn on a logarithmic axis


def plot_adaptation_curve(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    metric: str = "loss",
    title: str = "Adaptation to new tasks",
    caption: str = "",
) -> None:
    """A metric over gradient steps on new tasks: mean and 95% confidence interval per series.

    `curves` maps a series' name to {"steps", "mean", "ci95"}, three sequences of the same length
    (ci95 is half the width of the interval). `metric` names the y axis; 'accuracy' is a fraction
    and drawn in percent. `caption` is for the protocol.
    """
    figure, axes = _figure(7.2, 4.6)
    logarithmic = _is_logarithmic(metric, [curve["mean"] for curve in curves.values()])
    for index, (name, curve) in enumerate(curves.items()):
        color = _COLORS[index % len(_COLORS)]
        steps, mean = list(curve["steps"]), list(curve["mean"])
        low = [m - c for m, c in zip(mean, curve["ci95"], strict=True)]
        high = [m + c for m, c in zip(mean, curve["ci95"], strict=True)]
        marker = _MARKERS[index % len(_MARKERS)]
        label = f"{name} (= 0)" if logarithmic and not any(mean) else name
        axes.plot(steps, mean, color=color, marker=marker, markersize=5, label=label)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    _label_metric(axes, metric, logarithmic)
    axes.set_xlabel("gradient steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    _legend(axes)
    _save(figure, path, caption or "bands: 95% confidence intervals")


def plot_sinusoid_fits(
    path: str | Path,
    tasks: Sequence[Mapping[str, Any]],
    *,
    title: str = "Fits before and after adaptation",
    caption: str = "",
) -> None:
    """Regression tasks side by side: truth, support points, and the fit after some gradient steps.

    Each task holds {"x_grid", "truth", "support_x", "support_y", "fits": {steps: y over x_grid}},
    and optionally a "title".
    """
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.6 * columns + 1.8, 2.5 * rows + 0.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        axes.plot(task["x_grid"], task["truth"], color=_GREY, linewidth=3, alpha=0.5, label="truth")
        for index, (steps, fit) in enumerate(sorted(task["fits"].items(), key=lambda f: int(f[0]))):
            axes.plot(
                task["x_grid"],
                fit,
                color=_COLORS[index % len(_COLORS)],
                linestyle=("--", "-.", "-")[min(index, 2)],
                label=_steps(int(steps)),
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
        _soften(axes)
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    for axes in grid.flat[max(0, len(tasks) - columns) : len(tasks)]:  # nothing is below them
        axes.set_xlabel("x")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("y")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    _save(figure, path, caption)


def plot_training(
    history: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    metric: str = "loss",
    title: str = "Meta-training",
    caption: str = "",
) -> None:
    """A metric by iteration.

    `history` holds "iteration" and one sequence of that length per series, for example "support"
    (the loss that adaptation starts from) and "query" (the one that is meta-learned). Long series
    are drawn faintly, with their moving mean on top.
    """
    figure, axes = _figure(7.2, 4.2)
    iterations = list(history["iteration"])
    series = {name: list(values) for name, values in history.items() if name != "iteration"}
    window = max(1, len(iterations) // 50)
    smooth = {name: _moving_mean(values, window) for name, values in series.items()}
    for index, name in enumerate(series):
        color = _COLORS[index % len(_COLORS)]
        if window > 1:
            axes.plot(iterations, series[name], color=color, alpha=0.25, linewidth=0.8)
        axes.plot(iterations, smooth[name], color=color, linewidth=1.8, label=name)
    _label_metric(axes, metric, _is_logarithmic(metric, list(smooth.values())))
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    _legend(axes)
    _save(figure, path, caption)


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
    figure, axes = _figure(8.6, 4.6)
    hidden = _fit(axes, metric, [p["y"] for p in points])
    low, high = axes.get_ylim()
    _scatter(axes, [p for p in points if not hidden or p["y"] <= high])
    if hidden:
        axes.set_ylim(low, high)
    caption += hidden
    if logarithmic and all(p["x"] > 0 for p in points):
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_title(title)
    _legend(axes)
    _save(figure, path, caption)


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
    figure, axes = _figure(8.6, 4.6)
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
    axes.set_xlabel("iteration")
    axes.set_title(title)
    _legend(axes)
    _save(figure, path, caption)


def plot_cost(
    points: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str,
    title: str,
    caption: str = "",
) -> None:
    """A metric over the seconds that it took; points as in `plot_search`."""
    figure, axes = _figure(8.6, 4.6)
    hidden = _fit(axes, metric, [p["y"] for p in points])
    low, high = axes.get_ylim()
    _scatter(axes, [p for p in points if not hidden or p["y"] <= high])
    if hidden:
        axes.set_ylim(low, high)
    caption += hidden
    axes.set_xlabel("seconds of meta-updates")
    axes.set_xlim(left=0)
    axes.set_title(title)
    _legend(axes)
    _save(figure, path, caption)


def _fit(axes: Axes, metric: str, values: Sequence[float]) -> str:
    """Choose the scale of the metric; returns what a caption must say of values left outside.

    Rates that are too large make losses of any size, which would flatten all others.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    limit = _OUTLIER * finite[len(finite) // 2] if finite else math.inf
    shown = [value for value in finite if value <= limit]
    if metric.endswith("accuracy") or len(shown) == len(finite) or not shown or shown[0] <= 0:
        _label_metric(axes, metric, _is_logarithmic(metric, [finite]))
        return ""
    _label_metric(axes, metric, _is_logarithmic(metric, [shown]))
    axes.set_ylim(bottom=0.8 * shown[0], top=1.2 * shown[-1])
    return f"; {len(finite) - len(shown)} of {len(finite)} points are above the axis"


def _scatter(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    colors = _colors_of(points)
    for index, (group, color) in enumerate(colors.items()):
        for complete in (True, False):
            some = [p for p in points if p["group"] == group and p["complete"] == complete]
            axes.errorbar(
                [p["x"] for p in some],
                [p["y"] for p in some],
                yerr=[p["ci95"] for p in some],
                linestyle="none",
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=6,
                color=color,
                markerfacecolor=color if complete else "white",
                elinewidth=1,
            )
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot([], [], marker=marker, color=color, linestyle="none", label=group or "trials")


def _colors_of(items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each group, in the order of their names."""
    groups = sorted({item["group"] for item in items})
    return {group: _COLORS[index % len(_COLORS)] for index, group in enumerate(groups)}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _soften(axes)
    return figure, axes


def _soften(axes: Axes) -> None:
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _is_logarithmic(metric: str, series: Sequence[Sequence[float]]) -> bool:
    """Whether losses span so much that only a logarithmic axis shows them all; zeros aside."""
    values = [value for values in series for value in values if math.isfinite(value) and value != 0]
    if metric.endswith("accuracy") or not values or min(values) < 0:
        return False
    return max(values) / min(values) > _LOG_RANGE


def _label_metric(axes: Axes, metric: str, logarithmic: bool) -> None:
    if metric.endswith("accuracy"):
        axes.set_ylabel(f"{metric} (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        return
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel(f"{metric} (log scale)" if logarithmic else metric)


def _legend(axes: Axes) -> None:
    """Beside the data, where it can cover nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _steps(steps: int) -> str:
    if steps == 0:
        return "before adaptation"
    return f"after {steps} step{'' if steps == 1 else 's'}"


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over up to `window` values, centred; a non-finite value is left out."""
    means = []
    for index in range(len(values)):
        near = values[max(0, index - window // 2) : index + (window + 1) // 2]
        finite = [value for value in near if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _save(figure: Figure, path: str | Path, caption: str) -> None:
    if caption:
        width, height = figure.get_size_inches()
        lines = textwrap.wrap(caption, int(width * _CAPTION_WIDTH))
        share = (len(lines) * _CAPTION_LINE + 0.1) / height
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(rect=(0.0, share, 1.0, 1.0 - share))
        text = "\n".join(lines)
        figure.text(0.01, 0.01, text, fontsize="x-small", color=_GREY, ha="left", va="bottom")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
