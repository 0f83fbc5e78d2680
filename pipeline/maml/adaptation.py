"""What adaptation changes, at which rates, by which rule: the choices that make an algorithm.

    MAML       every parameter, one fixed rate
    ANIL       the head alone; BOIL the body alone
    Meta-SGD   a learned rate for every single parameter
    MAML++     a learned rate per layer and step; normalisation is not adapted and differs by step

The *meta-parameters* are all that the outer loop learns: the model's parameters (those with a value
per step have a leading dimension S), and learned rates under `inner_lr.NAME`. At step s they fall
into three groups: `fast` (where adaptation starts; only step 0 looks at them), `slow` (used, but
not adapted) and `rates`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.maml.parameters import Params
from pipeline.maml.update_rules import SGD, Rule

Rates = Literal["fixed", "per-layer-and-step", "per-parameter"]
RATE = "inner_lr."


@dataclass(frozen=True)
class Adaptation:
    """How θ becomes θ'_S, apart from the loss."""

    steps: int
    """S, the number of steps in meta-training; later steps repeat the settings of the last one."""
    fast: tuple[str, ...]
    """Names of the adapted parameters."""
    per_step: frozenset[str] = frozenset()
    """Names of meta-parameters with one value per step."""
    rates: Rates = "fixed"
    rule: Rule = SGD
    batch_size: int | None = None
    """Support examples per step, in turns; None: all of them."""
    later_factor: float = 1.0
    """On the rates of steps beyond the trained ones."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        steps: int,
        adapted: Sequence[str] = ("all",),
        not_adapted: Sequence[str] = (),
        per_step: Sequence[str] = (),
        rates: Rates = "fixed",
        rule: Rule | None = None,
        batch_size: int | None = None,
        later_factor: float = 1.0,
    ) -> Adaptation:
        """Choices for a model, parameters named by groups or patterns (see `matching`).

        Raises ValueError that begins with the setting's name.
        """
        chosen = matching(model, adapted, "adapted")
        left_out = matching(model, not_adapted, "not_adapted")
        fast = tuple(name for name in chosen if name not in left_out)
        if not fast:
            raise ValueError("adapted: no parameter is left to adapt")
        stepwise = frozenset(matching(model, per_step, "per_step"))
        if both := sorted(stepwise & set(fast)):
            raise ValueError(
                f"per_step: {', '.join(both[:3])} cannot have a value for every step and also "
                "adapt from step to step; add them to inner.not_adapted"
            )
        if rates == "per-layer-and-step":
            stepwise |= {RATE + name for name in fast}
        return cls(steps, fast, stepwise, rates, rule or SGD, batch_size, later_factor)

    @property
    def learns_rates(self) -> bool:
        """Whether rates are meta-parameters."""
        return self.rates != "fixed"

    def meta_parameters(self, params: Mapping[str, Tensor], alpha: float) -> Params:
        """All that is learned, at the start: `params` of the model, learned rates at `alpha`."""
        meta = {}
        for name, value in params.items():
            value = value.detach()
            if name in self.per_step:
                value = value.expand(self.steps, *value.shape).clone()
            meta[name] = value
        if self.rates == "per-layer-and-step":
            rate = {name: params[name].new_full((self.steps,), alpha) for name in self.fast}
        else:
            rate = {name: torch.full_like(params[name], alpha) for name in self.fast}
        if self.learns_rates:
            meta |= {RATE + name: value.detach() for name, value in rate.items()}
        return meta

    def start(self, meta: Params) -> Params:
        """The adapted parameters before the first step."""
        return {name: meta[name] for name in self.fast}

    def slow(self, meta: Params, step: int) -> Params:
        """What a step uses and does not adapt."""
        fast = set(self.fast)
        return {
            name: self._at(name, value, step)
            for name, value in meta.items()
            if name not in fast and not name.startswith(RATE)
        }

    def adapts_last_layers(self, meta: Params) -> bool:
        """Whether the adapted parameters come after the others, in the order in which the model
        names them, are the smaller part, and the others are the same in every step.

        A guess at what computations share, never at what they give.
        """
        params = {name: value for name, value in meta.items() if not name.startswith(RATE)}
        adapts = [name in self.fast for name in params]
        fewer = 2 * sum(params[name].numel() for name in self.fast) < sum(
            value.numel() for value in params.values()
        )
        stepwise = any(not name.startswith(RATE) for name in self.per_step)
        return fewer and adapts == sorted(adapts) and not stepwise

    def rates_at(self, meta: Params, alpha: Tensor, step: int) -> Params:
        """The rate of every adapted parameter in a step."""
        if self.learns_rates:
            rates = {name: self._at(RATE + name, meta[RATE + name], step) for name in self.fast}
        else:
            rates = dict.fromkeys(self.fast, alpha)
        # A policy trained without steps takes its first one as one that was trained with it does.
        if step < max(self.steps, 1) or self.later_factor == 1:
            return rates
        return {name: self.later_factor * rate for name, rate in rates.items()}

    def _at(self, name: str, value: Tensor, step: int) -> Tensor:
        return value[min(step, self.steps - 1)] if name in self.per_step else value


class MetaSum:
    """Collects gradients with respect to meta-parameters, step by step."""

    def __init__(self, adaptation: Adaptation):
        self._adaptation = adaptation
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, contribution: Params, step: int, prefix: str = "") -> None:
        """Gradients per task, [B, ...], of what `slow`, `rates_at` or `start` gave for a step."""
        for name, value in contribution.items():
            stepwise = prefix + name in self._adaptation.per_step
            key = (prefix + name, step if stepwise else 0)
            total = value.sum(0)
            self._sums[key] = self._sums[key] + total if key in self._sums else total

    def gradient(self, meta: Params) -> Params:
        """The sums, in the shapes of the meta-parameters."""
        result = {}
        for name, value in meta.items():
            if name in self._adaptation.per_step:
                steps = range(self._adaptation.steps)
                parts = [self._sums.get((name, s), torch.zeros_like(value[s])) for s in steps]
                result[name] = torch.stack(parts)
            else:
                result[name] = self._sums.get((name, 0), torch.zeros_like(value))
        return result


def matching(model: nn.Module, wanted: Sequence[str], setting: str) -> tuple[str, ...]:
    """Names of the model's parameters that belong to any of the groups or match any of the patterns
    (`*.weight`), in the model's order.

    Groups: all; head, the last layer that has parameters; body, all but the head; normalisation,
    scales and biases of normalisation layers. A group may be empty; raises ValueError for a pattern
    that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise ValueError(f"{setting}: the model has no parameters")
    head = names[-1].rpartition(".")[0]
    if not head and {"head", "body"} & set(wanted):
        raise ValueError(
            f"{setting}: the model's last parameter, {names[-1]}, belongs to no layer, so there is "
            "no head and no body; name parameters by patterns"
        )
    heads = [name for name in names if name.rpartition(".")[0] == head]
    norms = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    ]
    groups = {
        "all": names,
        "head": heads,
        "body": [name for name in names if name not in heads],
        "normalisation": norms,
    }
    found: set[str] = set()
    for each in wanted:
        matched = groups.get(each, fnmatch.filter(names, each))
        if not matched and each not in groups:
            raise ValueError(
                f"{setting}: {each!r} matches no parameter; there are the groups "
                f"{', '.join(groups)} and the names {', '.join(names)}"
            )
        found.update(matched)
    return tuple(name for name in names if name in found)
