"""Draws a run's diagnostics, one figure per question, from the records of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.evaluation.health import PREFIX, by_step
from pipeline.evaluation.plot_style import (
    COLORS,
    GREY,
    color_of,
    finish,
    is_logarithmic,
    label_metric,
    marker_of,
    new_figure,
    shade,
    shade_bar,
    whole_numbers,
)

Metrics = Mapping[str, float]
"""One diagnosis: its metrics by name, with their "iteration"."""
_FEW = 20  # diagnoses, each of which has a marker: a line of one point cannot be seen
_NEAR = 3  # a bound above this many times the largest value is left out: it would flatten the rest


def plot_health(
    records: Sequence[Metrics], folder: Path, alpha: float | None, labels: Mapping[str, str]
) -> list[Path]:
    """Draw the diagnoses of a run; return the files.

    `records` are its diagnoses, one at least. `alpha` is the inner rate if adaptation is gradient
    descent with a fixed rate, else None. `labels` say what each parameter is called
    (`parameter_labels`). Each figure is a function that returns whether the records have what it
    shows.
    """
    written = []
    for name, draw in {
        "gradient_norm": _gradient_norm,
        "inner_loss": _inner_loss,
        "curvature": _curvature,
        "order": _order,
        "hurt": _hurt,
    }.items():
        path = folder / f"health_{name}.png"
        if draw(records, path, alpha):
            written.append(path)
    path = folder / "health_inner_lr.png"
    return [*written, path] if _inner_lr(records, path, labels) else written


def _gradient_norm(records: Sequence[Metrics], path: Path, alpha: float | None) -> bool:
    """Draw the norm of the meta-gradient on its way back, by inner step."""
    return _lines_by_step(
        records,
        path,
        "gradient_norm",
        y_label="norm of the meta-gradient",
        title="The meta-gradient on its way back through adaptation",
        caption="Gradient of the meta-loss with respect to the parameters after s inner steps, "
        "mean over tasks. Lines that spread: it explodes (early steps above) or vanishes (below).",
    )


def _curvature(records: Sequence[Metrics], path: Path, alpha: float | None) -> bool:
    """Draw the curvature along the inner gradient, by inner step."""
    caption = "Along the gradient g of the support loss after s inner steps, mean over tasks."
    if alpha is not None:
        caption += (
            f" Above 2 / inner rate = {2 / alpha:,.4g} a step of gradient descent ends higher than "
            "it began."
        )
    return _lines_by_step(
        records,
        path,
        "curvature",
        y_label="curvature g·Hg / |g|²",
        title="How steep the way of adaptation is",
        caption=caption,
        bound=None if alpha is None else 2 / alpha,
    )


def _lines_by_step(
    records: Sequence[Metrics],
    path: Path,
    name: str,
    *,
    y_label: str,
    title: str,
    caption: str,
    bound: float | None = None,
) -> bool:
    """Draw a diagnostic by iteration, one line per inner step, and a bound if it is near enough."""
    lines = np.array([by_step(dict(record), name) for record in records]).T
    if not len(lines):
        return False
    figure, axes = new_figure(7.2, 4.2)
    for s, line in enumerate(lines):
        axes.plot(_iterations(records), line, color=shade(s, len(lines)), **_marked(records))
    levels = [] if bound is None else [bound]
    logarithmic = is_logarithmic(name, [*lines.tolist(), levels])
    label_metric(axes, y_label, logarithmic)
    if bound is not None and (logarithmic or bound < _NEAR * np.nanmax(lines)):
        axes.axhline(bound, color=GREY, linestyle="--")
        axes.text(
            1.0,
            bound,
            "2 / inner rate",
            transform=axes.get_yaxis_transform(),
            color=GREY,
            ha="right",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )
    if len(lines) > 1:
        shade_bar(figure, axes, len(lines), "inner steps s")
    _by_iteration(figure, axes, path, title, caption, records)
    return True


def _inner_loss(records: Sequence[Metrics], path: Path, alpha: float | None) -> bool:
    """Draw the support loss by inner step, for five iterations."""
    chosen = sorted({round(i * (len(records) - 1) / 4) for i in range(5)})
    losses = [by_step(dict(records[i]), "inner_loss") for i in chosen]
    figure, axes = new_figure(7.2, 4.2)
    for number, (i, loss) in enumerate(zip(chosen, losses, strict=True)):
        label = f"iteration {int(records[i]['iteration']):,}"
        color = shade(number, len(chosen))
        axes.plot(range(len(loss)), loss, color=color, marker="o", markersize=4, label=label)
    logarithmic = is_logarithmic("loss", [list(loss) for loss in losses])
    label_metric(axes, "support loss before the step", logarithmic)
    title = "Adaptation to the support set"
    whole_numbers(axes)
    finish(figure, axes, path, "inner step", title, "Mean over tasks.")
    return True


def _order(records: Sequence[Metrics], path: Path, alpha: float | None) -> bool:
    """Draw the meta-gradient of second order against that of first order."""
    if f"{PREFIX}order_cosine" not in records[0]:
        return False
    figure, axes = new_figure(7.2, 4.2)
    for number, (name, label) in enumerate(
        {"order_cosine": "cosine", "order_norm_ratio": "norm: second / first order"}.items()
    ):
        values = [record[PREFIX + name] for record in records]
        axes.plot(
            _iterations(records), values, color=COLORS[number], label=label, **_marked(records)
        )
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_ylabel("second against first order")
    caption = "Both at 1: the first order would do as well. Same tasks for both."
    _by_iteration(figure, axes, path, "What the second order changes", caption, records)
    return True


def _hurt(records: Sequence[Metrics], path: Path, alpha: float | None) -> bool:
    """Draw the share of tasks whose query loss rises by adaptation."""
    figure, axes = new_figure(7.2, 3.6)
    shares = [record[f"{PREFIX}hurt_share"] for record in records]
    axes.plot(_iterations(records), shares, color=COLORS[1], **_marked(records))
    axes.set_ylim(-0.02, max(0.2, 1.1 * max(shares)))
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axes.set_ylabel("share of tasks (%)")
    caption = "Query loss after adaptation higher than before."
    _by_iteration(figure, axes, path, "Tasks on which adaptation hurts", caption, records)
    return True


def _inner_lr(records: Sequence[Metrics], path: Path, labels: Mapping[str, str]) -> bool:
    """Draw learned rates: by step at the last diagnosis, or by iteration where steps share them."""
    prefix = f"{PREFIX}inner_lr/"
    names = [key.removeprefix(prefix) for key in records[-1] if key.startswith(prefix)]
    if not names:
        return False
    last = dict(records[-1])
    parameters = list(dict.fromkeys(name.rpartition("_step")[0] or name for name in names))
    figure, axes = new_figure(8.6, 4.6)
    stepwise = parameters[0] not in names
    for number, name in enumerate(parameters):
        if stepwise:
            rates = list(by_step(last, f"inner_lr/{name}"))
            x = [1.0 + s for s in range(len(rates))]
        else:
            x, rates = _iterations(records), [r[prefix + name] for r in records]
        marker = marker_of(number // len(COLORS))
        label = labels.get(name, name)
        axes.plot(x, rates, color=color_of(number), marker=marker, markersize=4, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel("inner rate")
    if stepwise:
        title = f"Learned inner rates after iteration {int(last['iteration']):,}"
        whole_numbers(axes)
        finish(figure, axes, path, "inner step", title)
    else:
        caption = "Means over the entries of each parameter."
        _by_iteration(figure, axes, path, "Learned inner rates", caption, records)
    return True


def _by_iteration(
    figure: Figure,
    axes: Axes,
    path: Path,
    title: str,
    caption: str,
    records: Sequence[Metrics],
) -> None:
    """Complete and save a figure whose x axis is the iteration, with numbers at the diagnoses."""
    whole_numbers(axes, _iterations(records))
    finish(figure, axes, path, "iteration", title, caption)


def _marked(records: Sequence[Metrics]) -> dict[str, Any]:
    """How the points of a line by iteration are drawn."""
    return {"marker": "o", "markersize": 4} if len(records) <= _FEW else {}


def _iterations(records: Sequence[Metrics]) -> list[float]:
    """The x values of figures by iteration."""
    return [record["iteration"] for record in records]
