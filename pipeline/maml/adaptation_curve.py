"""Adaptation to tasks, step by step, and how the query set fares after each step.

The meta-gradient uses `inner_steps`; evaluation, analysis, the collection of trajectories and
predictors use `adapt` and `adaptation_curve`.

Shapes: B tasks; every tensor of adapted parameters is [B, ...].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_loop import InnerStep, Stages
from pipeline.maml.inner_optimizers import Point
from pipeline.maml.meta_loss import Batch, Support, TaskLoss, num_tasks


class Adapted(NamedTuple):
    """The parameters with which the query set is evaluated after some steps of adaptation."""

    fast: Params
    """The adapted parameters, a copy for every task, [B, ...]."""
    slow: Params
    """The parameters that are not adapted, the same for all tasks."""


@torch.no_grad()
def inner_steps(
    stages: Stages,
    adaptation: Adaptation,
    meta: Params,
    support: Support,
    alpha: Tensor,
    start: Point,
    steps: int,
    *,
    shared: bool,
) -> Iterator[InnerStep]:
    """Take `steps` steps of adaptation to B tasks, from `start` on (eq. 2).

    `shared` says that `start` is θ itself, without the dimension of tasks; the first step then runs
    as one large batch. `support.at_step(s)` is called only after step s - 1 was handed out, so that
    the caller may collect the support of a step with the parameters before it.
    """
    point = start
    for s in range(steps):
        step = stages.step(
            point,
            adaptation.at(meta, alpha, s),
            support.at_step(s, adaptation.batch_size),
            shared and s == 0,
        )
        yield step
        point = step.point


def adapt(
    objective: TaskLoss,
    adaptation: Adaptation,
    meta: Params,
    support: Support,
    alpha: Tensor,
    steps: int,
    num_tasks: int,
) -> Iterator[Adapted]:
    """The parameters of B tasks after 0, 1, ..., `steps` steps of adaptation.

    Steps beyond those of meta-training use the settings of the last trained one. `alpha`, `meta`
    and `support` must be on one device.
    """
    start = adaptation.start_point(meta, num_tasks)
    yield Adapted(start.fast, adaptation.slow_after(meta, 0))
    stages = Stages.of(objective, adaptation)
    taken = inner_steps(stages, adaptation, meta, support, alpha, start, steps, shared=False)
    for done, step in enumerate(taken, 1):
        yield Adapted(step.point.fast, adaptation.slow_after(meta, done))


def query_metrics(
    objective: TaskLoss, adapted: Adapted, query: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The query loss and every metric of B tasks, each [B]."""

    def of_task(fast: Params, examples: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return objective.loss_and_metrics({**adapted.slow, **fast}, examples)

    found: tuple[Tensor, dict[str, Tensor]] = vmap(of_task)(adapted.fast, query)
    return found


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
    after = adapt(objective, adaptation, meta, batch.support, alpha, steps[-1], count)
    for step, adapted in enumerate(after):
        if step in steps:
            loss, metrics = query_metrics(objective, adapted, batch.query)
            rows.append({"loss": loss, **metrics})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
