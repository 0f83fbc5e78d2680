"""The MAML family: an algorithm is a preset of settings that can also be mixed by hand.

`algorithm: maml++` gives the settings of its paper to every setting that the experiment leaves
open; `maml config show` prints the result. To add an algorithm, add an entry to `PRESETS`; the code
that its settings control is in `pipeline.maml.adaptation`, `inner_optimizers` and `meta_gradient`.

Equation numbers alone are those of the project's reference (as everywhere in the code); those with
a paper are the paper's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.config.settings import Inner, Outer


class Preset(NamedTuple):
    """An algorithm of the family."""

    description: str
    """What it is, in a line, for `maml config algorithms`."""
    settings: Mapping[str, Any]
    """The values that it gives to settings, by their dotted path; all others keep their default."""


PRESETS: dict[str, Preset] = {
    # Finn et al. 2017, algorithms 1 to 3: θ' = θ − α ∇L(θ) (eq. 2), θ ← θ − β ∇_θ Σ L(θ') (eq. 4).
    "maml": Preset("every parameter adapts at one fixed rate; full second-order meta-gradient", {}),
    # The first-order approximation of Finn et al. 2017, section 5.2: the gradient of L_Q(θ') with
    # respect to θ' stands for the one with respect to θ.
    "fomaml": Preset(
        "MAML with inner gradients taken for constants: cheaper steps", {"inner.order": "first"}
    ),
    # Nichol et al. 2018: θ ← θ + ε (θ'_S − θ), mean over the tasks of a batch. θ'_S comes of Adam
    # with β1 = 0 on mini-batches of 10; ε falls linearly from 1 to 0.
    "reptile": Preset(
        "moves θ towards what training on a task reaches; needs no query set",
        {
            "outer.direction": "reptile",
            "inner.order": "first",
            "inner.optimizer": "adam",
            "inner.beta1": 0.0,
            "inner.lr": 0.001,
            "inner.batch_size": 10,
            "outer.optimizer": "sgd",
            "outer.lr": 1.0,
            "outer.scheduler": "LinearLR",
            "outer.scheduler_args": {"start_factor": 1.0, "end_factor": 0.0},
        },
    ),
    # Raghu et al. 2020, section 4: eq. 2 for the head alone, at training and at test.
    "anil": Preset("only the head adapts", {"inner.adapted": ["head"]}),
    # Oh et al. 2021: eq. 2 for the body alone; the inner rate of the head is 0.
    "boil": Preset("only the body adapts", {"inner.adapted": ["body"]}),
    # Li et al. 2017: θ' = θ − α ∘ ∇L(θ), where α has the shape of θ; the outer loop learns both.
    "meta-sgd": Preset(
        "MAML with a learned inner rate for every parameter", {"inner.rates": "per-parameter"}
    ),
    # Antoniou et al. 2019, section 4, one setting or two for each change.
    "maml++": Preset(
        "multi-step loss, annealed order, learned rates and normalisation per step, cosine",
        {
            # Derivative-order annealing: first order in the first part of training, then second.
            "inner.order": "annealed",
            # Per-layer per-step learning rates: θ_{s+1} = θ_s − α_{layer, s} ∇L(θ_s).
            "inner.rates": "per-layer-and-step",
            # Per-step batch normalisation weights and biases, which the inner loop does not adapt.
            "inner.not_adapted": ["normalisation"],
            "inner.per_step": ["normalisation"],
            "model.normalisation": "batch-affine",
            # Multi-step loss: Σ_s w_s L_Q(θ_s), whose weights move to the last step.
            "outer.query_losses": "annealed",
            # Cosine annealing of the outer rate.
            "outer.scheduler": "CosineAnnealingLR",
            "outer.scheduler_args": {"eta_min": 1e-5},
        },
    ),
}
"""Every value that `algorithm` may have."""
FAMILY = (
    "inner.order",
    "inner.second_order_from",
    "inner.adapted",
    "inner.not_adapted",
    "inner.per_step",
    "inner.rates",
    "inner.optimizer",
    "inner.momentum",
    "inner.beta1",
    "inner.batch_size",
    "outer.direction",
    "outer.query_losses",
)
"""The settings that make an algorithm. Choosing another algorithm resets all of them."""


def unknown(name: str) -> str | None:
    """What is wrong with a name that no algorithm has, in words; None for one that is known."""
    if name in PRESETS:
        return None
    by_letters = {_letters(preset): preset for preset in PRESETS}
    close = difflib.get_close_matches(_letters(name), by_letters, 1)
    question = f"; did you mean {by_letters[close[0]]}?" if close else ""
    return f"{name!r} is none of {', '.join(PRESETS)}{question}"


def _letters(name: str) -> str:
    """A name as it is spelled where signs cannot be: 'mamlpp' for 'maml++'."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("plus", "+").replace("+", "p"))


def expanded(data: Mapping[str, Any], model_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's plain values with the algorithm's settings where `data` has none.

    `model_defaults` are the model's settings with defaults: a preset changes the normalisation of a
    model that has one, and gives none to a model without.
    """
    result = dict(data)
    preset = _settings_of(data.get("algorithm", "maml"))
    for path, value in preset.items():
        section, _, key = path.partition(".")
        given = result.get(section, {})
        if not isinstance(given, Mapping):
            continue  # reported by the schema
        if path == "model.normalisation" and model_defaults.get(key) != "batch":
            continue
        another = given.get("scheduler") != preset.get("outer.scheduler")
        if path == "outer.scheduler_args" and another:
            continue
        result[section] = {key: value, **given}
    return result


def choose(data: dict[str, Any], name: Any) -> None:
    """Change the algorithm of an experiment, in place.

    All settings of the old algorithm go. Settings that the new algorithm gives replace those of the
    experiment.
    """
    old, new = _settings_of(data.get("algorithm", "maml")), _settings_of(name)
    for path in {*FAMILY, *old, *new}:
        section, _, key = path.partition(".")
        settings = data.get(section)
        if not isinstance(settings, dict) or key not in settings:
            continue
        if path == "model.normalisation":
            chosen = settings[key] != old.get(path, "batch")
        else:
            chosen = path not in FAMILY and path not in new and settings[key] != old[path]
        if not chosen:
            del settings[key]
    data["algorithm"] = name


def named(settings: Mapping[str, Any], first: str) -> str:
    """The name of the algorithm that has these settings (by path); 'custom' for those of none.

    Of several with the same settings it is `first`, if that is one of them.
    """
    defaults = {
        **{f"inner.{name}": field.default for name, field in Inner.model_fields.items()},
        **{f"outer.{name}": field.default for name, field in Outer.model_fields.items()},
    }

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for name in (first, *PRESETS):
        preset = PRESETS[name].settings
        wanted = {path: plain(preset.get(path, defaults[path])) for path in FAMILY}
        del wanted["inner.second_order_from"]  # when, not whether
        if all(settings.get(path) == value for path, value in wanted.items()):
            return name
    return "custom"


def _settings_of(name: Any) -> Mapping[str, Any]:
    """The settings of an algorithm; none for a name that is unknown, which the schema reports."""
    return PRESETS[name].settings if isinstance(name, str) and name in PRESETS else {}
