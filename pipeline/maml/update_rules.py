"""Inner optimisers: pure functions of parameters and gradient, differentiable through and through.

A rule takes (point, gradient, rates, t) to the next point, where a point holds the adapted
parameters and whatever the rule remembers of earlier steps (its slots, zero before the first one).
The numbers are those of torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.maml.parameters import Params

RuleName = Literal["sgd", "momentum", "adam"]


class Point(NamedTuple):
    """Where adaptation to a task stands."""

    fast: Params
    """The adapted parameters."""
    slots: dict[str, Params]
    """What the rule remembers, by its name for it."""


class Rule(NamedTuple):
    """An inner optimiser."""

    slots: tuple[str, ...]
    update: Callable[[Point, Params, Params, Tensor], Point]
    """(point, gradient, rate of every parameter, number t = 1, 2, ... of the step) -> next point"""

    def start(self, fast: Params) -> Point:
        """The point before the first step."""
        zeros = {name: torch.zeros_like(value) for name, value in fast.items()}
        return Point(fast, dict.fromkeys(self.slots, zeros))


def build_rule(name: RuleName, momentum: float = 0.9, beta1: float = 0.9) -> Rule:
    """The rule of a name; `momentum` and `beta1` where it has such."""
    if name == "momentum":
        return _momentum(momentum)
    return _adam(beta1) if name == "adam" else SGD


def _sgd(point: Point, gradient: Params, rates: Params, t: Tensor) -> Point:
    return Point({n: p - rates[n] * gradient[n] for n, p in point.fast.items()}, {})


SGD = Rule((), _sgd)


def _momentum(mu: float) -> Rule:
    def update(point: Point, gradient: Params, rates: Params, t: Tensor) -> Point:
        velocity = {n: mu * v + gradient[n] for n, v in point.slots["velocity"].items()}
        fast = {n: p - rates[n] * velocity[n] for n, p in point.fast.items()}
        return Point(fast, {"velocity": velocity})

    return Rule(("velocity",), update)


def _adam(beta1: float, beta2: float = 0.999, epsilon: float = 1e-8) -> Rule:
    def update(point: Point, gradient: Params, rates: Params, t: Tensor) -> Point:
        mean, square, fast = {}, {}, {}
        for n, p in point.fast.items():
            g = gradient[n]
            mean[n] = beta1 * point.slots["mean"][n] + (1 - beta1) * g
            square[n] = beta2 * point.slots["square"][n] + (1 - beta2) * g * g
            size = _safe_sqrt(square[n] / (1 - beta2**t)) + epsilon
            fast[n] = p - rates[n] * (mean[n] / (1 - beta1**t)) / size
        return Point(fast, {"mean": mean, "square": square})

    return Rule(("mean", "square"), update)


def _safe_sqrt(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0: a weight that has seen no gradient (a dead unit) must not turn the
    meta-gradient into 0·∞."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
