"""How a meta-gradient comes about, step by step: is training healthy (section 7.2)?

For every task, with g_s = ∇L_S(θ_s) and H_s = ∇²L_S(θ_s) at step s of adaptation:

    inner_loss       L_S(θ_s)
    curvature        g_s·H_s g_s / |g_s|²: a step of rate α along g_s overshoots where α times it
                     is above 1, and ends higher than it began where it is above 2
    gradient_norm    |v_s|, the gradient of the meta-loss with respect to θ_s (see `meta_gradient`),
                     from s = S back to 0: grows on the way back if it explodes, shrinks if it
                     vanishes
    hurt             1 where the query loss after adaptation is higher than before, else 0

and, for all tasks together, the meta-gradient of second and of first order. Everything is computed
a second time, without compilation, on tasks of its own: training is not touched.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.inner_loop import Order, Stages, hessian_vector_product
from pipeline.maml.meta_gradient import (
    GradientEstimator,
    Knobs,
    Visit,
    differentiates,
    walk_back,
    walk_forward,
)
from pipeline.maml.meta_loss import Batch, TaskLoss
from pipeline.maml.parameters import Params


class Diagnosis(NamedTuple):
    """What there is to say of a chunk of B tasks and S inner steps."""

    second: Params | None
    """Sum of the second-order meta-gradients over the tasks; None: the estimator has no order."""
    first: Params | None
    """The same of first order."""
    metrics: dict[str, Tensor]
    """inner_loss and curvature [S, B], gradient_norm [S + 1, B], hurt [1, B]."""


@torch.no_grad()
def diagnose(
    objective: TaskLoss,
    adaptation: Adaptation,
    meta: Params,
    batch: Batch,
    knobs: Knobs,
    *,
    order: Order,
    estimator: GradientEstimator = "gradient",
) -> Diagnosis:
    """Diagnose a chunk; `order` is the one that training uses, which gradient_norm is about."""
    forward = differentiates(objective, adaptation, meta, batch)
    by_order: dict[Order, Stages] = {
        each: Stages.of(objective, adaptation, order=each, forward=forward)
        for each in ("second", "first")
    }
    visits = walk_forward(by_order[order], adaptation, meta, batch.support, knobs.alpha)
    metrics = {
        "inner_loss": torch.stack([visit.step.loss for visit in visits]),
        "curvature": torch.stack(
            [
                _curvature(objective, adaptation, meta, visit, batch, s, forward)
                for s, visit in enumerate(visits)
            ]
        ),
        "hurt": _hurt(objective, adaptation, meta, batch, visits),
    }
    if estimator == "reptile":
        return Diagnosis(None, None, metrics)
    gradients: dict[Order, Params] = {}
    for each, stages in by_order.items():
        norms: list[Tensor] = []
        note = lambda v, norms=norms: norms.append(_joined(v).norm(dim=1))  # noqa: E731
        walked = walk_back(visits, stages, adaptation, meta, batch, knobs, note)
        gradients[each] = walked.gradient
        if each == order:
            metrics["gradient_norm"] = torch.stack(norms[::-1])
    return Diagnosis(gradients["second"], gradients["first"], metrics)


def _curvature(
    objective: TaskLoss,
    adaptation: Adaptation,
    meta: Params,
    visit: Visit,
    batch: Batch,
    step: int,
    forward: bool,
) -> Tensor:
    """Rayleigh quotient of the Hessian of L_S along the inner gradient, [B]."""
    slow, g = adaptation.slow(meta, step), visit.step.gradient
    product = partial(hessian_vector_product, objective.loss, forward=forward)
    axes = (0 if step else None, None, 0, 0)  # the first point is θ, shared by all tasks
    hessian_g = vmap(product, in_dims=axes)(
        visit.before.fast, slow, batch.support.at_step(step, adaptation.batch_size), g
    )
    flat_g, flat_hessian_g = _joined(g), _joined({name: hessian_g[name] for name in g})
    square = (flat_g * flat_g).sum(1)
    # A task that is solved already has no direction.
    return torch.where(square > 0, (flat_g * flat_hessian_g).sum(1) / square, 0.0)


def _hurt(
    objective: TaskLoss,
    adaptation: Adaptation,
    meta: Params,
    batch: Batch,
    visits: list[Visit],
) -> Tensor:
    def loss(fast: Params, slow: Params, query: Any) -> Tensor:
        return objective.loss_and_metrics({**slow, **fast}, query)[0]

    start, end = visits[0].before.fast, visits[-1].step.point.fast
    first, last = (adaptation.slow(meta, step) for step in (0, adaptation.steps - 1))
    before = vmap(loss, in_dims=(None, None, 0))(start, first, batch.query)
    after = vmap(loss, in_dims=(0, None, 0))(end, last, batch.query)
    return (~(after <= before)).to(after.dtype)[None]  # NaN hurts


def _joined(per_task: Params) -> Tensor:
    """All parameters of every task as a vector, [B, D]."""
    return torch.cat([value.flatten(1) for value in per_task.values()], dim=1)
