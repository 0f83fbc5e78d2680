"""What the outer optimisers of reinforcement learning ask about collected trajectories.

With π_i the policy adapted to task i on its trajectories, as a function of θ:

    surrogate(θ)  mean_i of the query loss (`policy_loss`), and
    KL(θ)         mean_i KL(π_i,old || π_i) over the query's observations: 0 at the θ that collected
    fisher·v      the Hessian of KL(θ) at that θ, times a direction. Its gradient vanishes there, so
                  with J = dθ'_i/dθ the Hessian is Jᵀ F_i J, F_i that of the adapted policy alone: v
                  forward through adaptation, one product, and back as meta-gradients go

Everything is summed over the tasks of a chunk, for the driver to divide once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.inner_loop import Stages
from pipeline.maml.meta_gradient import (
    Incoming,
    Visit,
    carry_back,
    num_tasks,
    reached,
    walk_forward,
)
from pipeline.maml.parameters import Params
from pipeline.maml.update_rules import Point
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
    """Sum over the tasks of Jᵀ F_i J · direction; shapes of the meta-parameters."""
    stages = Stages.of(objective, adaptation, order="second" if second_order else "first")
    visits = walk_forward(stages, adaptation, meta, batch.support, alpha)
    last = adaptation.steps - 1
    at = reached(adaptation, meta, visits, last, num_tasks(batch))
    slow, slow_tangent = (adaptation.slow(params, max(last, 0)) for params in (meta, direction))
    tangent = _tangent(visits, objective, adaptation, meta, batch, alpha, direction, second_order)

    def product(fast: Params, tangent: Params, query: Experience) -> tuple[Params, Params]:
        def predict(fast: Params, slow: Params) -> Tensor:
            return objective.predict({**slow, **fast}, query.trajectories.observations)

        def kl(prediction: Tensor) -> Tensor:
            return objective.kl(prediction, query)

        # Where the KL's gradient vanishes, its Hessian is that in predictions between Jacobians.
        prediction, moved = jvp(predict, (fast, slow), (tangent, slow_tangent))[:2]
        weighed = jvp(grad(kl), (prediction,), (moved,))[1]
        back: tuple[Params, Params] = vjp(predict, fast, slow)[1](weighed)
        return back

    # Forward derivatives need memory of their own, which θ spread over tasks has not.
    fast, moving = (
        {name: value.contiguous() for name, value in params.items()}
        for params in (at.fast, tangent)
    )
    came = Incoming(*vmap(product)(fast, moving, batch.query))
    return carry_back(
        stages,
        adaptation,
        meta,
        batch,
        alpha,
        visits,
        lambda s, _: came if s == last else None,
    )


def _tangent(
    visits: list[Visit],
    objective: PolicyObjective,
    adaptation: Adaptation,
    meta: Params,
    batch: CollectedBatch,
    alpha: Tensor,
    direction: Params,
    second_order: bool,
) -> Params:
    """J · direction for every task, [B, ...]."""
    tangent = reached(adaptation, direction, [], -1, num_tasks(batch))
    rule = adaptation.rule
    for s, visit in enumerate(visits):
        slow, t = adaptation.slow(meta, s), alpha.new_tensor(s + 1.0)
        rates = adaptation.rates_at(meta, alpha, s)
        slow_tangent = adaptation.slow(direction, s)
        if adaptation.learns_rates:
            rates_tangent = adaptation.rates_at(direction, alpha, s)
        else:
            rates_tangent = {name: torch.zeros_like(rate) for name, rate in rates.items()}

        def advance(
            before: Point,
            constant: Params,
            v: Point,
            support: Experience,
            slow: Params = slow,
            rates: Params = rates,
            t: Tensor = t,
            slow_tangent: Params = slow_tangent,
            rates_tangent: Params = rates_tangent,
        ) -> Point:
            def step(point: Point, slow: Params, rates: Params) -> Point:
                if second_order:
                    loss = lambda fast: objective.loss({**slow, **fast}, support)  # noqa: E731
                    gradient = grad(loss)(point.fast)
                else:
                    gradient = constant
                return rule.update(point, gradient, rates, t)

            moved: Point = jvp(step, (before, slow, rates), (v, slow_tangent, rates_tangent))[1]
            return moved

        # Before the first step the point is θ itself, not yet one copy per task.
        tangent = vmap(advance, in_dims=(0 if s else None, 0, 0, 0))(
            visit.before, visit.step.gradient, tangent, batch.support.at_step(s)
        )
    return tangent.fast


class CandidateMetrics(NamedTuple):
    """What a candidate for the next θ is worth, per task, [B]."""

    surrogate: Tensor
    """The query loss."""
    kl: Tensor
    """Between the policies that collected the query and those that θ adapts to now."""


@torch.no_grad()
def evaluate_candidate(
    objective: PolicyObjective,
    adaptation: Adaptation,
    candidate: Params,
    batch: CollectedBatch,
    alpha: Tensor,
) -> CandidateMetrics:
    """Adapt a candidate on the stored trajectories, and look at the query."""
    stages = Stages.of(objective, adaptation)
    visits = walk_forward(stages, adaptation, candidate, batch.support, alpha)
    last = adaptation.steps - 1
    fast = reached(adaptation, candidate, visits, last, num_tasks(batch)).fast
    slow = adaptation.slow(candidate, max(last, 0))
    look = vmap(lambda fast, query: objective.loss_and_metrics({**slow, **fast}, query))
    loss, found = look(fast, batch.query)
    return CandidateMetrics(loss, found["kl"])


class ProximalGradient(NamedTuple):
    """A step of ProMP."""

    gradient: Params
    """Sum over the tasks of the gradient of query loss + weight · inner KL."""
    candidate: CandidateMetrics
    inner_kl: Tensor
    """Between the policies that collected the support and those that adaptation passes through
    now, mean over its steps, [B]."""


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
    """Rothfuss et al. 2019, eq. 12: clipped query loss (the objective's), and a penalty on moving
    from the policies that collected the support."""
    stages = Stages.of(objective, adaptation, order="second" if second_order else "first")
    visits = walk_forward(stages, adaptation, meta, batch.support, alpha)
    steps = adaptation.steps
    weight = inner_kl_weight / max(steps, 1)
    inner: list[Tensor] = []
    outer: list[CandidateMetrics] = []

    def inner_kl(fast: Params, slow: Params, support: Experience) -> Tensor:
        return objective.kl_at({**slow, **fast}, support)

    inner_gradient = vmap(grad_and_value(inner_kl, argnums=(0, 1)), in_dims=(0, None, 0))

    def incoming(s: int, at: Point) -> Incoming:
        if s == steps - 1:
            slow = adaptation.slow(meta, max(s, 0))
            (fast_bar, slow_bar), (loss, found) = stages.query(at.fast, slow, batch.query)
            outer.append(CandidateMetrics(loss, found["kl"]))
            return Incoming(fast_bar, slow_bar)
        slow, support = adaptation.slow(meta, s + 1), batch.support.at_step(s + 1)
        (fast_bar, slow_bar), kl = inner_gradient(at.fast, slow, support)
        inner.append(kl)
        return Incoming(
            {name: weight * bar for name, bar in fast_bar.items()},
            {name: weight * bar for name, bar in slow_bar.items()},
        )

    gradient = carry_back(stages, adaptation, meta, batch, alpha, visits, incoming)
    (candidate,) = outer
    mean = torch.stack(inner).mean(0) if inner else torch.zeros_like(candidate.kl)
    return ProximalGradient(gradient, candidate, mean)
