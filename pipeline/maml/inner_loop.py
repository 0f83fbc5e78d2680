"""One step of adaptation to a task (eq. 2), and the chain rule back through it.

The functions are pure functions of one task; `Stages` maps them over all tasks of a chunk (`vmap`).
Parameters come in two groups: `fast` parameters are adapted and stand in a `Point`; `slow`
parameters are used and not adapted.
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

from pipeline.maml.adaptation import Adaptation, StepInputs
from pipeline.maml.compilation import Compiler
from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_optimizers import InnerOptimizer, Point
from pipeline.maml.meta_loss import Loss, TaskLoss

Order = Literal["second", "first"]


class InnerStep(NamedTuple):
    """The result of one step of adaptation."""

    point: Point
    """The point after the step."""
    gradient: Params
    """∇L_S before the step; the backward pass needs it again."""
    loss: Tensor
    """L_S before the step, a scalar per task."""


class Adjoint(NamedTuple):
    """Gradients of a function of the point after a step, with respect to the step's inputs."""

    point: Point
    slow: Params
    """Empty where `slow_gradient_of_all_steps` computes it for all steps."""
    rates: Params
    """Empty where rates are not learned."""
    gradient_bar: Params
    """With respect to the inner gradient, for `slow_gradient_of_all_steps`; else empty."""


def inner_step(
    loss: Loss, optimizer: InnerOptimizer, point: Point, inputs: StepInputs, support: Any
) -> InnerStep:
    """Take one step; with plain gradient descent θ_{s+1} = θ_s − α ∇L(θ_s) (eq. 2)."""

    def of_fast(fast: Params) -> Tensor:
        return loss({**inputs.slow, **fast}, support)

    gradient, value = grad_and_value(of_fast)(point.fast)
    return InnerStep(optimizer.update(point, gradient, inputs.rates, inputs.t), gradient, value)


def inner_step_back(
    loss: Loss,
    optimizer: InnerOptimizer,
    point: Point,
    gradient: Params,
    inputs: StepInputs,
    support: Any,
    v: Point,
    *,
    second_order: bool,
    learns_rates: bool,
    with_slow: bool = True,
    forward: bool = True,
) -> Adjoint:
    """Carry a gradient back through one step.

    `point` and `gradient` are the point before the step and the inner gradient there; `v` is the
    gradient of some function with respect to the point after the step. The result is the gradient
    of that function with respect to the inputs of the step. With plain gradient descent
    v_s = (I − α H_s) v_{s+1}, where H_s = ∇²L(θ_s).

    First order (`second_order` is false) treats the inner gradient as a constant. Without
    `with_slow`, `slow_gradient_of_all_steps` computes the gradient of the slow parameters.
    `forward` is that of `hessian_vector_product`.
    """
    slow, rates, t = inputs
    if learns_rates:
        pull = vjp(lambda p, g, r: optimizer.update(p, g, r, t), point, gradient, rates)[1]
        before, gradient_bar, rates_bar = pull(v)
    else:
        pull = vjp(lambda p, g: optimizer.update(p, g, rates, t), point, gradient)[1]
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


def slow_gradient_of_all_steps(
    loss: Loss, fast: Params, slow: Params, support: Any, v: Params
) -> Params:
    """The gradient of the slow parameters from all S steps: that of Σ_s ∇_fast L_S(θ_s) · v_s.

    `fast` holds θ_s and `v` the gradients with respect to the inner gradients, each [S, ...].

    The steps are mapped by `vmap`, so layers before the adapted ones run once, forward and
    backward, instead of S times: where only the head adapts, that is the whole body.
    """

    def of_slow(slow: Params) -> Tensor:
        def at_step(fast: Params, v: Params) -> Tensor:
            gradient = grad(lambda at: loss({**slow, **at}, support))(fast)
            return torch.stack([(gradient[name] * v[name]).sum() for name in v]).sum()

        return vmap(at_step)(fast, v).sum()

    of_all_steps: Params = grad(of_slow)(slow)
    return of_all_steps


def matches_single_steps(loss: Loss, fast: Params, slow: Params, support: Any) -> bool:
    """Whether `slow_gradient_of_all_steps` gives the same gradient as the steps one by one.

    It is tried on a batch of tasks, with two steps and fixed numbers for parameters. Some second
    derivatives of torch (that of `mse_loss`) raise an error where only some of their arguments are
    mapped; the values are compared as a precaution.
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
        return slow_gradient_of_all_steps(loss, points, others, examples, points)

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
    """The gradient of ∇_fast L · v with respect to all parameters, `fast` and `slow`.

    With `forward`, torch differentiates the reverse-mode gradient forward (Pearlmutter 1994), which
    keeps no activations of earlier steps. Without it, torch differentiates in reverse twice; models
    and losses with an operation that has no forward derivative need that.
    """

    def of_all(fast: Params, slow: Params) -> Tensor:
        return loss({**slow, **fast}, support)

    if forward:
        gradients = grad(of_all, argnums=(0, 1))
        of_fast, of_slow = jvp(lambda at: gradients(at, slow), (fast,), (v,))[1]
    else:
        of_fast, of_slow = vjp(grad(of_all), fast, slow)[1](v)
    return {**of_slow, **of_fast}


def forward_mode_succeeds(computation: Callable[[], object]) -> bool:
    """Whether a computation that differentiates forward succeeds.

    Call this outside of any trace (`make_fx`): an error inside a trace cannot be caught safely.
    Raises nothing for an operation without a forward derivative; other errors than RuntimeError
    pass through.
    """
    with warnings.catch_warnings():
        # torch's forward derivatives are its own last users of the deprecated torch.jit.script;
        # which of the two warnings it gives differs between its versions.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401
    try:
        computation()
    except RuntimeError:  # NotImplementedError is a subclass
        return False
    return True


class Stages(NamedTuple):
    """The four computations of a meta-gradient, each over all B tasks of a chunk.

    Arguments have the leading dimension B, but for `StepInputs` and `slow`, which all tasks share.
    `shared` says that the point is θ itself, without the dimension B: the first step then runs as
    one large batch instead of B small ones.
    """

    step: Callable[[Point, StepInputs, Any, bool], InnerStep]
    """(point, inputs, support, shared) -> `inner_step`"""
    query: Callable[[Params, Params, Any], Any]
    """(fast, slow, query) -> ((gradient of fast, gradient of slow), (loss, metrics))"""
    step_back: Callable[[Point, Params, StepInputs, Any, Point, bool], Adjoint]
    """(point, gradient, inputs, support, v, shared) -> `inner_step_back`"""
    slow_back: Callable[[Params, Params, Any, Params], Params] | None = None
    """(fast [S, B, ...], slow, support, v [S, B, ...]) -> `slow_gradient_of_all_steps`. None where
    `step_back` computes the gradients of the slow parameters."""

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
        """The stages of an objective, uncompiled.

        `forward` is that of `hessian_vector_product`. `at_once` uses `slow_gradient_of_all_steps`;
        `meta_gradient.at_once_applies` says whether that gives the right gradient.
        """
        at_once = at_once and order == "second"
        step_back = partial(
            inner_step_back,
            objective.loss,
            adaptation.optimizer,
            second_order=order == "second",
            learns_rates=adaptation.learns_rates,
            with_slow=not at_once,
            forward=forward,
        )
        return cls(
            _step_of_tasks(partial(inner_step, objective.loss, adaptation.optimizer)),
            _query_of_tasks(objective),
            _step_back_of_tasks(step_back),
            _slow_back_of_tasks(objective.loss) if at_once else None,
        )

    def compiled(self, compiler: Compiler) -> Stages:
        """The same stages, each a compiled program of its own."""
        stages = {name: compiler.compiled(stage) for name, stage in self._asdict().items() if stage}
        return Stages(**stages)


def _step_of_tasks(
    one: Callable[[Point, StepInputs, Any], InnerStep],
) -> Callable[[Point, StepInputs, Any, bool], InnerStep]:
    def step(point: Point, inputs: StepInputs, support: Any, shared: bool) -> InnerStep:
        found: InnerStep = vmap(one, in_dims=(None if shared else 0, None, 0))(
            point, inputs, support
        )
        return found

    return step


def _query_of_tasks(objective: TaskLoss) -> Callable[[Params, Params, Any], Any]:
    def loss(fast: Params, slow: Params, examples: Any) -> Any:
        return objective.loss_and_metrics({**slow, **fast}, examples)

    def query(fast: Params, slow: Params, examples: Any) -> Any:
        one = grad_and_value(loss, argnums=(0, 1), has_aux=True)
        return vmap(one, in_dims=(0, None, 0))(fast, slow, examples)

    return query


def _step_back_of_tasks(
    one: Callable[[Point, Params, StepInputs, Any, Point], Adjoint],
) -> Callable[[Point, Params, StepInputs, Any, Point, bool], Adjoint]:
    def step_back(
        point: Point, gradient: Params, inputs: StepInputs, support: Any, v: Point, shared: bool
    ) -> Adjoint:
        found: Adjoint = vmap(one, in_dims=(None if shared else 0, 0, None, 0, 0))(
            point, gradient, inputs, support, v
        )
        return found

    return step_back


def _slow_back_of_tasks(loss: Loss) -> Callable[[Params, Params, Any, Params], Params]:
    def all_steps_back(fast: Params, slow: Params, support: Any, v: Params) -> Params:
        one = partial(slow_gradient_of_all_steps, loss)
        found: Params = vmap(one, in_dims=(1, None, 0, 1))(fast, slow, support, v)
        return found

    return all_steps_back
