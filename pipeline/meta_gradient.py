"""The meta-gradient of a chunk of tasks (eq. 4), second order or first order.

With θ_0 = θ and θ_{s+1} = θ_s − α ∇L_S(θ_s) on the support set (eq. 2), the gradient of the query
loss L_Q(θ_K) with respect to θ is a product of Jacobians, applied from the right:

    v_K = ∇L_Q(θ_K),      v_s = (I − α ∇²L_S(θ_s)) v_{s+1},      ∇_θ L_Q(θ_K) = v_0.

So: walk forward and keep each θ_s, then walk back with one Hessian-vector product per step. The
first-order approximation takes the inner gradients for constants: the Hessians vanish, v_0 = v_K.

Shapes: B tasks, D parameters, S inner steps. All tasks go through every stage at once (`vmap`).
Gradients are *sums* over the tasks of the chunk; the driver divides once by the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from pipeline.compilation import Compiler, operator_calls
from pipeline.inner_loop import differentiates_forward, inner_step, inner_step_back
from pipeline.meta_loss import Objective
from pipeline.parameters import Layout, Params
from tasks.base import TaskBatch

Order = Literal["second", "first"]


class MetaGradient(NamedTuple):
    """The meta-gradient of a chunk, and how its tasks fared."""

    gradient: Params
    """Sum over the tasks, shapes of θ."""
    metrics: dict[str, Tensor]
    """Per task, [B]: query_loss, query_<metric>, support_loss (before adaptation), and
    adapted_support_loss (before the last step)."""


class Stages(NamedTuple):
    """The three computations of a meta-gradient, each over all tasks of a chunk.

    `shared` says that the parameters are θ itself, not yet one copy per task: then the first step
    runs as one large batch instead of B small ones.
    """

    step: Callable[..., Any]
    query: Callable[..., Any]
    step_back: Callable[..., Any]

    @classmethod
    def of(cls, objective: Objective, *, forward: bool = True) -> Stages:
        """The stages of an objective; `forward` as in `hessian_vector_product`."""

        def axes(shared: bool) -> int | None:
            return None if shared else 0

        def step(params: Params, support: Any, alpha: Tensor, shared: bool) -> Any:
            one = partial(inner_step, objective.loss)
            return vmap(one, in_dims=(axes(shared), 0, None))(params, support, alpha)

        def query(params: Params, examples: Any) -> Any:
            one = grad_and_value(objective.loss_and_metrics, has_aux=True)
            return vmap(one)(params, examples)

        def step_back(params: Params, support: Any, alpha: Tensor, v: Params, shared: bool) -> Any:
            one = partial(inner_step_back, objective.loss, forward=forward)
            return vmap(one, in_dims=(axes(shared), 0, None, 0))(params, support, alpha, v)

        return cls(step, query, step_back)


def meta_gradient(
    stages: Stages, theta: Params, batch: TaskBatch, alpha: Tensor, *, steps: int, order: Order
) -> MetaGradient:
    """Sum over the chunk's tasks of ∇_θ L_Q(f_θ'), θ' = θ after `steps` inner steps (eq. 3, 4).

    `batch` holds B tasks (leading dimension of every tensor), `alpha` is the inner rate as a scalar
    tensor, so that another rate is not another program.
    """
    params = theta
    visited, support_losses = [], []
    for s in range(steps):
        visited.append(params)
        params, loss = stages.step(params, batch.support, alpha, s == 0)
        support_losses.append(loss)
    v, (query_loss, metrics) = stages.query(params, batch.query)
    if order == "second":
        for s in reversed(range(steps)):
            v = stages.step_back(visited[s], batch.support, alpha, v, s == 0)
    return MetaGradient(
        gradient={name: v[name].sum(0) for name in theta},
        metrics={
            "query_loss": query_loss,
            **{f"query_{name}": value for name, value in metrics.items()},
            "support_loss": support_losses[0],
            "adapted_support_loss": support_losses[-1],
        },
    )


ChunkFunction = Callable[[Tensor, TaskBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(flat θ [D], B tasks, α) -> (flat gradient sum [D], metrics per task [B])."""

# Compiling takes time in proportion to the operators: conv4 with one step has 2,000 (about a
# minute), with five steps 8,500, while its stages have a constant number.
_LARGEST_PROGRAM = 4000


def chunk_function(
    objective: Objective,
    layout: Layout,
    *,
    steps: int,
    order: Order,
    checkpoint: bool = False,
    compile: bool = False,
) -> ChunkFunction:
    """The computation of a chunk, from and to the flat vectors that travel.

    Compiled, all of it is one program, which keeps activations of the way forward for the way back.
    `checkpoint` makes one program per stage instead: activations live within a stage only, so that
    memory does not grow with `steps`, and each step back computes its gradient again. Where one
    program would take minutes to compile, there is one per stage in any case. In eager mode
    everything is the same walk, which keeps nothing but the θ_s.

    All three arguments of a call must be on one device; α is a tensor, another rate is not another
    program. The first call decides how to differentiate, traces and compiles.
    """

    def build(theta: Tensor, batch: TaskBatch, alpha: Tensor) -> ChunkFunction:
        one_task = pytree.tree_map(lambda t: t[:1], batch.support)
        forward = order == "first" or differentiates_forward(
            objective.loss, layout.split(theta), one_task
        )
        eager = Stages.of(objective, forward=forward)
        walk = _walk(eager, layout, steps, order)
        if not compile:
            return walk
        compiler = Compiler()
        if checkpoint or operator_calls(walk, theta, batch, alpha) > _LARGEST_PROGRAM:
            return _walk(Stages(*map(compiler.compiled, eager)), layout, steps, order)
        return compiler.compiled(walk)

    built: list[ChunkFunction] = []

    @torch.no_grad()
    def chunk(theta: Tensor, batch: TaskBatch, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not built:
            built.append(build(theta, batch, alpha))
        return built[0](theta, batch, alpha)

    return chunk


def _walk(stages: Stages, layout: Layout, steps: int, order: Order) -> ChunkFunction:
    """`meta_gradient` from and to flat vectors."""

    def walk(theta: Tensor, batch: TaskBatch, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = meta_gradient(stages, layout.split(theta), batch, alpha, steps=steps, order=order)
        return layout.join(result.gradient), result.metrics

    return walk


@torch.no_grad()
def adaptation_curve(
    objective: Objective, theta: Params, batch: TaskBatch, alpha: Tensor, *, steps: tuple[int, ...]
) -> dict[str, Tensor]:
    """Query loss and metrics of every task after each of `steps` gradient steps, [len(steps), B].

    The same inner step as in meta-training; more steps than trained are allowed.
    """
    stages = Stages.of(objective)
    num_tasks = batch.query.x.shape[0]
    params = {name: p.expand(num_tasks, *p.shape) for name, p in theta.items()}
    rows: list[dict[str, Tensor]] = []
    for s in range(steps[-1] + 1):
        if s in steps:
            loss, metrics = vmap(objective.loss_and_metrics)(params, batch.query)
            rows.append({"loss": loss, **metrics})
        if s < steps[-1]:
            params, _ = stages.step(params, batch.support, alpha, False)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
