"""What adaptation changes, at which rates, by which optimiser: the choices that make an algorithm.

    MAML       adapts every parameter, at one fixed rate
    ANIL       adapts the head alone; BOIL adapts the body alone
    Meta-SGD   learns a rate for every single number of every parameter
    MAML++     learns a rate per layer and step; does not adapt normalisation, but learns one set
               of its parameters for every step

`pipeline.config.algorithms` names the papers and their equations.

*Meta-parameters* are all tensors that the outer loop learns: the parameters of the model (those
with a value per step have a leading dimension S), and learned rates under `inner_lr.NAME`. A step
uses them in three roles: `fast` parameters are adapted (only the first step reads their
meta-parameters), `slow` parameters are used and not adapted, and `rates` multiply gradients.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_optimizers import SGD, InnerOptimizer, Point

Rates = Literal["fixed", "per-layer-and-step", "per-parameter"]
RATE = "inner_lr."
"""The name of a learned rate is this prefix and the name of the parameter."""


class StepInputs(NamedTuple):
    """What a step of adaptation takes from the meta-parameters; the same for all tasks."""

    slow: Params
    """The parameters that the step uses and does not adapt."""
    rates: Params
    """The rate of each adapted parameter: a scalar, or a tensor of the parameter's shape."""
    t: Tensor
    """The number of the step, 1, 2, ..., as a scalar tensor."""


@dataclass(frozen=True)
class Adaptation:
    """How S steps of adaptation turn θ into θ'_S, apart from the loss."""

    steps: int
    """S, the number of steps in meta-training. Steps beyond S use the settings of step S."""
    fast: tuple[str, ...]
    """Names of the adapted parameters."""
    per_step: frozenset[str] = frozenset()
    """Names of the meta-parameters that have one value per step."""
    rates: Rates = "fixed"
    optimizer: InnerOptimizer = SGD
    batch_size: int | None = None
    """How many support examples a step uses, in turns. None: every step uses all."""
    later_factor: float = 1.0
    """The rates of steps beyond S are multiplied by this."""

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
        optimizer: InnerOptimizer | None = None,
        batch_size: int | None = None,
        later_factor: float = 1.0,
    ) -> Adaptation:
        """The adaptation of a model, in so many steps.

        `adapted` minus `not_adapted` are the parameters that adapt; those of `per_step` have a
        value for every step. Each is named by a group (all; head, the last layer that has
        parameters; body, all but the head; normalisation) or by a pattern such as `*.weight`.
        `rates` says which inner rates are learned, `optimizer` what makes a step of a gradient
        (None: plain gradient descent), `batch_size` how many support examples a step uses, in turns
        (None: all); the rates of steps beyond `steps` are multiplied by `later_factor`.

        Raises ValueError if a pattern matches nothing, if no parameter is left to adapt, or if a
        parameter both adapts and has a value per step. The message begins with the name of the
        setting.
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
        return cls(steps, fast, stepwise, rates, optimizer or SGD, batch_size, later_factor)

    @property
    def learns_rates(self) -> bool:
        """Whether rates are meta-parameters."""
        return self.rates != "fixed"

    def meta_parameters(self, params: Mapping[str, Tensor], alpha: float) -> Params:
        """The initial meta-parameters: `params` of the model, and learned rates equal to `alpha`.

        Parameters with a value per step are repeated S times. Tensors are on the device and in the
        precision of `params`.
        """
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
        """The adapted parameters before the first step, the same for all tasks."""
        return {name: meta[name] for name in self.fast}

    def start_point(self, meta: Params, num_tasks: int | None = None) -> Point:
        """The point before the first step: θ, or with `num_tasks` a view of θ for every task, each
        tensor [B, ...]."""
        fast = self.start(meta)
        if num_tasks is not None:
            fast = {name: value.expand(num_tasks, *value.shape) for name, value in fast.items()}
        return self.optimizer.start(fast)

    def at(self, meta: Params, alpha: Tensor, step: int) -> StepInputs:
        """What step `step` (0, 1, ...) takes from the meta-parameters.

        `alpha` is the fixed inner rate, a scalar; where rates are learned, it only says on which
        device and in which precision `t` is.
        """
        return StepInputs(
            self.slow(meta, step), self._rates(meta, alpha, step), alpha.new_tensor(step + 1.0)
        )

    def slow(self, meta: Params, step: int) -> Params:
        """The parameters that step `step` (0, 1, ...) uses and does not adapt."""
        fast = set(self.fast)
        return {
            name: self._at(name, value, step)
            for name, value in meta.items()
            if name not in fast and not name.startswith(RATE)
        }

    def slow_after(self, meta: Params, steps: int) -> Params:
        """The parameters that are not adapted, as the query set is evaluated with them after so
        many steps."""
        return self.slow(meta, last_step(steps))

    def adapts_last_layers(self, meta: Params) -> bool:
        """Whether the adapted parameters come after all others in the model's order, are fewer
        than half of all numbers, and the others are the same in every step.

        The answer decides only how gradients are computed (see
        `inner_loop.slow_gradient_of_all_steps`), not what they are: the order of names is a guess
        at the order of the computation.
        """
        params = {name: value for name, value in meta.items() if not name.startswith(RATE)}
        adapts = [name in self.fast for name in params]
        fewer = 2 * sum(params[name].numel() for name in self.fast) < sum(
            value.numel() for value in params.values()
        )
        stepwise = any(not name.startswith(RATE) for name in self.per_step)
        return fewer and adapts == sorted(adapts) and not stepwise

    def _rates(self, meta: Params, alpha: Tensor, step: int) -> Params:
        if self.learns_rates:
            rates = {name: self._at(RATE + name, meta[RATE + name], step) for name in self.fast}
        else:
            rates = dict.fromkeys(self.fast, alpha)
        # A policy that was trained without steps (S = 0) takes its first step at the full rate.
        if step < max(self.steps, 1) or self.later_factor == 1:
            return rates
        return {name: self.later_factor * rate for name, rate in rates.items()}

    def _at(self, name: str, value: Tensor, step: int) -> Tensor:
        return value[min(step, self.steps - 1)] if name in self.per_step else value


def last_step(steps: int) -> int:
    """The number (0, 1, ...) of the last of `steps` steps; before any step, the first one's."""
    return max(steps - 1, 0)


class MetaSum:
    """Adds up gradients with respect to meta-parameters, over tasks and over steps."""

    def __init__(self, adaptation: Adaptation):
        self._adaptation = adaptation
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, contribution: Params, step: int, prefix: str = "") -> None:
        """Add gradients per task, [B, ...], with respect to the parameters of a step.

        `prefix` turns the names of `contribution` into names of meta-parameters: `RATE` for rates.
        """
        for name, value in contribution.items():
            stepwise = prefix + name in self._adaptation.per_step
            key = (prefix + name, step if stepwise else 0)
            total = value.sum(0)
            self._sums[key] = self._sums[key] + total if key in self._sums else total

    def add_after(self, contribution: Params, steps: int) -> None:
        """Add gradients per task, [B, ...], with respect to `Adaptation.slow_after` so many
        steps."""
        self.add(contribution, last_step(steps))

    def gradient(self, meta: Params) -> Params:
        """The sums, in the shapes of the meta-parameters; zeros where nothing was added."""
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
    """Names of the model's parameters that `wanted` names, in the model's order.

    An element of `wanted` is a group or a pattern such as `*.weight`. The groups are: all; head,
    the last layer that has parameters; body, all parameters but those of the head; normalisation,
    the parameters of layers whose class name contains "Norm". A group may be empty.

    Raises ValueError if a pattern matches no parameter, if the model has no parameters, or if head
    or body is wanted and the last parameter belongs to no layer. The message begins with `setting`.
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
