"""Rules about several sections of an experiment at once: (where, when, why).

`settings` holds the rules that speak of one section. The sets of this file apply to experiments of
one kind each; `when` is asked of the whole experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.section import Rule
from pipeline.config.settings import Outer

_ANY = (
    Rule(
        "outer.query_losses",
        lambda e: not isinstance(e.outer.query_losses, str) and not _weighs_every_step(e),
        lambda e: (
            f"needs a weight of at least 0 for each of inner.steps ({e.inner.steps}), not all 0, "
            f"got {list(e.outer.query_losses)}"
        ),
    ),
    Rule(
        "outer.weight_decay",
        lambda e: e.outer.weight_decay and e.inner.rates != "fixed",
        "would pull the learned inner.rates to zero",
    ),
)
_REPTILE = (
    Rule("inner.order", lambda e: e.inner.order != "first", "reptile has no second order"),
    Rule(
        "inner.rates",
        lambda e: e.inner.rates != "fixed",
        "reptile has no gradient by which rates could be learned",
    ),
    Rule(
        "inner.per_step",
        lambda e: e.inner.per_step,
        "reptile has no gradient for what does not adapt",
    ),
    Rule(
        "outer.query_losses",
        lambda e: e.outer.query_losses != "last",
        "reptile uses no query losses",
    ),
)
_PRETRAINING = (
    Rule(
        "algorithm",
        lambda e: e.algorithm != "maml",
        "pretraining does not meta-learn",
    ),
    Rule("inner.rates", lambda e: e.inner.rates != "fixed", "pretraining learns no inner rates"),
    Rule("inner.per_step", lambda e: e.inner.per_step, "pretraining has no inner steps"),
    Rule("diagnostics.every", lambda e: e.diagnostics.every, "pretraining has no meta-gradient"),
    Rule(
        "search",
        lambda e: e.search is not None,
        "tries meta-learning only, not pretraining",
    ),
)
_SUPERVISED = (Rule("inner.steps", lambda e: not e.inner.steps, "must be at least 1, got 0"),)
_REINFORCEMENT = (
    Rule(
        "outer.direction",
        lambda e: e.outer.direction == "reptile",
        "reptile is for supervised tasks",
    ),
    Rule(
        "outer.query_losses",
        lambda e: e.outer.query_losses != "last",
        "query trajectories are collected after the last step alone",
    ),
    Rule(
        "inner.batch_size",
        lambda e: e.inner.batch_size,
        "each step has trajectories of its own",
    ),
    Rule(
        "pretraining",
        lambda e: e.pretraining is not None,
        "is for supervised tasks; inner.steps=0 trains one policy for all tasks",
    ),
    Rule(
        "diagnostics.every",
        lambda e: e.diagnostics.every,
        "reinforcement learning records its own with every update",
    ),
    Rule("inner.order", lambda e: e.inner.order == "annealed", "annealed is for supervised tasks"),
    Rule(
        "inner.per_step",
        lambda e: e.inner.per_step,
        "is for supervised tasks: the policy that collects a step's trajectories would have other "
        "values for the step than the one whose loss is taken",
    ),
    Rule(
        "inner.rates",
        lambda e: e.inner.rates != "fixed" and not e.inner.steps,
        "without inner.steps there are none to learn",
    ),
    Rule("inner.recompute", lambda e: e.inner.recompute, "is for supervised tasks"),
)


def _not_moved_by(name: str) -> Rule:
    """A setting of the outer optimiser, which a step within a trust region does not use."""
    return Rule(
        f"outer.{name}",
        lambda e: getattr(e.outer, name) != Outer.model_fields[name].default,
        "reinforcement.update=trpo has its own way to move, within reinforcement.max_kl",
    )


_TRUST_REGION = (
    *map(_not_moved_by, ("lr", "optimizer", "weight_decay", "clip_norm", "clip_value")),
    Rule(
        "outer.scheduler",
        lambda e: e.outer.scheduler is not None,
        "reinforcement.update=trpo has no rate",
    ),
)


def _for(applies: Callable[[Any], bool], rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules, for those experiments alone that `applies` is true of."""

    def narrowed(rule: Rule) -> Rule:
        return rule._replace(when=lambda e: applies(e) and rule.when(e))

    return tuple(map(narrowed, rules))


def _weighs_every_step(experiment: Any) -> bool:
    weights = experiment.outer.query_losses
    fits = len(weights) == experiment.inner.steps and all(weight >= 0 for weight in weights)
    return fits and sum(weights) > 0


EXPERIMENT_RULES = (
    *_for(lambda e: e.outer.direction == "reptile", _REPTILE),
    *_for(lambda e: e.pretraining is not None, _PRETRAINING),
    *_for(lambda e: e.reinforcement is None, _SUPERVISED),
    *_for(lambda e: e.reinforcement is not None, _REINFORCEMENT),
    *_for(
        lambda e: e.reinforcement is not None and e.reinforcement.update == "trpo", _TRUST_REGION
    ),
    *_ANY,
)
