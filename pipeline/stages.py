"""What a meta-gradient is made of, over all tasks of a chunk at once.

`inner_loop` has the same for one task; here everything is mapped over B of them (`vmap`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.func import grad_and_value, vmap

from pipeline.adaptation import Adaptation
from pipeline.compilation import Compiler
from pipeline.inner_loop import Adjoint, Step, inner_step, inner_step_back, slow_back_at_once
from pipeline.meta_loss import TaskLoss
from pipeline.parameters import Params
from pipeline.update_rules import Point

Order = Literal["second", "first"]


class Stages(NamedTuple):
    """The computations of a meta-gradient, each over all tasks of a chunk.

    `shared` says that the point is θ itself, not yet one copy per task: then the first step runs as
    one large batch instead of B small ones.
    """

    step: Callable[..., Step]
    query: Callable[..., Any]
    step_back: Callable[..., Adjoint]
    slow_back_at_once: Callable[..., Params] | None = None
    """The gradients of what is not adapted, of all steps at once; None: `step_back` gives them."""

    @classmethod
    def of(
        cls,
        objective: TaskLoss,
        adaptation: Adaptation,
        *,
        order: Order = "second",
        forward: bool = True,
        at_once: bool = False,
    ) -> Stages:
        """The stages of an objective; `forward` as in `hessian_vector_product`, `at_once`: with
        `slow_back_at_once`."""
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
                with_slow=not at_once,
                forward=forward,
            )
            return vmap(one, in_dims=(axes(shared), 0, None, None, None, 0, 0))(
                point, gradient, slow, rates, t, support, v
            )

        def all_steps_back(fast: Params, slow: Params, support: Any, v: Params) -> Params:
            one = partial(slow_back_at_once, objective.loss)
            return vmap(one, in_dims=(1, None, 0, 1))(fast, slow, support, v)

        together = at_once and order == "second"
        return cls(step, query, step_back, all_steps_back if together else None)

    def compiled(self, compiler: Compiler) -> Stages:
        """The same, compiled one by one."""
        stages = {name: compiler.compiled(stage) for name, stage in self._asdict().items() if stage}
        return Stages(**stages)
