"""Draws trajectories before and after adaptation: positions on a plane, or one number per time
step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from pipeline.evaluation.plot_style import (
    COLORS,
    GREY,
    after_steps,
    finish_panels,
    new_panels,
    save,
)

Floats = npt.NDArray[np.floating]
_FRAMES_PER_SECOND, _MOVING_FRAMES, _FILM_DPI = 8, 25, 72
_STILL_FRAMES = 6  # an animation rests at its end, for so many frames


class Paths(NamedTuple):
    """The trajectories of a task on a plane, by the number of gradient steps taken before."""

    goal: Floats
    """The position of the goal, [2]."""
    by_step: dict[int, list[Floats]]
    """For each trajectory its positions, [time steps + 1, 2], start and end included."""


class Courses(NamedTuple):
    """The trajectories of a task without a plane, by the number of gradient steps taken before."""

    task: str
    """The task in a few words."""
    by_step: dict[int, list[Floats]]
    """For each trajectory one number per time step, [time steps]."""


def plot_paths(path: Path, tasks: Sequence[Paths], title: str, caption: str = "") -> None:
    """Draw trajectories and goal: a row per task, a column per number of gradient steps."""
    steps = sorted(tasks[0].by_step)
    size = 2.4 * len(steps) + 0.6, 2.3 * len(tasks) + 0.9
    figure, grid = new_panels(*size, len(tasks), len(steps), sharex=True, sharey=True)
    for task, colour, row in zip(tasks, cycle(COLORS), grid, strict=False):
        for step, axes in zip(steps, row, strict=True):
            for xy in task.by_step[step]:
                axes.plot(*xy.T, color=colour, alpha=0.5, linewidth=1)
                axes.plot(*xy[-1], color=colour, marker="o", markersize=3)
            _goal(axes, task)
    for step, axes in zip(steps, grid[0], strict=True):
        axes.set_title(after_steps(step), fontsize="medium")
    figure.suptitle(title)
    save(figure, path, caption)


def plot_courses(
    path: Path, tasks: Sequence[Courses], over_time: str, title: str, caption: str = ""
) -> None:
    """Draw a panel per task: its trajectories over time, coloured by the gradient steps before.

    `over_time` names what the numbers of a course are.
    """
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    size = 3.1 * columns + 0.9, 2.5 * rows + 0.9
    figure, grid = new_panels(*size, rows, columns, sharex=True, sharey=True)
    for axes, task in zip(grid.flat, tasks, strict=False):
        for colour, step in zip(cycle(COLORS), sorted(task.by_step), strict=False):
            for course in task.by_step[step]:
                times = np.arange(1, len(course) + 1)
                (line,) = axes.plot(times, course, color=colour, alpha=0.6, linewidth=1)
                axes.plot(times[-1], course[-1], color=colour, marker="o", markersize=3)
            line.set_label(after_steps(step))
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.set_title(task.task, fontsize="medium")
    labels = {"x_label": "time step", "y_label": over_time}
    finish_panels(figure, grid, len(tasks), path, **labels, title=title, caption=caption)


def animate_paths(path: Path, task: Paths, title: str) -> None:
    """Write a GIF of one task: the trajectories after each number of steps, side by side."""
    steps = sorted(task.by_step)
    figure, grid = new_panels(2.9 * len(steps), 3.3, 1, len(steps), sharex=True, sharey=True)
    figure.suptitle(title)
    moving = []
    for axes, colour, step in zip(grid[0], cycle(COLORS), steps, strict=False):
        axes.set_title(after_steps(step), fontsize="medium")
        paths = task.by_step[step]
        everywhere = np.concatenate([*paths, task.goal[None]])
        axes.update_datalim(everywhere)
        axes.autoscale_view()
        moving += [
            (xy, *axes.plot([], [], color=colour, alpha=0.5), *axes.plot([], [], "o", color=colour))
            for xy in paths
        ]
        _goal(axes, task)
    longest = max(len(xy) for xy, _, _ in moving)

    def draw(frame: int) -> list[Artist]:
        for xy, trail, head in moving:
            now = xy[: min(frame, len(xy) - 1) + 1]
            trail.set_data(*now.T)
            head.set_data(*now[-1:].T)
        return [artist for _, *artists in moving for artist in artists]

    shown = [*range(0, longest, -(-longest // _MOVING_FRAMES)), *[longest] * _STILL_FRAMES]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keeps the layout: computing it per frame is slowest
    animation = FuncAnimation(figure, draw, frames=shown)
    animation.save(path, writer=PillowWriter(fps=_FRAMES_PER_SECOND), dpi=_FILM_DPI)


def _goal(axes: Axes, task: Paths) -> None:
    """Draw the goal as a star, and lines through the origin."""
    axes.plot(*task.goal, linestyle="none", marker="*", markersize=13, color="black", label="goal")
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.axvline(0, color=GREY, linewidth=0.5)
    axes.set_aspect("equal", adjustable="box")
