"""The sum over all chunks -> one meta-gradient, and who is to blame where it is not finite.

The sum comes from the workers, added in a fixed order (`worker.tree`). Dividing it once by the
number of tasks, rather than averaging averages, is what makes it right for chunks of unequal size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.cluster.rounds import Total
from pipeline.worker.jobs import Cut


class Aggregate(NamedTuple):
    """The meta-gradient of a meta-batch, on the CPU."""

    gradient: Tensor
    """Mean over the tasks, [D]."""
    metrics: dict[str, float]
    """Means over the tasks."""
    bad_tasks: tuple[int, ...]
    """Positions in the meta-batch of tasks whose loss, or whose chunk's gradient, is not finite."""


def aggregate(total: Total, cut: Cut) -> Aggregate:
    """The mean of a meta-batch that was cut so. Raises ValueError for a sum without a gradient."""
    if total.gradient is None:
        raise ValueError("only gradients can be aggregated")
    gradient = torch.from_numpy(total.gradient / total.num_tasks)
    metrics = {name: float(values.mean(dtype=np.float64)) for name, values in total.metrics.items()}
    bad: tuple[int, ...] = ()
    if not all_finite(gradient):
        # Finite chunks whose sum overflows: all are to blame.
        bad = _bad_tasks(total, cut) or tuple(range(total.num_tasks))
    return Aggregate(gradient, metrics, bad)


def all_finite(gradient: Tensor) -> bool:
    """Whether no element is infinite or not a number."""
    # A finite sum has finite terms; the costlier test is needed only where the sum is not finite
    # (finite terms may overflow).
    return math.isfinite(gradient.sum()) or bool(torch.isfinite(gradient).all())


def _bad_tasks(total: Total, cut: Cut) -> tuple[int, ...]:
    """Positions of the tasks that are to blame for chunks that are not finite."""
    names = {"query_loss", "support_loss"} & set(total.metrics)
    losses_are_finite = np.isfinite(np.stack([total.metrics[name] for name in names])).all(0)
    bad: list[int] = []
    for chunk, finite in enumerate(total.finite):
        if not finite:
            members = cut.members(chunk)
            culprits = members[~losses_are_finite[members]]
            # Finite losses with a gradient that is not: the chunk is all that is known.
            bad += [int(task) for task in (culprits if len(culprits) else members)]
    return tuple(bad)
