"""The meta-gradient of a chunk of tasks (eq. 4), for every algorithm of the family.

With θ_0 = θ and θ_{s+1} = θ_s − α ∇L_S(θ_s) on the support set (eq. 2), the gradient of the query
loss L_Q(θ_S) with respect to θ is a product of Jacobians, applied from the right:

    v_S = ∇L_Q(θ_S),      v_s = (I − α ∇²L_S(θ_s)) v_{s+1},      ∇_θ L_Q(θ_S) = v_0.

So: walk forward and keep each θ_s, then walk back with one Hessian-vector product per step. The
first-order approximation takes the inner gradients for constants: the Hessians vanish, v_0 = v_S.
Where the query loss after every step counts (multi-step loss), each joins the walk back at its
step. Other choices - what is adapted, learned rates, other inner optimisers - are `Adaptation`'s.
Where only a head adapts, the body's gradient Σ_s ∂(∇L_S(θ_s)·ḡ_s) comes of all steps at once.

Shapes: B tasks, D meta-parameters, S steps. All tasks go through every stage at once (`vmap`).
Gradients are *sums* over the tasks of the chunk; the driver divides once by the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from pipeline.maml.adaptation import RATE, Adaptation, MetaSum
from pipeline.maml.compilation import Compiler, operator_calls
from pipeline.maml.inner_loop import (
    InnerStep,
    Order,
    Stages,
    can_go_back_at_once,
    differentiates_forward,
)
from pipeline.maml.meta_loss import Batch, Support, TaskLoss
from pipeline.maml.parameters import Layout, Params
from pipeline.maml.update_rules import Point

GradientEstimator = Literal["gradient", "reptile"]


class Knobs(NamedTuple):
    """Numbers that may differ from call to call without being another program."""

    alpha: Tensor
    """The inner rate, a scalar; not used where rates are learned."""
    query_weights: Tensor | None = None
    """How much the query loss after step 1 .. S counts, [S]; None: only the last one counts."""


class MetaGradient(NamedTuple):
    """The meta-gradient of a chunk, and how its tasks fared."""

    gradient: Params
    """Sum over the tasks, shapes of the meta-parameters."""
    metrics: dict[str, Tensor]
    """Per task, [B]: query_loss and query_<metric> after the last step, support_loss (before
    adaptation), and adapted_support_loss (before the last step)."""


class Visit(NamedTuple):
    """A step of adaptation on the way forward."""

    before: Point
    step: InnerStep


def walk_forward(
    stages: Stages, adaptation: Adaptation, meta: Params, support: Support, alpha: Tensor
) -> list[Visit]:
    """The S steps of adaptation to every task of a chunk."""
    point = adaptation.rule.start(adaptation.start(meta))
    visits = []
    for s in range(adaptation.steps):
        step = stages.step(
            point,
            adaptation.slow(meta, s),
            adaptation.rates_at(meta, alpha, s),
            alpha.new_tensor(s + 1.0),
            support.at_step(s, adaptation.batch_size),
            s == 0,
        )
        visits.append(Visit(point, step))
        point = step.point
    return visits


class Incoming(NamedTuple):
    """Gradients per task of something that looks at the parameters after a step, [B, ...]."""

    fast: Params
    slow: Params


def reached(
    adaptation: Adaptation, meta: Params, visits: list[Visit], step: int, num_tasks: int
) -> Point:
    """The point of every task after step `step` (counted from 0; −1: before the first)."""
    if step >= 0:
        return visits[step].step.point
    start = adaptation.start(meta)
    spread = {name: value.expand(num_tasks, *value.shape) for name, value in start.items()}
    return adaptation.rule.start(spread)


def carry_back(
    stages: Stages,
    adaptation: Adaptation,
    meta: Params,
    batch: Batch,
    alpha: Tensor,
    visits: list[Visit],
    incoming: Callable[[int, Point], Incoming | None],
    observe: Callable[[Params], None] = lambda v: None,
) -> Params:
    """Carries gradients from where adaptation came to back to the meta-parameters (chain rule),
    summed over the tasks.

    `incoming(s, point)` gives those of what looks at the point after step s (−1: at θ itself); for
    the last step there must be some. `observe` is shown v_S, ..., v_0 of every task on the way.
    """
    total = MetaSum(adaptation)
    points: list[Params] = []
    gradient_bars: list[Params] = []
    v: Point | None = None
    for s in range(adaptation.steps - 1, -2, -1):
        at = reached(adaptation, meta, visits, s, num_tasks(batch))
        came = incoming(s, at)
        if came is not None:
            total.add(came.slow, max(s, 0))
            if v is None:
                v = Point(came.fast, pytree.tree_map(torch.zeros_like, at.slots))
            else:
                v = Point({name: v.fast[name] + g for name, g in came.fast.items()}, v.slots)
        assert v is not None
        observe(v.fast)
        if s < 0:
            break
        visit = visits[s]
        v, slow_bar, rates_bar, gradient_bar = stages.step_back(
            visit.before,
            visit.step.gradient,
            adaptation.slow(meta, s),
            adaptation.rates_at(meta, alpha, s),
            alpha.new_tensor(s + 1.0),
            batch.support.at_step(s, adaptation.batch_size),
            v,
            s == 0,
        )
        total.add(slow_bar, s)
        total.add(rates_bar, s, prefix=RATE)
        if stages.slow_back_at_once is not None:
            points.append(reached(adaptation, meta, visits, s - 1, num_tasks(batch)).fast)
            gradient_bars.append(gradient_bar)
    assert v is not None
    total.add(v.fast, 0)
    if stages.slow_back_at_once is not None:
        slow = adaptation.slow(meta, 0)
        support = batch.support.at_step(0, adaptation.batch_size)
        slow_bar = stages.slow_back_at_once(
            _stacked(points), slow, support, _stacked(gradient_bars)
        )
        total.add(slow_bar, 0)
    return total.gradient(meta)


def _stacked(steps: list[Params]) -> Params:
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def meta_gradient(
    stages: Stages,
    adaptation: Adaptation,
    meta: Params,
    batch: Batch,
    knobs: Knobs,
) -> MetaGradient:
    """Sum over the chunk's tasks of the gradient of L_Q(f_θ') (eq. 3, 4) with respect to `meta`.

    θ' is θ after S steps of adaptation; with `query_weights`, the losses after every step are added
    with these weights. `batch` holds B tasks (leading dimension of every tensor).
    """
    visits = walk_forward(stages, adaptation, meta, batch.support, knobs.alpha)
    return walk_back(visits, stages, adaptation, meta, batch, knobs)


def walk_back(
    visits: list[Visit],
    stages: Stages,
    adaptation: Adaptation,
    meta: Params,
    batch: Batch,
    knobs: Knobs,
    observe: Callable[[Params], None] = lambda v: None,
) -> MetaGradient:
    """The meta-gradient of adaptation that has been walked; `observe` is shown v_S, ..., v_0 of
    every task on the way back."""
    metrics = _support_metrics(visits)

    def judged(s: int, at: Point) -> Incoming | None:
        last, weights = s == adaptation.steps - 1, knobs.query_weights
        if not last and (weights is None or s < 0):
            return None
        slow = adaptation.slow(meta, max(s, 0))
        (fast_bar, slow_bar), (loss, found) = stages.query(at.fast, slow, batch.query)
        if last:
            metrics.update({"query_loss": loss, **{f"query_{n}": m for n, m in found.items()}})
        if weights is not None:
            fast_bar = {name: weights[s] * value for name, value in fast_bar.items()}
            slow_bar = {name: weights[s] * value for name, value in slow_bar.items()}
        return Incoming(fast_bar, slow_bar)

    gradient = carry_back(stages, adaptation, meta, batch, knobs.alpha, visits, judged, observe)
    return MetaGradient(gradient, metrics)


def reptile_gradient(
    stages: Stages,
    adaptation: Adaptation,
    objective: TaskLoss,
    meta: Params,
    batch: Batch,
    knobs: Knobs,
) -> MetaGradient:
    """Sum over the tasks of θ − θ'_S (Nichol et al. 2018): to an optimiser that subtracts it, a
    gradient. Query sets are looked at for the metrics alone."""
    visits = walk_forward(stages, adaptation, meta, batch.support, knobs.alpha)
    reached = visits[-1].step.point.fast
    slow = adaptation.slow(meta, adaptation.steps - 1)
    judge = vmap(lambda fast, examples: objective.loss_and_metrics({**slow, **fast}, examples))
    loss, judged = judge(reached, batch.query)
    total = MetaSum(adaptation)
    total.add({name: meta[name] - value for name, value in reached.items()}, 0)
    metrics = {"query_loss": loss, **{f"query_{name}": value for name, value in judged.items()}}
    return MetaGradient(total.gradient(meta), metrics | _support_metrics(visits))


def _support_metrics(visits: list[Visit]) -> dict[str, Tensor]:
    if not visits:
        return {}
    return {
        "support_loss": visits[0].step.loss,
        "adapted_support_loss": visits[-1].step.loss,
    }


def num_tasks(batch: Batch) -> int:
    """B."""
    return int(pytree.tree_leaves(batch.query)[0].shape[0])


def differentiates(objective: TaskLoss, adaptation: Adaptation, meta: Params, batch: Batch) -> bool:
    """`differentiates_forward` on one of the tasks."""
    if not adaptation.steps:
        return True
    params = {**adaptation.slow(meta, 0), **adaptation.start(meta)}
    one_task = pytree.tree_map(lambda t: t[:1], batch.support.at_step(0))
    return differentiates_forward(objective.loss, params, one_task)


def goes_back_at_once(
    objective: TaskLoss, adaptation: Adaptation, meta: Params, batch: Batch
) -> bool:
    """Whether the steps differ in nothing but the last layers, and the others can be walked through
    once for all steps."""
    if adaptation.steps < 2 or not adaptation.adapts_last_layers(meta):
        return False
    supports = [batch.support.at_step(s, adaptation.batch_size) for s in range(adaptation.steps)]
    if any(support is not supports[0] for support in supports):
        return False
    few_tasks = pytree.tree_map(lambda t: t[:2], supports[0])
    fast, slow = adaptation.start(meta), adaptation.slow(meta, 0)
    return can_go_back_at_once(objective.loss, fast, slow, few_tasks)


ChunkFunction = Callable[[Tensor, Batch, Knobs], tuple[Tensor, dict[str, Tensor]]]
"""(flat meta-parameters [D], B tasks, knobs) -> (flat gradient sum [D], metrics per task [B])."""

# Compiling takes time in proportion to the operators: conv4 with one step has 2,000 (about a
# minute), with five steps 8,500, while its stages have a constant number.
_LARGEST_PROGRAM = 4000


def chunk_function(
    objective: TaskLoss,
    adaptation: Adaptation,
    layout: Layout,
    *,
    order: Order = "second",
    estimator: GradientEstimator = "gradient",
    remat: bool = False,
    compile: bool = False,
) -> ChunkFunction:
    """The computation of a chunk, from and to the flat vectors that travel.

    `objective` is the loss of a task (eq. 3), `adaptation` how θ becomes θ'_S (eq. 2), `layout`
    that of the meta-parameters. `order` says whether inner gradients are differentiated ("second")
    or constants ("first"); `estimator` is the meta-gradient ("gradient") or reptile's difference.
    With `compile` all of it is one program, which keeps activations of the way forward for the way
    back.
    `remat` makes one program per stage instead: activations live within a stage only, so that
    memory does not grow with the steps, and each step back computes its gradient again. Where one
    program would take minutes to compile, there is one per stage in any case. In eager mode
    everything is the same walk, which keeps the θ_s and the inner gradients.

    All arguments of a call must be on one device; other knobs are not another program. The first
    call decides how to differentiate, traces and compiles.
    """

    def build(flat: Tensor, batch: Batch, knobs: Knobs) -> ChunkFunction:
        needless = order == "first" or estimator == "reptile"
        to_try = (objective, adaptation, layout.split(flat), batch)
        forward = needless or differentiates(*to_try)
        at_once = not needless and goes_back_at_once(*to_try)
        eager = Stages.of(objective, adaptation, order=order, forward=forward, at_once=at_once)
        if not compile:
            return walk_of(eager)
        compiler = Compiler()
        if remat or operator_calls(walk_of(eager), flat, batch, knobs) > _LARGEST_PROGRAM:
            return walk_of(eager.compiled(compiler))
        return compiler.compiled(walk_of(eager))

    def walk_of(stages: Stages) -> ChunkFunction:
        def walk(flat: Tensor, batch: Batch, knobs: Knobs) -> tuple[Tensor, dict[str, Tensor]]:
            meta = layout.split(flat)
            if estimator == "reptile":
                result = reptile_gradient(stages, adaptation, objective, meta, batch, knobs)
            else:
                result = meta_gradient(stages, adaptation, meta, batch, knobs)
            return layout.join(result.gradient), result.metrics

        return walk

    built: list[ChunkFunction] = []

    @torch.no_grad()
    def chunk(flat: Tensor, batch: Batch, knobs: Knobs) -> tuple[Tensor, dict[str, Tensor]]:
        if not built:
            built.append(build(flat, batch, knobs))
        return built[0](flat, batch, knobs)

    return chunk
