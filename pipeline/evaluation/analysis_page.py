"""Writes an analysis as one HTML page: the finding, two tables, two figures.

RUN_DIR/analysis/index.html     the page, complete in itself
RUN_DIR/analysis/analysis.json  every number
RUN_DIR/analysis/*.png          the plots
"""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from pipeline.config import json_text
from pipeline.config.experiment import Experiment
from pipeline.config.wording import counted
from pipeline.evaluation.analysis import ALL, CENTROID, FRACTIONS, Analysis
from pipeline.evaluation.analysis_finding import finding
from pipeline.evaluation.plot_style import (
    COLORS,
    GREY,
    finish,
    is_logarithmic,
    label_metric,
    legend,
    new_figure,
    new_panels,
    save,
)
from pipeline.maml.confidence import Estimate, mean_and_ci95
from pipeline.maml.representations import layer_label
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import Which

_PATHS_SHOWN = 8
_PARAMETERS = {
    "final": "the final parameters",
    "best": "the parameters that were best on validation",
}
_CENTROID = """ Nearest centroid: no head either; a query example takes the class whose mean
support feature is nearest (NIL, Raghu et al. 2020)."""


def write_analysis(
    experiment: Experiment, analysis: Analysis, run_dir: Path, checkpoint: Which = "final"
) -> list[Path]:
    """Write the page, its plots and its numbers into the run's folder; returns the files.

    `checkpoint` says whose parameters were analysed.
    """
    folder = run_dir / "analysis"
    folder.mkdir(exist_ok=True)
    run = {"run_dir": str(run_dir.absolute()), "checkpoint": checkpoint}
    plots = {
        "layers.png": "What adaptation changes, layer by layer",
        "paths.png": "The way from θ to the adapted parameters of a task",
    }
    _plot_layers(analysis, folder / "layers.png")
    _plot_paths(analysis, folder / "paths.png")
    numbers = {**run, **analysis.to_json(), "finding": finding(analysis)}
    write_atomically(folder / "analysis.json", json_text.write(_plain(numbers)))
    images = "".join(
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{_base64(folder / name)}">'
        for name, alt in plots.items()
    )
    write_atomically(
        folder / "index.html",
        _PAGE.format(
            name=html.escape(experiment.name),
            run=html.escape(run["run_dir"]),
            parameters=_PARAMETERS[checkpoint],
            finding=html.escape(finding(analysis)),
            protocol=html.escape(protocol_text(analysis)),
            layers=_html_table(layer_rows(analysis)),
            abilities=_html_table(ability_rows(analysis)),
            difference=html.escape(_difference(analysis)),
            centroid=_CENTROID if CENTROID in analysis.abilities else "",
            images=images,
        ),
    )
    return [folder / name for name in ("index.html", "analysis.json", *plots)]


def protocol_text(analysis: Analysis) -> str:
    """The protocol of the numbers: tasks, split, steps, changed settings."""
    changes = "".join(f", {key} {value}" for key, value in analysis.changes.items())
    steps = counted(analysis.steps, "adaptation step")
    return f"{analysis.num_tasks} {analysis.split} tasks, {steps}{changes}; ± CI95 over tasks"


def layer_rows(analysis: Analysis) -> list[list[str]]:
    """The rows of the table of layers, header first."""
    rows = [["layer", "CKA", "CCA", "parameters moved"]]
    for number, layer in enumerate(analysis.layers, 1):
        moved = layer.moved.text(percent=True)
        rows.append(
            [
                layer_label(number, layer.kind, layer is analysis.layers[-1]),
                layer.cka.text(),
                layer.cca.text(),
                moved if layer.moved.mean == 0 else f"{moved} %",
            ]
        )
    return rows


def ability_rows(analysis: Analysis) -> list[list[str]]:
    """The rows of the table of what is left when less adapts, header first."""
    percent = analysis.metric == "accuracy"
    unit = " in %" if percent else ""
    rows = [["what adapts", f"{analysis.metric}{unit}", f"{_difference(analysis)}{unit}"]]
    for name, value in analysis.abilities.items():
        lost = analysis.lost.get(name)
        rows.append([name, value.text(percent), "" if lost is None else lost.text(percent)])
    return rows


def _difference(analysis: Analysis) -> str:
    """What the last column of that table is: `lost` is positive where a value is worse."""
    side = "below" if analysis.higher_is_better else "above"
    return f"{analysis.metric} {side} '{ALL}'"


def _plot_layers(analysis: Analysis, path: Path) -> None:
    """Draw, for every layer, the likeness of representations above the change of parameters."""
    figure, grid = new_panels(7.6, 5.6, rows=2, sharex=True)
    likeness, moved = grid[:, 0]
    _bars(
        likeness,
        {
            "CKA": [layer.cka for layer in analysis.layers],
            "CCA": [layer.cca for layer in analysis.layers],
        },
    )
    likeness.set_ylim(0, 1.05)
    likeness.set_ylabel("likeness, before / after")
    likeness.set_title("What adaptation changes")
    legend(likeness)
    _moves(moved, [layer.moved for layer in analysis.layers])
    names = [row[0].replace(" (", "\n(") for row in layer_rows(analysis)[1:]]
    moved.set_xticks(range(len(names)), names)
    moved.set_xlabel("layer")
    save(figure, path, f"Moved: |θ' - θ| / |θ| of a layer's parameters. {protocol_text(analysis)}")


def _bars(axes: Axes, series: dict[str, list[Estimate]]) -> None:
    """Draw bars side by side for every layer; a series without any known value is left out."""
    known = {
        name: estimates
        for name, estimates in series.items()
        if any(math.isfinite(e.mean) for e in estimates)
    }
    width = 0.6 / max(1, len(known))
    for number, (name, estimates) in enumerate(known.items()):
        axes.bar(
            np.arange(len(estimates)) + width * (number - (len(known) - 1) / 2),
            [e.mean for e in estimates],
            width,
            yerr=_half_widths(estimates),
            color=COLORS[number],
            label=name,
            error_kw={"elinewidth": 1},
        )


def _moves(axes: Axes, moved: list[Estimate]) -> None:
    """Draw |θ' - θ| / |θ| in percent; words mark layers that do not move (0 has no logarithm)."""
    still = [layer for layer, estimate in enumerate(moved) if estimate.mean == 0]
    moving = [layer for layer in range(len(moved)) if layer not in still]
    axes.errorbar(
        moving,
        [100 * moved[layer].mean for layer in moving],
        yerr=[100 * half for half in _half_widths([moved[layer] for layer in moving])],
        linestyle="none",
        marker="o",
        color=COLORS[2],
        elinewidth=1,
    )
    for layer in still:
        at = axes.get_xaxis_transform()
        axes.text(layer, 0.04, "does not adapt", transform=at, color=GREY, ha="center")
    label_metric(axes, "moved in %", is_logarithmic("moved", [[e.mean for e in moved]]))
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)


def _half_widths(estimates: list[Estimate]) -> list[float]:
    """Half the widths of the confidence intervals; 0 where unknown."""
    return [0.0 if e.ci95 is None else e.ci95 for e in estimates]


def _plot_paths(analysis: Analysis, path: Path) -> None:
    """Draw the query loss on the line through θ and θ'_i: the mean, and some single tasks."""
    figure, axes = new_figure(7.6, 4.2)
    losses = np.array(analysis.paths)
    for task, line in enumerate(losses[:_PATHS_SHOWN]):
        label = f"{min(_PATHS_SHOWN, len(losses))} of the tasks" if task == 0 else None
        axes.plot(FRACTIONS, line, color=COLORS[5], linewidth=1, alpha=0.8, label=label)
    mean, half = mean_and_ci95(losses.T)
    name = f"mean of {len(losses)} tasks"
    axes.plot(FRACTIONS, mean, color=COLORS[0], linewidth=2.5, label=name)
    axes.fill_between(
        FRACTIONS, mean - half, mean + half, color=COLORS[0], alpha=0.2, linewidth=0, label="CI95"
    )
    axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
    axes.axvline(1, color=GREY, linestyle=":", linewidth=1)
    ticks = [0, 0.5, 1, 1.5]
    axes.set_xticks(ticks, ["0\nθ", "0.5", "1\nadapted", "1.5"])
    axes.set_ylabel("query loss")
    finish(
        figure,
        axes,
        path,
        "way from θ to the task's adapted parameters",
        "The loss along the way of adaptation",
        f"Straight lines in parameter space. {protocol_text(analysis)}",
    )


def _html_table(rows: list[list[str]]) -> str:
    """A table in HTML; the first row is its header."""
    header, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for row, tag in zip(rows, ["th"] + ["td"] * (len(rows) - 1), strict=True)
    )
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _plain(value: object) -> object:
    """Plain values for JSON: an estimate becomes an object."""
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _base64(path: Path) -> str:
    """A file's content, for a data: URL."""
    return base64.b64encode(path.read_bytes()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>{name}: feature reuse or rapid learning?</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; display: block; margin: 1rem 0 }}
.small {{ color: #666; font-size: .85rem }}
</style></head><body>
<h1>{name}: feature reuse or rapid learning?</h1>
<p class="small">Run {run}, {parameters}</p>
<p>{finding}</p>
<p class="small">{protocol}</p>
<h2>What adaptation changes</h2>{layers}
<p class="small">CKA, CCA: similarity of a layer's output before and after adaptation, 1 if it is
the same (Kornblith et al. 2019; Raghu et al. 2017); – where there are too few examples for the
layer's width. A layer is its weights and all that follows up to the next layer's.</p>
<h2>What is left when less adapts</h2>{abilities}
<p class="small">{difference}: how much is lost against adaptation as trained. The difference is
taken task by task, so that its interval is narrower than those of the two values.{centroid}</p>
<h2>Plots</h2>{images}
</body></html>
"""
