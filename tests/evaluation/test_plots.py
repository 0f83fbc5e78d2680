"""Figures: drawn to files of a sensible size, and telling what they were given to tell."""

import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.evaluation.curve_plots import (
    plot_adaptation_curve,
    plot_adaptation_panels,
    plot_sinusoid_fits,
    plot_training,
)
from pipeline.evaluation.health_plots import plot_health
from pipeline.maml.models import mlp
from pipeline.maml.representations import parameter_labels

STEPS = list(range(11))


def curve(first: float, last: float) -> dict[str, list[float]]:
    mean = [last + (first - last) * 0.4**step for step in STEPS]
    return {"steps": STEPS, "mean": mean, "ci95": [0.1 * abs(m) for m in mean]}


def assert_image(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
        assert 500 <= width <= 1400
        assert 400 <= height <= 1400
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank


def texts_inside(figure: Figure) -> bool:
    """Whether all of the labels, legends and captions lie on the canvas and apart."""
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for axes in figure.axes:
        boxes += [axes.xaxis.label.get_window_extent(renderer)] if axes.get_xlabel() else []
        boxes += [axes.title.get_window_extent(renderer)] if axes.get_title() else []
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    boxes += [legend.get_window_extent(renderer) for legend in legends]
    apart = all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    within = all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    covers = any(
        legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))
        for legend in legends
        for axes in figure.axes
    )
    return apart and within and not covers


def share_of_width(figure: Figure) -> float:
    """The part of the figure's width that its axes take, from the leftmost to the rightmost."""
    boxes = [axes.get_window_extent() for axes in figure.axes]
    return (max(b.x1 for b in boxes) - min(b.x0 for b in boxes)) / figure.bbox.width


def test_adaptation_curve_of_losses(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "new folder" / "curve.png"
    zero = {"steps": STEPS, "mean": [0.0] * 11, "ci95": [0.0] * 11}
    curves = {"K=5": curve(3, 0.4), "K=10": curve(3, 0.01), "oracle": zero}
    caption = "test split, 600 tasks, 10 queries, normalisation none, seed 0; " * 4
    plot_adaptation_curve(curves, path, metric="MSE", title="Sinusoid", caption=caption)
    assert_image(path)
    [axes] = drawn[0].axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "MSE (log scale)"
    assert axes.get_xlabel() == "gradient steps"
    assert axes.get_title() == "Sinusoid"
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["K=5", "K=10", "oracle (= 0)"]
    assert list(axes.lines[0].get_ydata()) == curves["K=5"]["mean"]
    assert share_of_width(drawn[0]) > 0.85
    assert "".join(t.get_text() for t in drawn[0].texts).replace("\n", " ") == caption.strip()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert texts_inside(drawn[0])


def test_adaptation_curve_of_accuracy(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "curve.png"
    curves = {"5-way 1-shot": curve(0.2, 0.8), "random init": curve(0.2, 0.25)}
    plot_adaptation_curve(curves, path, metric="accuracy")
    [axes] = drawn[0].axes
    assert axes.get_ylabel() == "accuracy (%)"
    assert axes.get_yscale() == "linear"
    assert axes.yaxis.get_major_formatter()(0.5).startswith("50")
    assert "95%" in drawn[0].texts[0].get_text()
    assert texts_inside(drawn[0])
    assert_image(path)


@pytest.mark.parametrize("number", [2, 3, 6, 8])
def test_a_panel_for_each_kind_of_tasks(tmp_path: Path, drawn: list[Figure], number: int) -> None:
    panels = {
        f"K={k}": {"one": curve(3, 1 / k), "other": curve(3, 2)} for k in range(1, number + 1)
    }
    for curves in panels.values():  # few steps, between which there are no others
        for each in curves.values():
            each |= {name: values[:3] for name, values in each.items()}
    plot_adaptation_panels(panels, tmp_path / "a.png", metric="MSE", title="Two runs", caption="c")
    assert_image(tmp_path / "a.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == list(panels)[:6]
    assert [len(axes.lines) for axes in drawn[0].axes] == [2] * min(number, 6)
    assert len({axes.get_ylim() for axes in drawn[0].axes}) == 1
    assert all(float(tick).is_integer() for axes in drawn[0].axes for tick in axes.get_xticks())
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "other"]
    assert ("the first 6 of 8" in drawn[0].texts[-1].get_text().replace("\n", " ")) == (number == 8)
    assert texts_inside(drawn[0])


def test_losses_of_one_size_are_drawn_linearly(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_adaptation_curve({"a": curve(3, 1)}, tmp_path / "a.png", metric="loss")
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_a_diverged_series_does_not_spoil_the_figure(tmp_path: Path, drawn: list[Figure]) -> None:
    bad = {"steps": STEPS, "mean": [1.0, math.inf, *[math.nan] * 9], "ci95": [math.nan] * 11}
    plot_adaptation_curve({"bad": bad, "good": curve(3, 1)}, tmp_path / "a.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert -1 < low < high < 10
    assert_image(tmp_path / "a.png")


@pytest.mark.parametrize("num_tasks", [1, 3, 4])
def test_sinusoid_fits(tmp_path: Path, drawn: list[Figure], num_tasks: int) -> None:
    x = np.linspace(-5, 5, 101)
    task = {
        "x_grid": x,
        "truth": 3 * np.sin(x),
        "support_x": x[::10],
        "support_y": 3 * np.sin(x[::10]),
        "title": "y = 3.0 sin(x)",
        "fits": {10: 2.9 * np.sin(x), 0: 0 * x, 1: 2 * np.sin(x)},
    }
    plot_sinusoid_fits(tmp_path / "fits.png", [task] * num_tasks, caption="K=10")
    assert_image(tmp_path / "fits.png")
    assert sum(axes.axison for axes in drawn[0].axes) == num_tasks
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [
        "truth", "before adaptation", "after 1 step", "after 10 steps", "support points"
    ]  # fmt: skip
    assert texts_inside(drawn[0])


@pytest.mark.parametrize("length", [1, 30, 2000])
def test_training(tmp_path: Path, drawn: list[Figure], length: int) -> None:
    noise = np.random.default_rng(0).random(length)
    history = {
        "iteration": range(length),
        "support": list(3 + noise),
        "query": list(2 + noise),
    }
    plot_training(history, tmp_path / "training.png", caption="means over 10 iterations")
    assert_image(tmp_path / "training.png")
    [axes] = drawn[0].axes
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["support", "query"]
    assert axes.get_xlabel() == "iteration"
    assert share_of_width(drawn[0]) > 0.85
    assert texts_inside(drawn[0])


def diagnoses(steps: int, curvature: float) -> list[dict[str, float]]:
    """Of a run whose meta-gradient doubles on its way back through every inner step."""
    return [
        {
            "iteration": 10.0 * i,
            **{f"diagnostics/gradient_norm_step{s}": 2.0 ** (steps - s) for s in range(steps + 1)},
            **{f"diagnostics/inner_loss_step{s}": 1.0 / (s + 1) for s in range(steps)},
            **{f"diagnostics/curvature_step{s}": curvature * (1 + s) for s in range(steps)},
            "diagnostics/hurt_share": 0.1,
        }
        for i in range(5)
    ]


@pytest.mark.parametrize("steps", [5, 10])
def test_health_by_step_and_with_a_bound_far_away(
    tmp_path: Path, drawn: list[Figure], steps: int
) -> None:
    written = plot_health(diagnoses(steps, curvature=3.0), tmp_path, 1e-3, {})
    names = [path.stem.removeprefix("health_") for path in written]
    assert names == ["gradient_norm", "inner_loss", "curvature", "hurt"]
    norm, bar = drawn[0].axes
    assert len(norm.lines) == steps + 1
    assert [int(tick) for tick in bar.get_yticks()] == list(range(steps + 1))
    assert norm.get_yscale() == "log"
    shown = [norm.yaxis.get_major_formatter()(tick, 0) for tick in norm.get_yticks()]
    assert {"1", "10"} <= set(shown)
    curvature = drawn[2].axes[0]
    assert curvature.get_yscale() == "log"  # lines and the bound of 2,000, both can be read
    assert "2 / inner rate = 2,000" in drawn[2].texts[0].get_text().replace("\n", " ")
    assert all(texts_inside(figure) for figure in drawn)


def test_numbers_stand_where_diagnoses_were_made(tmp_path: Path, drawn: list[Figure]) -> None:
    """The last one always; another only where there is room for both."""
    records = diagnoses(2, curvature=3.0)
    for record, iteration in zip(records, (1000, 2000, 3000, 4000, 4100), strict=True):
        record["iteration"] = iteration
    plot_health(records, tmp_path, None, {})
    axes = drawn[0].axes[0]
    assert list(axes.get_xticks()) == [1000, 2000, 3000, 4100]
    assert axes.xaxis.get_major_formatter()(1000, 0) == "1,000"
    assert axes.lines[0].get_marker() == "o"


def test_one_diagnosis_of_one_step_can_be_seen(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_health(diagnoses(1, curvature=3.0)[1:2], tmp_path, None, {})
    ticks = [tick for figure in drawn for tick in figure.axes[0].get_xticks()]
    assert {0.0, 10.0} <= set(ticks)
    assert all(float(tick).is_integer() for tick in ticks)
    markers = [line.get_marker() for figure in drawn for line in figure.axes[0].lines]
    assert set(markers) == {"o"}


def test_shares_of_tasks_are_whole_percents(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_health(diagnoses(1, curvature=3.0), tmp_path, None, {})
    axes = drawn[-1].axes[0]
    assert all(round(100 * float(tick), 6).is_integer() for tick in axes.get_yticks())
    assert axes.yaxis.get_major_formatter()(0.05, 0) == "5"
    assert axes.get_ylabel() == "share of tasks (%)"


@pytest.mark.parametrize("by_step", ["", "_step0"])
def test_rates_are_called_as_layers_are(tmp_path: Path, drawn: list[Figure], by_step: str) -> None:
    model = mlp((1,), 1, hidden=(3,), normalisation="batch")
    rates = {f"diagnostics/inner_lr/{n}{by_step}": 0.1 for n, _ in model.named_parameters()}
    records = [record | rates for record in diagnoses(1, curvature=3.0)]
    plot_health(records, tmp_path, None, parameter_labels(model))
    assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == [
        "1 (Linear) weight",
        "1 (Linear) bias",
        "1 (Linear) BatchNorm bias",
        "2 (Linear, head) weight",
        "2 (Linear, head) bias",
    ]
    assert texts_inside(drawn[-1])


def test_a_bound_far_from_curvatures_of_both_signs_does_not_flatten_them(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    plot_health(diagnoses(2, curvature=-1.0), tmp_path, 1e-3, {})
    axes = drawn[2].axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[1] < 10


def test_another_thread_may_draw_and_pyplot_stays_unused(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    args = ({"a": curve(3, 1)}, tmp_path / "a.png")
    thread = threading.Thread(target=plot_adaptation_curve, args=args)
    thread.start()
    thread.join()
    assert_image(tmp_path / "a.png")
    assert ("matplotlib.pyplot" in sys.modules) == before
