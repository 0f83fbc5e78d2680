"""The meta-gradient of a chunk of tasks (eq. 4), for every algorithm of the family.

With θ_0 = θ and θ_{s+1} = θ_s − α ∇L_S(θ_s) on the support set (eq. 2), the gradient of the query
loss L_Q(θ_S) with respect to θ is a product of Jacobians, applied from the right:

    v_S = ∇L_Q(θ_S),      v_s = (I − α ∇²L_S(θ_s)) v_{s+1},      ∇_θ L_Q(θ_S) = v_0.

The forward pass computes and keeps each θ_s; the backward pass computes v_S, ..., v_0 with one
Hessian-vector product per step. The first-order approximation treats the inner gradients as
constants: the Hessians vanish, and v_0 = v_S. The multi-step loss of MAML++ evaluates the query
after every step; each of these gradients is added to v_s at its step. `Adaptation` holds the other
choices: what is adapted, learned rates, other inner optimisers. Where only a head adapts, one
computation gives the body's gradient Σ_s ∂(∇L_S(θ_s)·ḡ_s) of all steps.

Shapes: B tasks, D meta-parameters, S steps. Every stage computes all B tasks at once (`vmap`).
Gradients are *sums* over the tasks of the chunk; the driver divides once by the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from pipeline.maml.adaptation import RATE, Adaptation, MetaSum
from pipeline.maml.adaptation_curve import Adapted, inner_steps, query_metrics
from pipeline.maml.compilation import Compiler, operator_calls
from pipeline.maml.flat_vector import Layout, Params
from pipeline.maml.inner_loop import (
    InnerStep,
    Order,
    Stages,
    forward_mode_succeeds,
    hessian_vector_product,
    matches_single_steps,
)
from pipeline.maml.inner_optimizers import Point
from pipeline.maml.meta_loss import Batch, TaskLoss, num_tasks

Direction = Literal["gradient", "reptile"]
"""The meta-gradient of eq. 4, or θ − θ'_S in its place (Nichol et al. 2018)."""


class Knobs(NamedTuple):
    """Numbers that may differ between calls of one compiled program. Tensors must be on the device
    and in the precision of θ."""

    alpha: Tensor
    """The inner rate, a scalar: parameters move by alpha times the gradient of the *mean* loss over
    the support set, so the rate does not depend on the number of examples. Not used where rates are
    learned."""
    query_weights: Tensor | None = None
    """The weight of the query loss after steps 1 .. S, [S]. None: the loss after step S counts with
    weight 1, the others do not count."""


class MetaGradient(NamedTuple):
    """The meta-gradient of a chunk, and metrics of its tasks."""

    gradient: Params
    """Sum over the tasks, in the shapes of the meta-parameters."""
    metrics: dict[str, Tensor]
    """Per task, [B]: query_loss and query_<metric> after the last step, support_loss (before the
    first step), and adapted_support_loss (before the last step)."""


@dataclass(frozen=True)
class ForwardPass:
    """Adaptation to the B tasks of a chunk, kept for the backward pass."""

    adaptation: Adaptation
    meta: Params
    batch: Batch
    alpha: Tensor
    start: Point
    """θ_0, the same for all tasks: without the dimension B."""
    steps: list[InnerStep]
    """The S steps; tensors are [B, ...]."""

    def before(self, step: int) -> Point:
        """The point before step `step` (0, 1, ...): θ_0 without the dimension B, else [B, ...]."""
        return self.steps[step - 1].point if step else self.start

    def after(self, steps: int) -> Point:
        """The point of every task after so many steps, [B, ...]."""
        if steps:
            return self.steps[steps - 1].point
        return self.adaptation.start_point(self.meta, num_tasks(self.batch))

    def adapted(self, steps: int) -> Adapted:
        """The parameters with which the query set is evaluated after so many steps."""
        return Adapted(self.after(steps).fast, self.adaptation.slow_after(self.meta, steps))


def forward_pass(
    stages: Stages, adaptation: Adaptation, meta: Params, batch: Batch, alpha: Tensor
) -> ForwardPass:
    """Take the S steps of adaptation to every task of a chunk."""
    start, support = adaptation.start_point(meta), batch.support
    steps = inner_steps(
        stages, adaptation, meta, support, alpha, start, adaptation.steps, shared=True
    )
    return ForwardPass(adaptation, meta, batch, alpha, start, list(steps))


class Cotangent(NamedTuple):
    """Gradients per task, [B, ...], of a function of the parameters after some steps."""

    fast: Params
    slow: Params

    def scaled(self, weight: Tensor | float) -> Cotangent:
        """The gradients of the function times a weight, a scalar."""
        return Cotangent(
            {name: weight * value for name, value in self.fast.items()},
            {name: weight * value for name, value in self.slow.items()},
        )


def _no_cotangent(steps: int, adapted: Adapted) -> None:
    """The default of `earlier`: only the parameters after the last step enter the loss."""


def backpropagate(
    stages: Stages,
    passed: ForwardPass,
    last: Cotangent,
    earlier: Callable[[int, Adapted], Cotangent | None] = _no_cotangent,
    observe: Callable[[Params], None] = lambda v: None,
) -> Params:
    """Carry gradients back through adaptation to the meta-parameters (chain rule), and sum them
    over the tasks.

    `last` is the gradient with respect to the parameters after all S steps. `earlier(k, adapted)`
    gives the gradient of a further function of the parameters after k < S steps, or None.
    `observe` is called with v_S, ..., v_0 of every task, [B, ...].
    """
    adaptation, meta = passed.adaptation, passed.meta
    steps, support = adaptation.steps, passed.batch.support
    total = MetaSum(adaptation)
    points: list[Params] = []
    gradient_bars: list[Params] = []
    total.add_after(last.slow, steps)
    v = Point(last.fast, pytree.tree_map(torch.zeros_like, passed.after(steps).slots))
    observe(v.fast)
    for s in reversed(range(steps)):
        v, slow_bar, rates_bar, gradient_bar = stages.step_back(
            passed.before(s),
            passed.steps[s].gradient,
            adaptation.at(meta, passed.alpha, s),
            support.at_step(s, adaptation.batch_size),
            v,
            s == 0,
        )
        total.add(slow_bar, s)
        total.add(rates_bar, s, prefix=RATE)
        if stages.slow_back is not None:
            points.append(passed.after(s).fast)
            gradient_bars.append(gradient_bar)
        further = earlier(s, passed.adapted(s))
        if further is not None:
            total.add_after(further.slow, s)
            v = Point({name: v.fast[name] + g for name, g in further.fast.items()}, v.slots)
        observe(v.fast)
    total.add(v.fast, 0)
    if stages.slow_back is not None:
        slow = adaptation.slow(meta, 0)
        every_step = support.at_step(0, adaptation.batch_size)
        slow_bar = stages.slow_back(_stacked(points), slow, every_step, _stacked(gradient_bars))
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
    """Sum over the chunk's tasks of the gradient of L_Q(f_θ') with respect to `meta` (eq. 3, 4).

    θ' is θ after S steps of adaptation. With `query_weights`, the function is the weighted sum of
    the query losses after every step (the multi-step loss of MAML++, Antoniou et al. 2019).
    """
    return meta_gradient_after(
        stages, forward_pass(stages, adaptation, meta, batch, knobs.alpha), knobs
    )


def meta_gradient_after(
    stages: Stages,
    passed: ForwardPass,
    knobs: Knobs,
    observe: Callable[[Params], None] = lambda v: None,
) -> MetaGradient:
    """The meta-gradient after a forward pass; `observe` is that of `backpropagate`."""
    weights, steps = knobs.query_weights, passed.adaptation.steps

    def query_gradient(after: int, adapted: Adapted) -> tuple[Cotangent, dict[str, Tensor]]:
        bars, (loss, metrics) = stages.query(*adapted, passed.batch.query)
        cotangent = Cotangent(*bars)
        if weights is not None:
            cotangent = cotangent.scaled(weights[after - 1])
        return cotangent, _query_metrics(loss, metrics)

    def earlier(after: int, adapted: Adapted) -> Cotangent | None:
        if weights is None or after == 0:
            return None
        return query_gradient(after, adapted)[0]

    last, metrics = query_gradient(steps, passed.adapted(steps))
    gradient = backpropagate(stages, passed, last, earlier, observe)
    return MetaGradient(gradient, _support_metrics(passed) | metrics)


def reptile_gradient(
    stages: Stages,
    adaptation: Adaptation,
    objective: TaskLoss,
    meta: Params,
    batch: Batch,
    knobs: Knobs,
) -> MetaGradient:
    """Sum over the tasks of θ − θ'_S (Nichol et al. 2018), which an optimiser subtracts as it does
    a gradient. The query sets are used for metrics alone."""
    passed = forward_pass(stages, adaptation, meta, batch, knobs.alpha)
    adapted = passed.adapted(adaptation.steps)
    loss, metrics = query_metrics(objective, adapted, batch.query)
    total = MetaSum(adaptation)
    total.add({name: meta[name] - value for name, value in adapted.fast.items()}, 0)
    return MetaGradient(
        total.gradient(meta), _query_metrics(loss, metrics) | _support_metrics(passed)
    )


def _query_metrics(loss: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"query_loss": loss, **{f"query_{name}": value for name, value in metrics.items()}}


def _support_metrics(passed: ForwardPass) -> dict[str, Tensor]:
    if not passed.steps:
        return {}
    return {
        "support_loss": passed.steps[0].loss,
        "adapted_support_loss": passed.steps[-1].loss,
    }


def inner_loss_has_forward_derivatives(
    objective: TaskLoss, adaptation: Adaptation, meta: Params, batch: Batch
) -> bool:
    """Whether torch can differentiate the gradient of the inner loss forward.

    It is tried on the first task, under `vmap`, because some derivatives of torch fail only there.
    """
    if not adaptation.steps:
        return True
    params = {**adaptation.slow(meta, 0), **adaptation.start(meta)}
    one_task = pytree.tree_map(lambda t: t[:1], batch.support.at_step(0))
    product = vmap(
        lambda support: hessian_vector_product(objective.loss, params, {}, support, params)
    )
    return forward_mode_succeeds(lambda: product(one_task))


def at_once_applies(
    objective: TaskLoss, adaptation: Adaptation, meta: Params, batch: Batch
) -> bool:
    """Whether the gradients of all slow parameters can come from `slow_gradient_of_all_steps`.

    That needs two steps or more on the same support, adapted parameters in the last layers alone,
    and second derivatives that torch computes rightly under `vmap`; tried on two tasks.
    """
    if adaptation.steps < 2 or not adaptation.adapts_last_layers(meta):
        return False
    supports = [batch.support.at_step(s, adaptation.batch_size) for s in range(adaptation.steps)]
    if any(support is not supports[0] for support in supports):
        return False
    few_tasks = pytree.tree_map(lambda t: t[:2], supports[0])
    fast, slow = adaptation.start(meta), adaptation.slow(meta, 0)
    return matches_single_steps(objective.loss, fast, slow, few_tasks)


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
    direction: Direction = "gradient",
    recompute: bool = False,
    compile: bool = False,
) -> ChunkFunction:
    """The function that computes the gradient sum of a chunk, from and to flat vectors.

    `objective` is the loss of a task (eq. 3), `adaptation` how θ becomes θ'_S (eq. 2), `layout`
    that of the meta-parameters. `order` says whether inner gradients are differentiated ("second")
    or constants ("first"); `direction` is the meta-gradient ("gradient") or Reptile's difference.

    With `compile`, all of it becomes one program, which keeps the activations of the forward pass
    for the backward pass. With `recompute` (activation checkpointing), every stage becomes a
    program of its own instead: activations live within a stage, each step back computes its
    gradient again, and memory does not grow with the steps. A function of more than 4,000 operators
    is compiled stage by stage even without `recompute`, because one program would take minutes.
    `recompute` changes nothing without `compile`: the eager function keeps only the θ_s and the
    inner gradients.

    The tensors of a call must be on one device and in one precision. The first call tries how torch
    can differentiate the objective, traces and compiles; another value of a knob needs no new
    program. It raises nothing of its own: errors are those that the model, the loss or torch
    raises, such as RuntimeError for a vector of the wrong length. If compilation fails, the
    function logs one warning and runs eagerly.
    """
    return _ChunkProgram(objective, adaptation, layout, order, direction, recompute, compile)


@dataclass(eq=False)  # a program is the same as itself alone
class _ChunkProgram:
    """A `ChunkFunction` that decides at its first call, on its first chunk, how it computes."""

    objective: TaskLoss
    adaptation: Adaptation
    layout: Layout
    order: Order
    direction: Direction
    recompute: bool
    compile: bool
    program: ChunkFunction | None = field(default=None, init=False)

    @torch.no_grad()
    def __call__(
        self, flat: Tensor, batch: Batch, knobs: Knobs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.program is None:
            self.program = self.build(flat, batch, knobs)
        return self.program(flat, batch, knobs)

    def build(self, flat: Tensor, batch: Batch, knobs: Knobs) -> ChunkFunction:
        """The function for chunks such as this one, compiled where that was asked for."""
        to_try = (self.objective, self.adaptation, self.layout.split(flat), batch)
        second = self.order == "second" and self.direction != "reptile"
        eager = Stages.of(
            self.objective,
            self.adaptation,
            order=self.order,
            forward=not second or inner_loss_has_forward_derivatives(*to_try),
            at_once=second and at_once_applies(*to_try),
        )
        if not self.compile:
            return self.on_flat_vectors(eager)
        whole, compiler = self.on_flat_vectors(eager), Compiler()
        if self.recompute or operator_calls(whole, flat, batch, knobs) > _LARGEST_PROGRAM:
            return self.on_flat_vectors(eager.compiled(compiler))
        return compiler.compiled(whole)

    def on_flat_vectors(self, stages: Stages) -> ChunkFunction:
        """The meta-gradient by these stages, from and to flat vectors."""

        def chunk(flat: Tensor, batch: Batch, knobs: Knobs) -> tuple[Tensor, dict[str, Tensor]]:
            meta = self.layout.split(flat)
            if self.direction == "reptile":
                result = reptile_gradient(
                    stages, self.adaptation, self.objective, meta, batch, knobs
                )
            else:
                result = meta_gradient(stages, self.adaptation, meta, batch, knobs)
            return self.layout.join(result.gradient), result.metrics

        return chunk
