"""What all figures have in common: colours, axes, captions.

Drawn without pyplot: nothing global, no display, any thread.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

# Okabe & Ito: told apart by readers of every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#666666"
_CAPTION_WIDTH, _CAPTION_LINE = 15, 0.14  # characters per inch, inches per line
_LOG_RANGE = 20  # losses that span more than this are drawn on a logarithmic axis


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    soften(axes)
    return figure, axes


def soften(axes: Axes) -> None:
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


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


def save(figure: Figure, path: str | Path, caption: str) -> None:
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
