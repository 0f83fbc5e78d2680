"""The style of all figures: colours, axes, legends, captions.

Figures are drawn without pyplot, so they need no display and no global state, and any thread can
draw one.
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
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from pipeline.config.wording import counted

# The palette of Okabe & Ito, which readers with any kind of colour vision can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#666666"
_CAPTION_WIDTH, _CAPTION_LINE = 15, 0.14  # characters per inch, inches per line
_LOG_RANGE = 20  # losses whose ratio exceeds this are drawn on a logarithmic axis
_FEW_DECADES = 1e3  # a logarithmic axis below this ratio has ticks at 1, 2, 5
_MOST_TICKS = 12
_MOST_NUMBERS = 8  # numbers of iterations that an axis has room for


def after_steps(steps: int) -> str:
    """The number of gradient steps taken, for a legend."""
    if steps == 0:
        return "before adaptation"
    return f"after {counted(steps, 'step')}"


def color_of(number: int) -> str:
    """The colour of series `number`; colours repeat."""
    return COLORS[number % len(COLORS)]


def marker_of(number: int) -> str:
    """The marker of series `number`; markers repeat."""
    return MARKERS[number % len(MARKERS)]


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches, with one pair of axes."""
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
    """A figure of this size in inches, and its axes, [rows, columns]."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    for axes in grid.flat:
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def is_logarithmic(metric: str, series: Sequence[Sequence[float]]) -> bool:
    """Whether losses differ so much that they need a logarithmic axis; zeros are left out."""
    values = [value for values in series for value in values if math.isfinite(value) and value != 0]
    if metric.endswith("accuracy") or not values or min(values) < 0:
        return False
    return max(values) / min(values) > _LOG_RANGE


def label_metric(axes: Axes, metric: str, logarithmic: bool) -> None:
    """Label the y axis; an accuracy, a fraction, is shown in percent."""
    if metric.endswith("accuracy"):
        axes.set_ylabel(f"{metric} (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        return
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel(f"{metric} (log scale)" if logarithmic else metric)


def whole_numbers(axes: Axes, at: Sequence[float] = ()) -> None:
    """Have whole numbers alone on the x axis; where `at` are a few, ascending, those that have room
    for their labels, the last in any case."""
    if 0 < len(at) <= _MOST_NUMBERS:
        chosen = [at[-1]]
        for value in reversed(at[:-1]):
            if chosen[-1] - value >= (at[-1] - at[0]) / _MOST_NUMBERS:
                chosen.append(value)
        axes.set_xticks(chosen[::-1])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def legend(axes: Axes) -> None:
    """Add a legend beside the data, which it cannot cover there."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Add a legend of what is in `axes`, in as many columns as there is room for; `save` puts it
    below all axes. The figure becomes higher by it."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    width, height = figure.get_size_inches()
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(labels), 0, -1):
        added = figure.legend(
            handles, labels, loc="lower center", ncols=columns, frameon=False, borderaxespad=0
        )
        box = added.get_window_extent(renderer)
        if box.width <= figure.bbox.width or columns == 1:
            added.set_in_layout(False)  # `save` leaves room for it
            figure.set_size_inches(width, height + box.height / figure.dpi)
            return
        added.remove()


def shade(number: int, count: int) -> tuple[float, float, float, float]:
    """The colour of `number` among `count` ordered series, dark to light."""
    return colormaps["viridis"](0.9 * number / max(1, count - 1))


def shade_bar(figure: Figure, axes: Axes, count: int, label: str) -> None:
    """Add a bar beside the data that shows the shades of 0 .. count − 1."""
    colors = ListedColormap([shade(number, count) for number in range(count)])
    edges = BoundaryNorm([number - 0.5 for number in range(count + 1)], count)
    ticks = range(0, count, math.ceil(count / _MOST_TICKS))
    bar = figure.colorbar(ScalarMappable(edges, colors), ax=axes, label=label, ticks=ticks)
    bar.ax.tick_params(which="both", length=0)


def finish(
    figure: Figure,
    axes: Axes,
    path: str | Path,
    x_label: str,
    title: str,
    caption: str = "",
) -> None:
    """Complete a figure with one pair of axes and save it."""
    axes.set_xlabel(x_label)
    axes.set_title(title)
    legend_below(figure, axes)
    save(figure, path, caption)


def finish_panels(
    figure: Figure,
    grid: npt.NDArray[Any],
    count: int,
    path: str | Path,
    *,
    x_label: str,
    y_label: str,
    title: str,
    caption: str,
) -> None:
    """Complete a figure of `count` panels with common axes and one common legend, and save it."""
    columns = grid.shape[1]
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, count - columns) : count]:  # the lowest panel of each column
        axes.set_xlabel(x_label)
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    figure.suptitle(title)
    legend_below(figure, grid.flat[0])
    save(figure, path, caption)


def save(figure: Figure, path: str | Path, caption: str) -> None:
    """Write a figure, its legend and its caption below the axes; make its folder."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _plain_ticks(axis)
    width, height = figure.get_size_inches()
    share = 0.0  # of the height, that is taken below the axes
    if caption:
        lines = textwrap.wrap(caption, int(width * _CAPTION_WIDTH))
        share = (len(lines) * _CAPTION_LINE + 0.1) / height
        text = "\n".join(lines)
        figure.text(0.01, 0.01, text, fontsize="x-small", color=GREY, ha="left", va="bottom")
    for below in figure.legends:
        below.set_bbox_to_anchor((0.0, share, 1.0, 1.0 - share), figure.transFigure)
        box = below.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        share += box.height / figure.bbox.height
    figure.set_layout_engine("constrained", rect=(0.0, share, 1.0, 1.0 - share))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers; with 1, 2, 5, 10 ... if it spans few decades."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < _FEW_DECADES else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())
