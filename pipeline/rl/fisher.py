"""What the outer optimisers of reinforcement learning (TRPO, ProMP) ask about a chunk of tasks.

With π_i the policy adapted to task i on its stored trajectories, as a function of θ:

    surrogate(θ)  mean_i of the query loss (`policy_loss`)
    KL(θ)         mean_i KL(π_i,old || π_i) over the query's observations; 0 at the θ that collected
    fisher·v      the Hessian of KL(θ) at that θ, times a direction v

The gradient of KL(θ) vanishes at the θ that collected. So, with J = dθ'_i/dθ, the Hessian is
Jᵀ F_i J, where F_i is the Hessian with respect to the adapted parameters alone (the Fisher matrix
of the adapted policy). The product carries v forward through adaptation (J v), multiplies by F_i,
and goes back as a meta-gradient does (Jᵀ).

Shapes: B tasks. Everything is summed over the tasks of a chunk or given per task, [B]; the driver
divides by the number of tasks. θ, trajectories and `alpha` must be on one device.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from pipeline.maml.adaptation import Adaptation, StepInputs
from pipeline.maml.adaptation_curve import Adapted, query_metrics
from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_loop import Stages, inner_step
from pipeline.maml.inner_optimizers import Point
from pipeline.maml.meta_gradient import Cotangent, ForwardPass, backpropagate, forward_pass
from pipeline.maml.meta_loss import num_tasks
from pipeline.rl.policy_loss import Experience, PolicyObjective
from pipeline.rl.rollouts import CollectedBatch


@torch.no_grad()
def fisher_product(
    objective: PolicyObjective,
    adaptation: Adaptation,
    meta: Params,
    batch: CollectedBatch,
    alpha: Tensor,
    direction: Params,
    *,
    second_order: bool,
) -> Params:
    """Sum over the tasks of Jᵀ F_i J · direction; shapes of the meta-parameters.

    First order (`second_order` is false) treats inner gradients as constants in J. The policy's
    operations need forward derivatives in torch: RuntimeError otherwise.
    """
    stages = Stages.of(objective, adaptation, order="second" if second_order else "first")
    passed = forward_pass(stages, adaptation, meta, batch, alpha)
    adapted = passed.adapted(adaptation.steps)
    slow, slow_tangent = adapted.slow, adaptation.slow_after(direction, adaptation.steps)
    tangent = _tangent(passed, objective, batch, direction, second_order)

    def product(fast: Params, tangent: Params, query: Experience) -> tuple[Params, Params]:
        def predict(fast: Params, slow: Params) -> Tensor:
            return objective.predict({**slow, **fast}, query.trajectories.observations)

        def kl(prediction: Tensor) -> Tensor:
            return objective.kl(prediction, query)

        # The KL's gradient vanishes here, so its Hessian is the one with respect to predictions,
        # between two Jacobians of the predictions.
        prediction, moved = jvp(predict, (fast, slow), (tangent, slow_tangent))[:2]
        weighed = jvp(grad(kl), (prediction,), (moved,))[1]
        back: tuple[Params, Params] = vjp(predict, fast, slow)[1](weighed)
        return back

    # Without steps, θ and the direction are views that all tasks share; forward derivatives are
    # written in place and need memory of their own.
    fast, moving = (
        {name: value.contiguous() for name, value in params.items()}
        for params in (adapted.fast, tangent)
    )
    return backpropagate(stages, passed, Cotangent(*vmap(product)(fast, moving, batch.query)))


def _tangent(
    passed: ForwardPass,
    objective: PolicyObjective,
    batch: CollectedBatch,
    direction: Params,
    second_order: bool,
) -> Params:
    """J · direction for every task, [B, ...]."""
    adaptation, alpha = passed.adaptation, passed.alpha
    tangent = adaptation.start_point(direction, num_tasks(batch))
    for s, step in enumerate(passed.steps):
        one_task = partial(
            _step_tangent,
            objective,
            adaptation,
            adaptation.at(passed.meta, alpha, s),
            # A fixed rate does not depend on the meta-parameters: its derivative is zero.
            adaptation.at(direction, torch.zeros_like(alpha), s),
            second_order,
        )
        # Before the first step the point is θ itself, not yet one copy per task.
        tangent = vmap(one_task, in_dims=(0 if s else None, 0, 0, 0))(
            passed.before(s), step.gradient, tangent, batch.support.at_step(s)
        )
    return tangent.fast


def _step_tangent(
    objective: PolicyObjective,
    adaptation: Adaptation,
    inputs: StepInputs,
    inputs_tangent: StepInputs,
    second_order: bool,
    before: Point,
    inner_gradient: Params,
    tangent: Point,
    support: Experience,
) -> Point:
    """The derivative of one step of one task: of the point after it, in the direction of `tangent`
    (of the point before it) and `inputs_tangent`."""

    def step(point: Point, slow: Params, rates: Params) -> Point:
        if not second_order:
            return adaptation.optimizer.update(point, inner_gradient, rates, inputs.t)
        at = StepInputs(slow, rates, inputs.t)
        return inner_step(objective.loss, adaptation.optimizer, point, at, support).point

    slow_and_rates, tangents = inputs[:2], inputs_tangent[:2]
    moved: Point = jvp(step, (before, *slow_and_rates), (tangent, *tangents))[1]
    return moved


class CandidateMetrics(NamedTuple):
    """What a candidate for the next θ is worth, per task, [B]."""

    surrogate: Tensor
    """The query loss."""
    kl: Tensor
    """KL of the policies that collected the query and the policies that the candidate adapts to,
    mean over valid time steps, in nats."""


@torch.no_grad()
def evaluate_candidate(
    objective: PolicyObjective,
    adaptation: Adaptation,
    candidate: Params,
    batch: CollectedBatch,
    alpha: Tensor,
) -> CandidateMetrics:
    """Adapt a candidate on the stored trajectories, and evaluate it on the query trajectories."""
    stages = Stages.of(objective, adaptation)
    passed = forward_pass(stages, adaptation, candidate, batch, alpha)
    loss, metrics = query_metrics(objective, passed.adapted(adaptation.steps), batch.query)
    return CandidateMetrics(loss, metrics["kl"])


class ProximalGradient(NamedTuple):
    """The gradient for a step of ProMP, and metrics of the θ at which it was taken."""

    gradient: Params
    """Sum over the tasks of the gradient of query loss + weight · inner KL."""
    candidate: CandidateMetrics
    inner_kl: Tensor
    """KL of the policies that collected the support and the policies that adaptation passes
    through now, mean over its steps, [B], in nats."""


@torch.no_grad()
def proximal_gradient(
    objective: PolicyObjective,
    adaptation: Adaptation,
    meta: Params,
    batch: CollectedBatch,
    alpha: Tensor,
    *,
    second_order: bool,
    inner_kl_weight: float,
) -> ProximalGradient:
    """The gradient of the ProMP objective (Rothfuss et al. 2019, eq. 12).

    The objective is the clipped query loss of `objective` plus `inner_kl_weight` times the KL
    between the policies that collected the support and those that adaptation passes through.
    """
    stages = Stages.of(objective, adaptation, order="second" if second_order else "first")
    passed = forward_pass(stages, adaptation, meta, batch, alpha)
    steps = adaptation.steps
    weight = inner_kl_weight / max(steps, 1)
    inner: list[Tensor] = []

    def inner_kl(fast: Params, slow: Params, support: Experience) -> Tensor:
        return objective.kl_at({**slow, **fast}, support)

    inner_gradient = vmap(grad_and_value(inner_kl, argnums=(0, 1)), in_dims=(0, None, 0))

    def of_inner_kl(after: int, adapted: Adapted) -> Cotangent:
        bars, kl = inner_gradient(*adapted, batch.support.at_step(after))
        inner.append(kl)
        return Cotangent(*bars).scaled(weight)

    bars, (loss, metrics) = stages.query(*passed.adapted(steps), batch.query)
    gradient = backpropagate(stages, passed, Cotangent(*bars), of_inner_kl)
    candidate = CandidateMetrics(loss, metrics["kl"])
    mean = torch.stack(inner).mean(0) if inner else torch.zeros_like(candidate.kl)
    return ProximalGradient(gradient, candidate, mean)
