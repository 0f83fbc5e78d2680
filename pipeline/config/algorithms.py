"""The MAML family: an algorithm is a preset of settings that can also be mixed by hand.

`algorithm: maml++` gives the settings of its paper to every setting that the experiment leaves
open; `maml config show` prints the result. To add an algorithm, add its settings here; the code
that they control is in `pipeline.maml.adaptation`, `inner_optimizers` and `meta_gradient`.

Equation numbers alone are those of the project's reference (as everywhere in the code); those with
a paper are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.config.settings import Inner, Outer

PRESETS: dict[str, dict[str, Any]] = {
    # Finn et al. 2017, algorithms 1 to 3: θ' = θ − α ∇L(θ) (eq. 2), θ ← θ − β ∇_θ Σ L(θ') (eq. 4).
    "maml": {},
    # The first-order approximation of Finn et al. 2017, section 5.2: the gradient of L_Q(θ') with
    # respect to θ' stands for the one with respect to θ.
    "fomaml": {"inner.order": "first"},
    # Nichol et al. 2018: θ ← θ + ε (θ'_S − θ), mean over the tasks of a batch. θ'_S comes of Adam
    # with β1 = 0 on mini-batches of 10; ε falls linearly from 1 to 0.
    "reptile": {
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
    # Raghu et al. 2020, section 4: eq. 2 for the head alone, at training and at test.
    "anil": {"inner.adapted": ["head"]},
    # Oh et al. 2021: eq. 2 for the body alone; the inner rate of the head is 0.
    "boil": {"inner.adapted": ["body"]},
    # Li et al. 2017: θ' = θ − α ∘ ∇L(θ), where α has the shape of θ; the outer loop learns both.
    "meta-sgd": {"inner.rates": "per-parameter"},
    # Antoniou et al. 2019, section 4, one setting or two for each change.
    "maml++": {
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
}
DESCRIPTIONS = {
    "maml": "every parameter adapts at one fixed rate; full second-order meta-gradient",
    "fomaml": "MAML with inner gradients taken for constants: cheaper steps",
    "reptile": "moves θ towards what training on a task reaches; needs no query set",
    "anil": "only the head adapts",
    "boil": "only the body adapts",
    "meta-sgd": "MAML with a learned inner rate for every parameter",
    "maml++": "multi-step loss, annealed order, learned rates and normalisation per step, cosine",
}
# The settings that make an algorithm. Choosing another algorithm resets all of them.
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


def expand(data: dict[str, Any], model_defaults: Mapping[str, Any]) -> None:
    """Give the algorithm's settings to `data`, in place, where the experiment has none.

    `model_defaults` are the model's settings with defaults: a preset changes the normalisation of a
    model that has one, and gives none to a model without.
    """
    preset = PRESETS.get(str(data.get("algorithm", "maml")), {})
    for path, value in preset.items():
        section, _, key = path.partition(".")
        if path == "model.normalisation" and model_defaults.get(key) != "batch":
            continue
        if path == "outer.scheduler_args" and _other_scheduler(data, preset):
            continue
        settings = data.setdefault(section, {})
        if isinstance(settings, dict):
            settings.setdefault(key, value)


def _other_scheduler(data: dict[str, Any], preset: dict[str, Any]) -> bool:
    outer = data.get("outer")
    return isinstance(outer, dict) and outer.get("scheduler") != preset["outer.scheduler"]


def choose(data: dict[str, Any], name: Any) -> None:
    """Change the algorithm of an experiment, in place.

    All settings of the old algorithm go. Settings that the new algorithm gives replace those of the
    experiment.
    """
    old, new = PRESETS.get(str(data.get("algorithm", "maml")), {}), PRESETS.get(str(name), {})
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


def name_of(experiment: Experiment) -> str:
    """The name of the algorithm that has the experiment's settings.

    'custom' for settings of no preset, 'pretrained, OBJECTIVE' without meta-learning.
    """
    if experiment.pretraining is not None:
        return f"pretrained, {experiment.pretraining.objective}"
    flat = experiment.flat()
    defaults = {
        **{f"inner.{name}": field.default for name, field in Inner.model_fields.items()},
        **{f"outer.{name}": field.default for name, field in Outer.model_fields.items()},
    }

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for name in (experiment.algorithm, *PRESETS):
        wanted = {path: plain(PRESETS[name].get(path, defaults[path])) for path in FAMILY}
        del wanted["inner.second_order_from"]  # when, not whether
        if all(flat.get(path) == value for path, value in wanted.items()):
            return name
    return "custom"
