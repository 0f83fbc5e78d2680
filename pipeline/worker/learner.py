"""What an experiment learns: its model, how that adapts, its first meta-parameters, and where."""

from __future__ import annotations

import torch

from pipeline.config.components import build_model
from pipeline.config.experiment import Experiment
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.parameters import Params
from pipeline.maml.update_rules import build_rule


def model_of(experiment: Experiment, seed: int | None = None) -> torch.nn.Module:
    """The experiment's model, its initial parameters drawn from the run's seed (or another)."""
    task = experiment.build_task()
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        task.input_shape,
        task.output_size,
        experiment.seed if seed is None else seed,
    )


def adaptation_of(experiment: Experiment, model: torch.nn.Module) -> Adaptation:
    """How the experiment adapts this model. Raises ValueError naming the setting."""
    inner = experiment.inner
    try:
        return Adaptation.of(
            model,
            steps=inner.steps,
            adapted=inner.adapted,
            not_adapted=inner.not_adapted,
            per_step=inner.per_step,
            rates=inner.rates,
            rule=build_rule(inner.optimizer, inner.momentum, inner.beta1),
            batch_size=inner.batch_size,
            later_factor=inner.later_lr_factor,
        )
    except ValueError as error:
        raise ValueError(f"inner.{error}") from error


def initial_parameters(experiment: Experiment, seed: int | None = None) -> Params:
    """The meta-parameters at initialisation, on the CPU, in the compute precision."""
    return meta_parameters_of(experiment, model_of(experiment, seed))


def meta_parameters_of(experiment: Experiment, model: torch.nn.Module) -> Params:
    """The model's named parameters, and what else the algorithm learns."""
    dtype = getattr(torch, experiment.compute.dtype)
    params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    return adaptation_of(experiment, model).meta_parameters(params, experiment.inner.lr)


def compute_device(experiment: Experiment) -> torch.device:
    """Where chunks are computed. Raises ValueError where a GPU is asked for and there is none."""
    name = experiment.compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device: cuda was asked for, but torch sees no GPU here")
    return torch.device(name)
