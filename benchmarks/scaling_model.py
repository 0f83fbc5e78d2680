"""What an iteration costs per worker, per node and per parameter, and what that means at scale.

The costs are fitted to the rows of scaling.py (non-negative least squares of relative errors). What
is said of clusters that nobody has run follows from them by arithmetic: it is no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scaling_report import Row
from scipy.optimize import nnls

BYTES = 4  # of a parameter
LINK = 25e9 / 8  # bytes per second through a node's network, each way
MILLION = 1e6


class Costs(NamedTuple):
    """Seconds of processor time per iteration."""

    fixed: float
    worker: float
    """Per worker: its question, its answer."""
    node: float
    """Per node: a call, and what it brings."""
    vector: float
    """Per node and million parameters: sent to it and received from it."""
    parameters: float
    """Per million parameters: aggregation and update."""

    def seconds(self, workers: int, nodes: int, parameters: float) -> float:
        """The processor time of an iteration."""
        millions = parameters / MILLION
        return (
            self.fixed
            + self.worker * workers
            + self.node * nodes
            + self.vector * nodes * millions
            + self.parameters * millions
        )


def fitted(rows: Sequence[Row], per_node: int) -> tuple[Costs, float]:
    """The driver's costs, and the median relative error of what they predict for the rows."""
    told = np.array([row.driver_seconds for row in rows])
    factors = np.array(
        [
            [
                1.0,
                row.actors,
                nodes := math.ceil(row.actors / per_node),
                nodes * row.parameters / MILLION,
                row.parameters / MILLION,
            ]
            for row in rows
        ]
    )
    found, _ = nnls(factors / told[:, None], np.ones(len(rows)))
    error = float(np.median(np.abs(factors @ found / told - 1)))
    return Costs(*map(float, found)), error


class Cluster(NamedTuple):
    """Workers on nodes, and what they learn."""

    workers: int
    nodes: int
    parameters: float


CLUSTERS = (
    Cluster(64, 8, 112e3),
    Cluster(64, 8, 4.9e6),
    Cluster(1000, 125, 112e3),
    Cluster(1000, 125, 4.9e6),
    Cluster(1000, 125, 100e6),
)


def page(costs: Costs, error: float) -> str:
    """The costs and what they mean, as Markdown."""
    lines = [
        f"The driver's processor time per iteration, fitted: {1e3 * costs.fixed:.1f} ms, "
        f"{1e3 * costs.worker:.2f} ms per worker, {1e3 * costs.node:.1f} ms per node, "
        f"{1e3 * costs.vector:.2f} ms per node and million parameters, "
        f"{1e3 * costs.parameters:.1f} ms per million parameters (median error of a row "
        f"{100 * error:.0f} %).",
        "",
        "| workers, nodes | parameters | driver's processor | its network, 25 Gbit/s | "
        "its memory for vectors | two levels of relays: network | sums and optimiser in shards: "
        "network of a node |",
        "|" + "---|" * 7,
    ]
    for workers, nodes, parameters in CLUSTERS:
        size = BYTES * parameters
        branches = math.ceil(math.sqrt(nodes))
        lines.append(
            f"| {workers:,}, {nodes} | {parameters / MILLION:,.3g} M | "
            f"{_time(costs.seconds(workers, nodes, parameters))} | "
            # θ must have arrived before sums can come back.
            f"{_time(2 * nodes * size / LINK)} | {nodes * size / 1e9:.2g} GB | "
            f"{_time(4 * branches * size / LINK)} | {_time(2 * size / LINK)} |"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    """Two digits, in seconds or milliseconds."""
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{float(f'{value:.2g}'):g} {unit}"
