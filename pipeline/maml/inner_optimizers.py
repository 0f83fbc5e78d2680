"""Inner optimisers as pure functions, differentiable with respect to all their inputs.

An inner optimiser maps (point, gradient, rates, t) to the next point. A point holds the adapted
parameters and what the optimiser remembers of earlier steps (its slots, zero before the first
step). The formulas are those of torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.maml.flat_vector import Params

InnerOptimizerName = Literal["sgd", "momentum", "adam"]


class Point(NamedTuple):
    """The state of adaptation to a task between two steps."""

    fast: Params
    """The adapted parameters."""
    slots: dict[str, Params]
    """What the optimiser remembers of each parameter, by slot: "velocity", "mean", "square"."""


class InnerOptimizer(NamedTuple):
    """An inner optimiser."""

    slots: tuple[str, ...]
    """Names of the slots that a point of this optimiser has."""
    update: Callable[[Point, Params, Params, Tensor], Point]
    """(point, gradient, rates, t) -> next point. A rate is a scalar or has the parameter's shape;
    t = 1, 2, ... is the number of the step, a scalar tensor."""

    def start(self, fast: Params) -> Point:
        """The point before the first step: these parameters, all slots zero."""
        zeros = {name: torch.zeros_like(value) for name, value in fast.items()}
        return Point(fast, dict.fromkeys(self.slots, zeros))


def build_inner_optimizer(
    name: InnerOptimizerName, momentum: float = 0.9, beta1: float = 0.9
) -> InnerOptimizer:
    """The inner optimiser with this name. `momentum` is that of "momentum", `beta1` that of "adam";
    the others ignore them."""
    if name == "momentum":
        return _momentum(momentum)
    return _adam(beta1) if name == "adam" else SGD


def _sgd(point: Point, gradient: Params, rates: Params, t: Tensor) -> Point:
    """θ' = θ − α g (eq. 2)."""
    return Point({n: p - rates[n] * gradient[n] for n, p in point.fast.items()}, {})


SGD = InnerOptimizer((), _sgd)


def _momentum(mu: float) -> InnerOptimizer:
    """v' = μ v + g, θ' = θ − α v'."""

    def update(point: Point, gradient: Params, rates: Params, t: Tensor) -> Point:
        velocity = {n: mu * v + gradient[n] for n, v in point.slots["velocity"].items()}
        fast = {n: p - rates[n] * velocity[n] for n, p in point.fast.items()}
        return Point(fast, {"velocity": velocity})

    return InnerOptimizer(("velocity",), update)


def _adam(beta1: float, beta2: float = 0.999, epsilon: float = 1e-8) -> InnerOptimizer:
    """Adam (Kingma and Ba 2015, algorithm 1)."""

    def update(point: Point, gradient: Params, rates: Params, t: Tensor) -> Point:
        mean, square, fast = {}, {}, {}
        for n, p in point.fast.items():
            g = gradient[n]
            mean[n] = beta1 * point.slots["mean"][n] + (1 - beta1) * g
            square[n] = beta2 * point.slots["square"][n] + (1 - beta2) * g * g
            size = _safe_sqrt(square[n] / (1 - beta2**t)) + epsilon
            fast[n] = p - rates[n] * (mean[n] / (1 - beta1**t)) / size
        return Point(fast, {"mean": mean, "square": square})

    return InnerOptimizer(("mean", "square"), update)


def _safe_sqrt(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0.

    A weight whose gradients were all zero (of a dead unit) has x = 0, where the true derivative is
    infinite; times zero it would make the meta-gradient NaN.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
