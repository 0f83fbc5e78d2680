"""Learning a task step by step: the parameters after 0, 1, ... steps, and how the query fares.

For everything but the meta-gradient: evaluation, analysis, collecting trajectories, adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.inner_loop import Stages
from pipeline.maml.meta_gradient import num_tasks
from pipeline.maml.meta_loss import Batch, Support, TaskLoss
from pipeline.maml.parameters import Params


class Adapted(NamedTuple):
    """The parameters after some steps of adaptation, as the query set is seen with them."""

    fast: Params
    """A copy for every task, [B, ...]."""
    slow: Params


def adapt(
    objective: TaskLoss,
    adaptation: Adaptation,
    meta: Params,
    support: Support,
    alpha: Tensor,
    steps: int,
    num_tasks: int,
) -> Iterator[Adapted]:
    """Adaptation to B tasks as in meta-training: the parameters after 0, 1, ... `steps` steps.

    Beyond the trained steps the settings of the last one are repeated. What `support` has for a
    step is asked for after the parameters before it were given: it may come of them.
    """
    stages = Stages.of(objective, adaptation)
    fast = {n: p.expand(num_tasks, *p.shape) for n, p in adaptation.start(meta).items()}
    point = adaptation.rule.start(fast)
    yield Adapted(fast, adaptation.slow(meta, 0))
    for s in range(steps):
        slow = adaptation.slow(meta, s)
        rates = adaptation.rates_at(meta, alpha, s)
        with torch.no_grad():
            point = stages.step(
                point,
                slow,
                rates,
                alpha.new_tensor(s + 1.0),
                support.at_step(s, adaptation.batch_size),
                False,
            ).point
        yield Adapted(point.fast, slow)


@torch.no_grad()
def adaptation_curve(
    objective: TaskLoss,
    adaptation: Adaptation,
    meta: Params,
    batch: Batch,
    alpha: Tensor,
    *,
    steps: tuple[int, ...],
) -> dict[str, Tensor]:
    """Query loss and metrics of every task after each of `steps` steps, [len(steps), B]."""
    rows: list[dict[str, Tensor]] = []
    count = num_tasks(batch)
    adapted = adapt(objective, adaptation, meta, batch.support, alpha, steps[-1], count)
    for step, (fast, slow) in enumerate(adapted):
        if step in steps:
            judge = vmap(lambda f, q, slow=slow: objective.loss_and_metrics({**slow, **f}, q))
            loss, metrics = judge(fast, batch.query)
            rows.append({"loss": loss, **metrics})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
