"""Adds the gradients of all chunks in a fixed order: one meta-gradient, the mean over the tasks.

Addition of floating-point numbers is not associative. The sums are therefore added in the order of
the chunks, whichever arrived first, and the result is the same for any number of workers. They are
divided once, by the number of tasks: a mean of the chunks' means would weight tasks of small chunks
more than others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.worker.jobs import ChunkResult


class Aggregate(NamedTuple):
    """The meta-gradient of a meta-batch, on the CPU."""

    gradient: Tensor
    """Mean over the tasks, [D]."""
    metrics: dict[str, float]
    """Means over the tasks."""
    bad_tasks: tuple[int, ...]
    """Positions in the meta-batch of tasks whose loss, or whose chunk's gradient, is not finite."""


def aggregate(results: Sequence[ChunkResult]) -> Aggregate:
    """Average the results of one iteration; `results` must be in the order of the chunks.

    Raises ValueError for an empty list, and for a result without a gradient.
    """
    total: np.ndarray | None = None
    for result in results:
        if result.gradient is None:
            raise ValueError("only results of gradient jobs can be aggregated")
        # The first is copied, not added to: memory from the object store is read-only.
        total = result.gradient.copy() if total is None else np.add(total, result.gradient, total)
    if total is None:
        raise ValueError("a meta-batch has at least one chunk")
    num_tasks = sum(result.num_tasks for result in results)
    metrics = {
        name: float(sum(float(result.metrics[name].sum()) for result in results) / num_tasks)
        for name in results[0].metrics
    }
    gradient = torch.from_numpy(total) / num_tasks
    bad: tuple[int, ...] = ()
    if not all_finite(gradient):
        # Every chunk is finite and their sum overflows: no task can be singled out.
        bad = _bad_tasks(results) or tuple(range(num_tasks))
    return Aggregate(gradient, metrics, bad)


def all_finite(gradient: Tensor) -> bool:
    """Whether no element is infinite or not a number."""
    # A finite sum has finite terms; the costlier test is needed only where the sum is not finite
    # (finite terms may overflow).
    return math.isfinite(gradient.sum()) or bool(torch.isfinite(gradient).all())


def _bad_tasks(results: Sequence[ChunkResult]) -> tuple[int, ...]:
    """Positions in the meta-batch of the tasks that made a chunk's gradient not finite."""
    bad: list[int] = []
    first = 0
    for result in results:
        assert result.gradient is not None
        if not np.isfinite(result.gradient).all():
            names = {"query_loss", "support_loss"} & set(result.metrics)
            losses = np.stack([result.metrics[name] for name in names])
            culprits = np.flatnonzero(~np.isfinite(losses).all(0))
            # Where all losses are finite, any task of the chunk may be the cause.
            suspects = culprits if len(culprits) else np.arange(result.num_tasks)
            bad += [first + int(position) for position in suspects]
        first += result.num_tasks
    return tuple(bad)
