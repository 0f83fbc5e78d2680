"""Adaptation to one task, θ -> θ'_K (eq. 2), and the way back (the chain rule through it).

Everything here is a pure function of one task; `meta_gradient` maps it over all tasks of a chunk.
"""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from pipeline.meta_loss import Loss
from pipeline.parameters import Params
from tasks.base import Examples


def inner_step(
    loss: Loss, params: Params, support: Examples, alpha: Tensor
) -> tuple[Params, Tensor]:
    """One gradient step, θ_{s+1} = θ_s − α ∇L(θ_s) (eq. 2); also returns L(θ_s)."""
    gradient, value = grad_and_value(loss)(params, support)
    return {name: p - alpha * gradient[name] for name, p in params.items()}, value


def inner_step_back(
    loss: Loss, params: Params, support: Examples, alpha: Tensor, v: Params, *, forward: bool = True
) -> Params:
    """Carries a gradient back through one step: v_s = (I − α H_s) v_{s+1}, H_s = ∇²L(θ_s).

    `v` is the gradient of some function of θ_{s+1} with respect to θ_{s+1}; the result is its
    gradient with respect to θ_s.
    """
    product = hessian_vector_product(loss, params, support, v, forward=forward)
    return {name: v[name] - alpha * product[name] for name in v}


def hessian_vector_product(
    loss: Loss, params: Params, support: Examples, v: Params, *, forward: bool = True
) -> Params:
    """∇²L(θ)·v by forward differentiation of the reverse-mode gradient (Pearlmutter 1994).

    Nothing but θ_s and v_{s+1} has to be kept from the way forward, so memory does not grow with
    the number of steps. Not `forward`: by differentiating in reverse twice, for models and losses
    with an operation that has no forward derivative (see `differentiates_forward`).
    """

    def gradient(at: Params) -> Params:
        result: Params = grad(loss)(at, support)
        return result

    if forward:
        product: Params = jvp(gradient, (params,), (v,))[1]
    else:
        product = vjp(gradient, params)[1](v)[0]
    return product


def differentiates_forward(loss: Loss, params: Params, support: Examples) -> bool:
    """Whether the gradient of `loss` has a forward derivative, tried on a batch of tasks.

    Tried before anything is traced, because a failure inside a trace cannot be recovered from, and
    under `vmap`, because some derivatives of torch fail only there.
    """
    with warnings.catch_warnings():
        # torch's forward derivatives are its own last users of the deprecated torch.jit.script.
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401
    try:
        vmap(lambda examples: hessian_vector_product(loss, params, examples, params))(support)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True
