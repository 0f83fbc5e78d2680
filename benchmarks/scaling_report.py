"""The table and the plot of scaling.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.evaluation.plot_style import new_panels


class Row(NamedTuple):
    """One measurement."""

    size: str
    parameters: int
    wait: float
    """Simulated computation, seconds per chunk."""
    actors: int
    tasks: int
    """Per iteration."""
    seconds: float
    """Median duration of an iteration."""
    efficiency: float
    """wait / seconds."""
    driver: float
    """The driver's processor time over wall time: 1 is one core."""
    driver_seconds: float
    """The driver's processor time per iteration."""
    ray_seconds: float
    """The processor time of all nodes per iteration: actors and Ray's own processes."""
    machine: float
    """Share of the machine's cores that were busy, with anything."""
    megabytes: float
    """Carried by the loopback device, per iteration."""
    transfers: float
    """Seconds from the end of the wait to the arrival of the last answer."""
    updating: float
    """Seconds of aggregation and update."""


HEAD = (
    "| parameters | wait | actors | iteration | tasks/s | efficiency | beyond the wait | "
    "aggregation, update | driver busy | processor time: driver, nodes | machine busy | "
    "MB per iteration |\n" + "|---" * 12 + "|"
)


def markdown_row(row: Row) -> str:
    """A line of the table."""
    return (
        f"| {row.parameters:,} | {1e3 * row.wait:.0f} ms | {row.actors} | "
        f"{1e3 * row.seconds:.1f} ms | {row.tasks / row.seconds:,.0f} | "
        f"{100 * row.efficiency:.0f} % | {1e3 * row.transfers:.1f} ms | "
        f"{1e3 * row.updating:.1f} ms | {100 * row.driver:.0f} % | "
        f"{1e3 * row.driver_seconds:.0f} ms, {1e3 * row.ray_seconds:.0f} ms | "
        f"{100 * row.machine:.0f} % | {row.megabytes:.1f} |"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw efficiency over actors, one panel per model."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    figure, (panels,) = new_panels(4.6 * len(sizes), 3.8, 1, len(sizes), sharey=True)
    for axes, size in zip(panels, sizes, strict=True):
        waits = sorted({row.wait for row in rows})
        for wait, color in zip(waits, ("#D55E00", "#009E73", "#0072B2"), strict=False):
            line = [row for row in rows if (row.size, row.wait) == (size, wait)]
            axes.plot(
                [row.actors for row in line],
                [100 * row.efficiency for row in line],
                marker="o",
                color=color,
                label=f"{1e3 * wait:.0f} ms per chunk",
            )
            parameters = line[0].parameters
        axes.set_xscale("log", base=2)
        axes.set_xticks([row.actors for row in line], [str(row.actors) for row in line])
        axes.set_ylim(0, 105)
        axes.axhline(75, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_xlabel("actors")
        axes.set_title(f"{parameters / 1e6:.2g} million parameters", fontsize="medium")
    panels[0].set_ylabel("efficiency (%)")
    panels[-1].legend(frameon=False, loc="upper right")
    figure.savefig(path)
