"""The MAML family: an algorithm is a preset of settings that can also be mixed by hand.

`algorithm: maml++` fills in what its paper says wherever the experiment leaves a setting open;
`maml config show` prints the result. To add an algorithm, add its settings here; what they do is in
`adaptation`, `update_rules` and `meta_gradient`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.config.settings import Inner, Outer

# Finn et al. 2017; Nichol et al. 2018; Raghu et al. 2020; Oh et al. 2021; Li et al. 2017;
# Antoniou et al. 2019.
PRESETS: dict[str, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"inner.order": "first"},
    "reptile": {
        "outer.estimator": "reptile",
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
    "anil": {"inner.adapted": ["head"]},
    "boil": {"inner.adapted": ["body"]},
    "meta-sgd": {"inner.rates": "per-parameter"},
    "maml++": {
        "inner.order": "annealed",
        "inner.rates": "per-layer-and-step",
        "inner.not_adapted": ["normalisation"],
        "inner.per_step": ["normalisation"],
        "outer.query_losses": "annealed",
        "outer.scheduler": "CosineAnnealingLR",
        "outer.scheduler_args": {"eta_min": 1e-5},
        "model.normalisation": "batch-affine",
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
# What makes an algorithm; with another one, none of the old one's choices stays.
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
    "outer.estimator",
    "outer.query_losses",
)


def expand(data: dict[str, Any], model_defaults: Mapping[str, Any]) -> None:
    """Fill in, in place, what the experiment's algorithm says and the experiment does not.

    `model_defaults` are the model's resolved settings: normalisation is refined, not introduced.
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
    """Another algorithm for an experiment, in place: nothing of the old one stays, and what the new
    one says comes before what the experiment says."""
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
    """The algorithm that the settings amount to; 'custom' for a mixture of one's own, 'pretrained,
    ...' without meta-learning."""
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
