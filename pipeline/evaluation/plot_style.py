"""What all figures have in common: colours, axes, captions.

Drawn without pyplot: nothing global, no display, any thread.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

# Okabe & Ito: told apart by readers of every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#666666"
_CAPTION_WIDTH, _CAPTION_LINE = 15, 0.14  # characters per inch, inches per line
_LOG_RANGE = 20  # losses that span more than this are drawn on a logarithmic axis
_FEW_DECADES = 1e3
_MOST_TICKS = 12


def after_steps(steps: int) -> str:
    """When, for a legend: gradient steps that were taken before."""
    if steps == 0:
        return "before adaptation"
    return f"after {steps} step{'' if steps == 1 else 's'}"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, grid = new_panels(width, height)
    return figure, grid[0, 0]


def new_panels(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure and its axes, [rows, columns]."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    for axes in grid.flat:
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def is_logarithmic(metric: str, series: Sequence[Sequence[float]]) -> bool:
    """Whether losses span so much that only a logarithmic axis shows them all; zeros aside."""
    values = [value for values in series for value in values if math.isfinite(value) and value != 0]
    if metric.endswith("accuracy") or not values or min(values) < 0:
        return False
    return max(values) / min(values) > _LOG_RANGE


def label_metric(axes: Axes, metric: str, logarithmic: bool) -> None:
    if metric.endswith("accuracy"):
        axes.set_ylabel(f"{metric} (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        return
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel(f"{metric} (log scale)" if logarithmic else metric)


def legend(axes: Axes) -> None:
    """Beside the data, where it can cover nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def shade(number: int, count: int) -> tuple[float, float, float, float]:
    """Dark to light, in order."""
    return colormaps["viridis"](0.9 * number / max(1, count - 1))


def shade_bar(figure: Figure, axes: Axes, count: int, label: str) -> None:
    """Says which of 0 .. count − 1 has which shade, beside the data."""
    colors = ListedColormap([shade(number, count) for number in range(count)])
    edges = BoundaryNorm([number - 0.5 for number in range(count + 1)], count)
    ticks = range(0, count, math.ceil(count / _MOST_TICKS))
    bar = figure.colorbar(ScalarMappable(edges, colors), ax=axes, label=label, ticks=ticks)
    bar.ax.tick_params(which="both", length=0)


def save(figure: Figure, path: str | Path, caption: str) -> None:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _plain_ticks(axis)
    if caption:
        width, height = figure.get_size_inches()
        lines = textwrap.wrap(caption, int(width * _CAPTION_WIDTH))
        share = (len(lines) * _CAPTION_LINE + 0.1) / height
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(rect=(0.0, share, 1.0, 1.0 - share))
        text = "\n".join(lines)
        figure.text(0.01, 0.01, text, fontsize="x-small", color=GREY, ha="left", va="bottom")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plain_ticks(axis: Axis) -> None:
    """Of a logarithmic axis: 1, 2, 5, 10 ... where it spans few decades, and no 6 × 10⁰."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < _FEW_DECADES else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())
