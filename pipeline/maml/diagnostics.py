"""Numbers about every inner step of a meta-gradient: is training healthy (section 7.2)?

For every task, with g_s = ∇L_S(θ_s) and H_s = ∇²L_S(θ_s) at step s of adaptation:

    inner_loss       L_S(θ_s)
    curvature        g_s·H_s g_s / |g_s|². To second order, a step of rate α along g_s overshoots
                     the minimum on its line where α·curvature > 1, and raises the loss where it
                     is > 2
    gradient_norm    |v_s|, the norm of the gradient of the meta-loss with respect to θ_s (see
                     `meta_gradient`), for s = 0 .. S. An exploding gradient grows from s = S back
                     to s = 0, a vanishing one shrinks
    hurt             1 where the query loss after adaptation is higher than before, else 0

Besides, the meta-gradients of second and of first order, summed over all tasks. All of this is
computed eagerly, on tasks that training does not use; nothing of the training state changes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.adaptation_curve import query_metrics
from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_loop import Order, Stages, hessian_vector_product
from pipeline.maml.meta_gradient import (
    Direction,
    ForwardPass,
    Knobs,
    forward_pass,
    inner_loss_has_forward_derivatives,
    meta_gradient_after,
)
from pipeline.maml.meta_loss import Batch, TaskLoss


class Diagnosis(NamedTuple):
    """The numbers of a chunk of B tasks and S inner steps."""

    second: Params | None
    """Sum of the second-order meta-gradients over the tasks; None with Reptile's direction,
    which has no order."""
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
    direction: Direction = "gradient",
) -> Diagnosis:
    """Diagnose a chunk. `order` is the one that training uses; gradient_norm is of that order.

    All tensors must be on one device.
    """
    forward = inner_loss_has_forward_derivatives(objective, adaptation, meta, batch)
    by_order: dict[Order, Stages] = {
        each: Stages.of(objective, adaptation, order=each, forward=forward)
        for each in ("second", "first")
    }
    passed = forward_pass(by_order[order], adaptation, meta, batch, knobs.alpha)
    metrics = {
        "inner_loss": torch.stack([step.loss for step in passed.steps]),
        "curvature": torch.stack(
            [_curvature(objective, passed, s, forward) for s in range(adaptation.steps)]
        ),
        "hurt": _hurt(objective, passed),
    }
    if direction == "reptile":
        return Diagnosis(None, None, metrics)
    second, second_norms = _gradient_and_norms(by_order["second"], passed, knobs)
    first, first_norms = _gradient_and_norms(by_order["first"], passed, knobs)
    metrics["gradient_norm"] = second_norms if order == "second" else first_norms
    return Diagnosis(second, first, metrics)


def _gradient_and_norms(stages: Stages, passed: ForwardPass, knobs: Knobs) -> tuple[Params, Tensor]:
    """The meta-gradient, summed over tasks, and |v_0|, ..., |v_S| of every task, [S + 1, B]."""
    norms: list[Tensor] = []
    found = meta_gradient_after(
        stages, passed, knobs, observe=lambda v: norms.append(_joined(v).norm(dim=1))
    )
    return found.gradient, torch.stack(norms[::-1])


def _curvature(objective: TaskLoss, passed: ForwardPass, step: int, forward: bool) -> Tensor:
    """Rayleigh quotient of the Hessian of L_S along the inner gradient, [B]."""
    adaptation, g = passed.adaptation, passed.steps[step].gradient
    support = passed.batch.support.at_step(step, adaptation.batch_size)
    slow = adaptation.slow(passed.meta, step)
    product = partial(hessian_vector_product, objective.loss, forward=forward)
    axes = (0 if step else None, None, 0, 0)  # all tasks share the first point, θ
    hessian_g = vmap(product, in_dims=axes)(passed.before(step).fast, slow, support, g)
    flat_g, flat_hessian_g = _joined(g), _joined({name: hessian_g[name] for name in g})
    square = (flat_g * flat_g).sum(1)
    # Where the gradient is zero there is no direction, and the quotient would be 0/0.
    return torch.where(square > 0, (flat_g * flat_hessian_g).sum(1) / square, 0.0)


def _hurt(objective: TaskLoss, passed: ForwardPass) -> Tensor:
    """1 where adaptation raised the query loss, [1, B]; a loss that is not a number counts so."""

    before, after = (
        query_metrics(objective, passed.adapted(steps), passed.batch.query)[0]
        for steps in (0, passed.adaptation.steps)
    )
    return (~(after <= before)).to(after.dtype)[None]


def _joined(per_task: Params) -> Tensor:
    """All parameters of every task as one vector, [B, D]."""
    return torch.cat([value.flatten(1) for value in per_task.values()], dim=1)
