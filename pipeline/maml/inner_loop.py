"""Adaptation to a task, θ -> θ'_S (eq. 2), and the way back (the chain rule through it).

The functions are pure functions of one task; `Stages` maps them over all tasks of a chunk (`vmap`).
Parameters come in two groups: those that are adapted (`fast`, in a `Point`) and those that are used
as they are (`slow`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.compilation import Compiler
from pipeline.maml.meta_loss import Loss, TaskLoss
from pipeline.maml.parameters import Params
from pipeline.maml.update_rules import Point, Rule

Order = Literal["second", "first"]


class InnerStep(NamedTuple):
    """What one step of adaptation gives."""

    point: Point
    gradient: Params
    """∇L_S, which the way back needs again."""
    loss: Tensor
    """L_S before the step."""


class Adjoint(NamedTuple):
    """Gradients of some later loss with respect to what went into a step."""

    point: Point
    slow: Params
    """Empty where it is left to `slow_back_at_once`."""
    rates: Params
    gradient_bar: Params
    """With respect to the inner gradient, where `slow_back_at_once` will need it."""


def inner_step(
    loss: Loss, rule: Rule, point: Point, slow: Params, rates: Params, t: Tensor, support: Any
) -> InnerStep:
    """One step; with plain gradient descent θ_{s+1} = θ_s − α ∇L(θ_s) (eq. 2)."""

    def of_fast(fast: Params) -> Tensor:
        return loss({**slow, **fast}, support)

    gradient, value = grad_and_value(of_fast)(point.fast)
    return InnerStep(rule.update(point, gradient, rates, t), gradient, value)


def inner_step_back(
    loss: Loss,
    rule: Rule,
    point: Point,
    gradient: Params,
    slow: Params,
    rates: Params,
    t: Tensor,
    support: Any,
    v: Point,
    *,
    second_order: bool,
    learns_rates: bool,
    with_slow: bool = True,
    forward: bool = True,
) -> Adjoint:
    """Carries a gradient back through one step.

    `v` is the gradient of some function with respect to the point after the step; the result is its
    gradient with respect to what went in. With plain gradient descent
    v_s = (I − α H_s) v_{s+1}, H_s = ∇²L(θ_s). First order takes the inner gradient for a constant.
    Without `with_slow`, what is not adapted is left to `slow_back_at_once`.
    """
    if learns_rates:
        pull = vjp(lambda p, g, r: rule.update(p, g, r, t), point, gradient, rates)[1]
        before, gradient_bar, rates_bar = pull(v)
    else:
        pull = vjp(lambda p, g: rule.update(p, g, rates, t), point, gradient)[1]
        (before, gradient_bar), rates_bar = pull(v), {}
    if not second_order:
        return Adjoint(before, {}, rates_bar, {})
    wanted, left = (slow, {}) if with_slow else ({}, slow)

    def of_wanted(params: Params, examples: Any) -> Tensor:
        return loss({**left, **params}, examples)

    product = hessian_vector_product(
        of_wanted, point.fast, wanted, support, gradient_bar, forward=forward
    )
    fast = {name: value + product[name] for name, value in before.fast.items()}
    point_bar, slow_bar = Point(fast, before.slots), {name: product[name] for name in wanted}
    return Adjoint(point_bar, slow_bar, rates_bar, {} if with_slow else gradient_bar)


def slow_back_at_once(loss: Loss, fast: Params, slow: Params, support: Any, v: Params) -> Params:
    """What all steps give the parameters that are not adapted, in one go: the gradient of
    Σ_s ∇_fast L_S(θ_s) · v_s with respect to `slow`; `fast` and `v` hold θ_s and v_s, [S, ...].

    Mapped over the steps, whatever comes before the adapted parameters is computed once, there and
    back: where the head adapts, all of the body.
    """

    def of_slow(slow: Params) -> Tensor:
        def at_step(fast: Params, v: Params) -> Tensor:
            gradient = grad(lambda at: loss({**slow, **at}, support))(fast)
            return torch.stack([(gradient[name] * v[name]).sum() for name in v]).sum()

        return vmap(at_step)(fast, v).sum()

    of_all_steps: Params = grad(of_slow)(slow)
    return of_all_steps


def can_go_back_at_once(loss: Loss, fast: Params, slow: Params, support: Any) -> bool:
    """Whether `slow_back_at_once` gives what the steps one by one give, tried on a batch of tasks.

    Some second derivatives of torch (that of `mse_loss`) raise an error where only some of their
    arguments are mapped over; that the values agree is a precaution. Two steps and numbers that
    are no matter of chance are enough to see it.
    """
    steps = 2

    def some(like: Tensor, *leading: int) -> Tensor:
        shape = (*leading, *like.shape)
        return torch.arange(math.prod(shape), device=like.device).to(like).cos().reshape(shape)

    points = {name: some(value, steps) for name, value in fast.items()}
    others = {name: some(value) for name, value in slow.items()}

    def one_by_one(examples: Any) -> list[Params]:
        at = [{name: value[s] for name, value in points.items()} for s in range(steps)]
        back = partial(hessian_vector_product, loss, slow=others, support=examples, forward=False)
        return [back(point, v=point) for point in at]

    def at_once(examples: Any) -> Params:
        return slow_back_at_once(loss, points, others, examples, points)

    try:
        found = vmap(at_once)(support)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    expected = vmap(one_by_one)(support)
    totals = {name: torch.stack([each[name] for each in expected]).sum(0) for name in slow}
    largest = max(float(total.abs().max()) for total in totals.values())

    def agree(name: str, total: Tensor) -> bool:
        # The gradient of a bias before a normalisation is rounding errors alone.
        tolerance = max(1e-3 * float(total.abs().max()), 1e-5 * largest)
        return torch.allclose(found[name], total, rtol=0, atol=tolerance)

    return all(agree(name, total) for name, total in totals.items())


def hessian_vector_product(
    loss: Loss, fast: Params, slow: Params, support: Any, v: Params, *, forward: bool = True
) -> Params:
    """The Hessian's columns of `fast` times v: the gradient of ∇_fast L · v, for all parameters.

    By forward differentiation of the reverse-mode gradient (Pearlmutter 1994): nothing but the
    parameters and v has to be kept from the way forward, so memory does not grow with activations
    of all steps. Not `forward`: by differentiating in reverse twice, for models and losses with an
    operation that has no forward derivative (see `differentiates_forward`).
    """

    def of_all(fast: Params, slow: Params) -> Tensor:
        return loss({**slow, **fast}, support)

    if forward:
        gradients = grad(of_all, argnums=(0, 1))
        of_fast, of_slow = jvp(lambda at: gradients(at, slow), (fast,), (v,))[1]
    else:
        of_fast, of_slow = vjp(grad(of_all), fast, slow)[1](v)
    return {**of_slow, **of_fast}


def differentiates_forward(loss: Loss, params: Params, support: Any) -> bool:
    """Whether the gradient of `loss` has a forward derivative, tried on a batch of tasks: under
    `vmap`, because some derivatives of torch fail only there."""
    product = vmap(lambda examples: hessian_vector_product(loss, params, {}, examples, params))
    return has_forward_derivatives(lambda: product(support))


def has_forward_derivatives(computation: Callable[[], object]) -> bool:
    """Whether something that differentiates forward can be computed.

    To be tried before anything is traced: a failure inside a trace cannot be recovered from.
    """
    with warnings.catch_warnings():
        # torch's forward derivatives are its own last users of the deprecated torch.jit.script.
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401
    try:
        computation()
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


class Stages(NamedTuple):
    """The computations of a meta-gradient, each over all tasks of a chunk.

    `shared` says that the point is θ itself, not yet one copy per task: then the first step runs as
    one large batch instead of B small ones.
    """

    step: Callable[..., InnerStep]
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
        ) -> InnerStep:
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
