"""The meta-gradient of a chunk of tasks (eq. 4), for every algorithm of the family.

With θ_0 = θ and θ_{s+1} = θ_s − α ∇L_S(θ_s) on the support set (eq. 2), the gradient of the query
loss L_Q(θ_S) with respect to θ is a product of Jacobians, applied from the right:

    v_S = ∇L_Q(θ_S),      v_s = (I − α ∇²L_S(θ_s)) v_{s+1},      ∇_θ L_Q(θ_S) = v_0.

So: walk forward and keep each θ_s, then walk back with one Hessian-vector product per step. The
first-order approximation takes the inner gradients for constants: the Hessians vanish, v_0 = v_S.
Where the query loss after every step counts (multi-step loss), each joins the walk back at its
step. Other choices - what is adapted, learned rates, other inner optimisers - are `Adaptation`'s.

Shapes: B tasks, D meta-parameters, S steps. All tasks go through every stage at once (`vmap`).
Gradients are *sums* over the tasks of the chunk; the driver divides once by the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from pipeline.adaptation import RATE, Adaptation, MetaSum
from pipeline.compilation import Compiler, operator_calls
from pipeline.inner_loop import Adjoint, Step, differentiates_forward, inner_step, inner_step_back
from pipeline.meta_loss import Objective
from pipeline.parameters import Layout, Params
from pipeline.update_rules import Point
from tasks.base import Examples, TaskBatch

Order = Literal["second", "first"]
Estimator = Literal["gradient", "reptile"]


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


class Stages(NamedTuple):
    """The three computations of a meta-gradient, each over all tasks of a chunk.

    `shared` says that the point is θ itself, not yet one copy per task: then the first step runs as
    one large batch instead of B small ones.
    """

    step: Callable[..., Step]
    query: Callable[..., Any]
    step_back: Callable[..., Adjoint]

    @classmethod
    def of(
        cls,
        objective: Objective,
        adaptation: Adaptation,
        *,
        order: Order = "second",
        forward: bool = True,
    ) -> Stages:
        """The stages of an objective; `forward` as in `hessian_vector_product`."""
        rule = adaptation.rule

        def axes(shared: bool) -> int | None:
            return None if shared else 0

        def step(
            point: Point, slow: Params, rates: Params, t: Tensor, support: Any, shared: bool
        ) -> Step:
            one = partial(inner_step, objective.loss, rule)
            return vmap(one, in_dims=(axes(shared), None, None, None, 0))(
                point, slow, rates, t, support
            )

        def query(fast: Params, slow: Params, examples: Any) -> Any:
            def loss(fast: Params, slow: Params, examples: Any) -> Any:
                return objective.loss_and_metrics({**slow, **fast}, examples)

            one = grad_and_value(loss, argnums=(0, 1), has_aux=True)
            return vmap(one, in_dims=(0, None, 0))(fast, slow, examples)

        def step_back(
            point: Point,
            gradient: Params,
            slow: Params,
            rates: Params,
            t: Tensor,
            support: Any,
            v: Point,
            shared: bool,
        ) -> Adjoint:
            one = partial(
                inner_step_back,
                objective.loss,
                rule,
                second_order=order == "second",
                learns_rates=adaptation.learns_rates,
                forward=forward,
            )
            return vmap(one, in_dims=(axes(shared), 0, None, None, None, 0, 0))(
                point, gradient, slow, rates, t, support, v
            )

        return cls(step, query, step_back)


class Visit(NamedTuple):
    """A step of adaptation on the way forward."""

    before: Point
    step: Step


def walk_forward(
    stages: Stages, adaptation: Adaptation, meta: Params, support: Examples, alpha: Tensor
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
            adaptation.batch(support, s),
            s == 0,
        )
        visits.append(Visit(point, step))
        point = step.point
    return visits


def meta_gradient(
    stages: Stages,
    adaptation: Adaptation,
    meta: Params,
    batch: TaskBatch,
    knobs: Knobs,
    observe: Callable[[Params], None] = lambda v: None,
) -> MetaGradient:
    """Sum over the chunk's tasks of the gradient of L_Q(f_θ') (eq. 3, 4) with respect to `meta`.

    θ' is θ after S steps of adaptation; with `query_weights`, the losses after every step are added
    with these weights. `batch` holds B tasks (leading dimension of every tensor). `observe` is
    shown v_S, ..., v_0 of every task on the way back.
    """
    visits = walk_forward(stages, adaptation, meta, batch.support, knobs.alpha)
    metrics = _support_metrics(visits)
    total = MetaSum(adaptation)
    v = Point({}, {})
    for s in reversed(range(adaptation.steps)):
        visit, slow = visits[s], adaptation.slow(meta, s)
        last = s == adaptation.steps - 1
        if last or knobs.query_weights is not None:
            at = visit.step.point
            (fast_bar, slow_bar), (loss, judged) = stages.query(at.fast, slow, batch.query)
            if knobs.query_weights is not None:
                weight = knobs.query_weights[s]
                fast_bar = {name: weight * value for name, value in fast_bar.items()}
                slow_bar = {name: weight * value for name, value in slow_bar.items()}
            total.add(slow_bar, s)
            if last:
                metrics |= {"query_loss": loss, **{f"query_{n}": m for n, m in judged.items()}}
                slots = pytree.tree_map(torch.zeros_like, at.slots)
                v = Point(fast_bar, slots)
            else:
                v = Point({name: v.fast[name] + g for name, g in fast_bar.items()}, v.slots)
        observe(v.fast)
        v, slow_bar, rates_bar = stages.step_back(
            visit.before,
            visit.step.gradient,
            slow,
            adaptation.rates_at(meta, knobs.alpha, s),
            knobs.alpha.new_tensor(s + 1.0),
            adaptation.batch(batch.support, s),
            v,
            s == 0,
        )
        total.add(slow_bar, s)
        total.add(rates_bar, s, prefix=RATE)
    observe(v.fast)
    total.add(v.fast, 0)
    return MetaGradient(total.gradient(meta), metrics)


def reptile_gradient(
    stages: Stages,
    adaptation: Adaptation,
    objective: Objective,
    meta: Params,
    batch: TaskBatch,
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
    return {
        "support_loss": visits[0].step.loss,
        "adapted_support_loss": visits[-1].step.loss,
    }


def differentiates(
    objective: Objective, adaptation: Adaptation, meta: Params, batch: TaskBatch
) -> bool:
    """`differentiates_forward` on one of the tasks."""
    params = {**adaptation.slow(meta, 0), **adaptation.start(meta)}
    one_task = pytree.tree_map(lambda t: t[:1], batch.support)
    return differentiates_forward(objective.loss, params, one_task)


ChunkFunction = Callable[[Tensor, TaskBatch, Knobs], tuple[Tensor, dict[str, Tensor]]]
"""(flat meta-parameters [D], B tasks, knobs) -> (flat gradient sum [D], metrics per task [B])."""

# Compiling takes time in proportion to the operators: conv4 with one step has 2,000 (about a
# minute), with five steps 8,500, while its stages have a constant number.
_LARGEST_PROGRAM = 4000


def chunk_function(
    objective: Objective,
    adaptation: Adaptation,
    layout: Layout,
    *,
    order: Order = "second",
    estimator: Estimator = "gradient",
    checkpoint: bool = False,
    compile: bool = False,
) -> ChunkFunction:
    """The computation of a chunk, from and to the flat vectors that travel.

    `layout` is that of the meta-parameters. Compiled, all of it is one program, which keeps
    activations of the way forward for the way back.
    `checkpoint` makes one program per stage instead: activations live within a stage only, so that
    memory does not grow with the steps, and each step back computes its gradient again. Where one
    program would take minutes to compile, there is one per stage in any case. In eager mode
    everything is the same walk, which keeps the θ_s and the inner gradients.

    All arguments of a call must be on one device; other knobs are not another program. The first
    call decides how to differentiate, traces and compiles.
    """

    def build(flat: Tensor, batch: TaskBatch, knobs: Knobs) -> ChunkFunction:
        needless = order == "first" or estimator == "reptile"
        forward = needless or differentiates(objective, adaptation, layout.split(flat), batch)
        eager = Stages.of(objective, adaptation, order=order, forward=forward)
        if not compile:
            return walk_of(eager)
        compiler = Compiler()
        if checkpoint or operator_calls(walk_of(eager), flat, batch, knobs) > _LARGEST_PROGRAM:
            return walk_of(Stages(*map(compiler.compiled, eager)))
        return compiler.compiled(walk_of(eager))

    def walk_of(stages: Stages) -> ChunkFunction:
        def walk(flat: Tensor, batch: TaskBatch, knobs: Knobs) -> tuple[Tensor, dict[str, Tensor]]:
            meta = layout.split(flat)
            if estimator == "reptile":
                result = reptile_gradient(stages, adaptation, objective, meta, batch, knobs)
            else:
                result = meta_gradient(stages, adaptation, meta, batch, knobs)
            return layout.join(result.gradient), result.metrics

        return walk

    built: list[ChunkFunction] = []

    @torch.no_grad()
    def chunk(flat: Tensor, batch: TaskBatch, knobs: Knobs) -> tuple[Tensor, dict[str, Tensor]]:
        if not built:
            built.append(build(flat, batch, knobs))
        return built[0](flat, batch, knobs)

    return chunk


class Adapted(NamedTuple):
    """The parameters after some steps of adaptation, as the query set is seen with them."""

    fast: Params
    """A copy for every task, [B, ...]."""
    slow: Params


def trajectory(
    objective: Objective,
    adaptation: Adaptation,
    meta: Params,
    support: Examples,
    alpha: Tensor,
    steps: int,
) -> Iterator[Adapted]:
    """Adaptation to B tasks as in meta-training: the parameters after 0, 1, ... `steps` steps.

    Beyond the trained steps the settings of the last one are repeated.
    """
    stages = Stages.of(objective, adaptation)
    num_tasks = support.x.shape[0]
    fast = {n: p.expand(num_tasks, *p.shape) for n, p in adaptation.start(meta).items()}
    point = adaptation.rule.start(fast)
    yield Adapted(fast, adaptation.slow(meta, 0))
    for s in range(steps):
        slow = adaptation.slow(meta, s)
        rates = adaptation.rates_at(meta, alpha, s)
        with torch.no_grad():
            point = stages.step(
                point, slow, rates, alpha.new_tensor(s + 1.0), adaptation.batch(support, s), False
            ).point
        yield Adapted(point.fast, slow)


@torch.no_grad()
def adaptation_curve(
    objective: Objective,
    adaptation: Adaptation,
    meta: Params,
    batch: TaskBatch,
    alpha: Tensor,
    *,
    steps: tuple[int, ...],
) -> dict[str, Tensor]:
    """Query loss and metrics of every task after each of `steps` steps, [len(steps), B]."""
    rows: list[dict[str, Tensor]] = []
    adapted = trajectory(objective, adaptation, meta, batch.support, alpha, steps[-1])
    for step, (fast, slow) in enumerate(adapted):
        if step in steps:
            judge = vmap(lambda f, q, slow=slow: objective.loss_and_metrics({**slow, **f}, q))
            loss, metrics = judge(fast, batch.query)
            rows.append({"loss": loss, **metrics})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
