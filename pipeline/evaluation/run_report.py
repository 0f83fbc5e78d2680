"""Writes the plots of a run (RUN_DIR/plots/*.png), videos, and its summary for MLflow's pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.func import vmap

from pipeline.cluster.group import on_driver
from pipeline.config.experiment import Experiment
from pipeline.config.wording import counted
from pipeline.evaluation.comparison import PairedComparison
from pipeline.evaluation.curve_plots import (
    plot_adaptation_curve,
    plot_adaptation_panels,
    plot_sinusoid_fits,
    plot_training,
)
from pipeline.evaluation.health import PREFIX
from pipeline.evaluation.health_plots import plot_health
from pipeline.evaluation.meta_test import TRAINED, Curve, as_series, cell, metric_label
from pipeline.evaluation.plot_style import after_steps
from pipeline.evaluation.policy_plots import Courses, Paths, animate_paths, plot_courses, plot_paths
from pipeline.maml.adaptation_curve import adapt
from pipeline.maml.flat_vector import Params, flat_vector
from pipeline.maml.meta_loss import Objective
from pipeline.maml.representations import parameter_labels
from pipeline.runs.folder import History
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.learner import adaptation_of, model_of
from pipeline.worker.task_source import EVALUATION_SEED
from tasks.base import TaskDistribution
from tasks.control.mdp import MDPs, Trajectories, mdps
from tasks.sinusoid import Sinusoid

_NUM_FITS = 4  # sinusoid tasks in a figure
_NUM_TASKS, _MOST_TASKS = 3, 5  # tasks in a figure of trajectories: by default, and at most
_SHOWN_TRAJECTORIES = 5  # of each of them


def write_plots(
    experiment: Experiment, run_dir: Path, theta: Params, curves: Sequence[Curve]
) -> list[Path]:
    """Draw all plots of a run; `curves` are its meta-test, or empty. Return the files."""
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    task = experiment.build_task()
    wanted = dict.fromkeys([task.primary_metric, "loss"])
    metrics = [metric for metric in wanted if curves and metric in curves[0].mean]
    written = []
    for metric in metrics:
        path = folder / f"adaptation_{metric}.png"
        label = task.loss_name if metric == "loss" else metric
        _plot_curves(
            curves,
            metric,
            path,
            metric_label=label,
            title=f"{experiment.name}: learning new tasks",
            caption=f"{_caption(curves)}; bands: CI95 over tasks",
        )
        written.append(path)
    history = read_history(experiment, run_dir)
    if history.values["iteration"]:
        path = folder / "training.png"
        label, _ = metric_label(task, history.metric)
        plot_training(history.values, path, metric=label, title=f"{experiment.name}: training")
        written.append(path)
    inner = experiment.inner
    plain = inner.rates == "fixed" and inner.optimizer == "sgd"
    if diagnoses := read_diagnoses(run_dir):
        labels = parameter_labels(model_of(experiment))
        written += plot_health(diagnoses, folder, inner.lr if plain else None, labels)
    for kind, draw in FIGURES.items():
        if isinstance(task, kind):
            written.append(draw(task, experiment, theta, folder))
    return written


def _trajectories(task: MDPs, experiment: Experiment, theta: Params, folder: Path) -> Path:
    """Draw trajectories of the policy before and after adaptation."""
    collected = _collect(experiment, theta, "test", _NUM_TASKS, experiment.report_steps)
    return _draw_trajectories(experiment, task, collected, "test", folder)


def _fits(task: Sinusoid, experiment: Experiment, theta: Params, folder: Path) -> Path:
    """Draw the fits before and after adaptation."""
    path = folder / "fits.png"
    steps = (0, 1, experiment.report_steps[-1])
    plot_sinusoid_fits(path, sinusoid_fits(experiment, task, theta, steps))
    return path


FIGURES: dict[type[TaskDistribution], Callable[[Any, Experiment, Params, Path], Path]] = {
    MDPs: _trajectories,
    Sinusoid: _fits,
}
"""The figures that only some tasks have: (task, experiment, θ, folder) -> the file."""


def plot_comparison(task: TaskDistribution, found: Sequence[PairedComparison], path: Path) -> None:
    """Draw the adaptation curves of compared runs: a panel for each variant of the tasks."""
    curves = [curve for each in found for curve in each.curves]
    metric = found[0].metric
    new = "" if curves[0].protocol["split"] == "train" else "new "
    _plot_curves(
        curves,
        metric,
        path,
        metric_label=metric_label(task, metric)[0],
        title=f"{len(found[0].curves)} runs on the same {new}tasks",
        caption=f"{_caption(curves)}; bands: CI95 over tasks, not of the differences",
    )


def _plot_curves(
    curves: Sequence[Curve],
    metric: str,
    path: Path,
    *,
    metric_label: str,
    title: str,
    caption: str,
) -> None:
    """Draw curves in one panel, or where there are variants of the tasks, in a panel for each."""
    panels = {
        variant: {
            curve.who: series
            for curve in curves
            if curve.variant == variant
            for series in as_series([curve], metric).values()
        }
        for variant in dict.fromkeys(curve.variant for curve in curves)
    }
    if len(panels) > 1:
        plot_adaptation_panels(panels, path, metric=metric_label, title=title, caption=caption)
    else:
        ((variant, series),) = panels.items()
        title += f", {variant}" if variant else ""
        plot_adaptation_curve(series, path, metric=metric_label, title=title, caption=caption)


def summary(
    experiment: Experiment, num_parameters: int, updates: str, curves: Sequence[Curve] = ()
) -> str:
    """The run in Markdown, the meta-test first: MLflow's page folds longer texts. `updates` says
    what one iteration is, in words."""
    what = (
        f"**{experiment.name}**, {experiment.algorithm_name}: {experiment.task.kind} tasks, "
        f"{experiment.model.kind} with {num_parameters:,} parameters, inner steps: "
        f"{experiment.inner.steps}, {experiment.outer.iterations:,} {updates}, seed "
        f"{experiment.seed}"
    )
    results = _results(experiment, curves) if curves else ""
    return "\n\n".join(filter(None, (results, what, experiment.description)))


def _results(experiment: Experiment, curves: Sequence[Curve]) -> str:
    """The meta-test as a table in Markdown."""
    task = experiment.build_task()
    metric = task.primary_metric
    label, percent = metric_label(task, metric)
    steps = curves[0].steps
    lines = [
        f"| {label}{' in %' if percent else ''} after | "
        + " | ".join(counted(step, "step") for step in steps)
        + " |",
        "|---|" + "---:|" * len(steps),
    ]
    for curve in curves:
        cells = [cell(curve, metric, position, percent) for position in range(len(steps))]
        title = f"**{curve.title}**" if curve.who == TRAINED else curve.title
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"± CI95 over tasks; {_caption(curves)}"])


class TrainingHistory(NamedTuple):
    """A metric by iteration of the training."""

    metric: str
    """'return' or 'loss'."""
    values: dict[str, list[float]]
    """"iteration" and the series by name, all of the same length, as `plot_training` takes them."""


def read_history(experiment: Experiment, run_dir: Path) -> TrainingHistory:
    """The training returns of metrics.jsonl, or its losses where tasks are supervised, by
    iteration."""
    series = _training_series(experiment)
    records = History(run_dir).records()
    found = [record for record in records if set(series.values()) <= set(record)]
    return TrainingHistory(
        "loss" if experiment.reinforcement is None else "return",
        {
            "iteration": [record["iteration"] for record in found],
            **{name: [record[key] for record in found] for name, key in series.items()},
        },
    )


def _training_series(experiment: Experiment) -> dict[str, str]:
    """The metrics of an update whose course shows how training got on, by their names in a
    legend."""
    steps = experiment.inner.steps
    if experiment.pretraining is not None:
        return {"pretraining": "train/loss"}
    if experiment.reinforcement is None:
        return {
            "support, before adaptation": "train/support_loss",
            "query, after adaptation": "train/query_loss",
        }
    if steps == 0:
        return {"one policy for all tasks": "train/return_step0"}
    return {
        after_steps(steps): f"train/return_step{steps}",
        after_steps(0): "train/return_step0",
    }


def read_diagnoses(run_dir: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl that hold a diagnosis."""
    return [record for record in History(run_dir).records() if f"{PREFIX}hurt_share" in record]


@torch.no_grad()
def sinusoid_fits(
    experiment: Experiment, task: Sinusoid, theta: Params, steps: tuple[int, ...]
) -> list[dict[str, Any]]:
    """The fits of a few test tasks before and after adaptation, for `plot_sinusoid_fits`."""
    indices = np.arange(_NUM_FITS)
    dtype = getattr(torch, experiment.compute.dtype)
    support = task.sample(EVALUATION_SEED, "test", indices).to("cpu", dtype).support
    grid = torch.linspace(*task.x_range, 200, dtype=dtype)
    model = model_of(experiment)
    objective = Objective(model.to(dtype), task)
    alpha = torch.tensor(experiment.inner.lr, dtype=dtype)
    adapted = adapt(
        objective, adaptation_of(experiment, model), theta, support, alpha, steps[-1], _NUM_FITS
    )
    fits: dict[int, torch.Tensor] = {}
    for step, (fast, slow) in enumerate(adapted):
        if step in steps:
            predict = vmap(lambda f, slow=slow: objective.predict({**slow, **f}, grid[:, None]))
            fits[step] = predict(fast)[..., 0]
    truth = task.parameters(EVALUATION_SEED, "test", indices)
    return [
        {
            "title": f"test task {i}",
            "x_grid": grid.numpy(),
            "truth": amplitude * np.sin(grid.numpy() - phase),
            "support_x": support.x[i, :, 0].numpy(),
            "support_y": support.y[i, :, 0].numpy(),
            "fits": {step: fit[i].numpy() for step, fit in fits.items()},
        }
        for i, (amplitude, phase) in enumerate(truth)
    ]


def check_video(experiment: Experiment) -> MDPs:
    """The tasks that `write_video` shows. Raises ValueError for supervised ones."""
    if experiment.reinforcement is None:
        raise ValueError(
            f"--video: shows the trajectories of a policy, and {experiment.task.kind} tasks are "
            "supervised; leave it out"
        )
    return mdps(experiment.build_task(), "--video")


def write_video(
    experiment: Experiment,
    theta: Params,
    folder: Path,
    *,
    split: str = "test",
    num_tasks: int | None = None,
    steps: tuple[int, ...] | None = None,
) -> list[Path]:
    """Draw trajectories in the first tasks of a split, five at most; return the files.

    All tasks are in one figure; each task on a plane has an animation as well. Raises ValueError
    for supervised tasks.
    """
    task = check_video(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    count = min(num_tasks or _NUM_TASKS, _MOST_TASKS)
    collected = _collect(experiment, theta, split, count, steps or experiment.report_steps)
    written = [_draw_trajectories(experiment, task, collected, split, folder)]
    for number, paths in enumerate(_paths(task, collected)):
        written.append(folder / f"task-{number}.gif")
        animate_paths(written[-1], paths, f"{experiment.name}, {split} task {number}")
    return written


_ByStep = dict[int, Trajectories]
"""A few trajectories of a task, by the number of gradient steps taken before."""


def _collect(
    experiment: Experiment, theta: Params, split: str, num_tasks: int, steps: tuple[int, ...]
) -> list[_ByStep]:
    """Collect a few trajectories of each of the first tasks of a split."""
    computer = ChunkComputer(on_driver(experiment), compile=False)
    collected = computer.collect(flat_vector(theta), split, num_tasks, steps[-1])

    def few(past: Trajectories, i: int) -> Trajectories:
        first = Trajectories._make(part[i, :_SHOWN_TRAJECTORIES] for part in past)
        return first._replace(task=past.task[i])

    return [
        {step: few(collected.steps[step].trajectories, i) for step in steps}
        for i in range(num_tasks)
    ]


def _draw_trajectories(
    experiment: Experiment, task: MDPs, collected: Sequence[_ByStep], split: str, folder: Path
) -> Path:
    """Draw the trajectories' positions or, for tasks without a plane, their course over time."""
    path = folder / "trajectories.png"
    title = f"{experiment.name}: trajectories in {'tasks' if split == 'train' else 'new tasks'}"
    shown = f"{_SHOWN_TRAJECTORIES} trajectories each, to their ends"
    if paths := _paths(task, collected):
        plot_paths(path, paths, title, f"stars: goals of {split} tasks; {shown}")
    else:
        plot_courses(
            path, _courses(task, collected), task.over_time, title, f"{split} tasks; {shown}"
        )
    return path


def _paths(task: MDPs, collected: Sequence[_ByStep]) -> list[Paths]:
    """The trajectories as positions; empty for tasks without a plane."""
    found = []
    for by_step in collected:
        paths = {}
        for step, past in by_step.items():
            positions = task.positions(past)
            if positions is None:
                return []
            paths[step] = _cut(positions, past.lengths + 1)
        found.append(Paths(past.task[:2].cpu().numpy(), paths))
    return found


def _courses(task: MDPs, collected: Sequence[_ByStep]) -> list[Courses]:
    """The trajectories as one number per time step."""
    return [
        Courses(
            task.describe(next(iter(by_step.values())).task.tolist()),
            {step: _cut(task.course(past), past.lengths) for step, past in by_step.items()},
        )
        for by_step in collected
    ]


def _cut(values: torch.Tensor, lengths: torch.Tensor) -> list[npt.NDArray[Any]]:
    """Each trajectory's values up to its end; the horizon may be later."""
    pairs = zip(values.cpu().numpy(), lengths.long().tolist(), strict=True)
    return [row[:length] for row, length in pairs]


def _caption(curves: Sequence[Curve]) -> str:
    """The entries of the protocol that all curves have in common, in words."""
    shown = ("tasks", "split", "ways", "shots", "queries", "rotations", "inner_lr")
    first, *others = (curve.protocol for curve in curves)
    facts = [
        f"{key.replace('_', ' ')} {first[key]}"
        for key in shown
        if key in first and all(other.get(key) == first[key] for other in others)
    ]
    return ", ".join(facts)
