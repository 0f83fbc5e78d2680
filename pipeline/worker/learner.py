"""What an experiment learns: its model, how it adapts, the first meta-parameters, the device.

The functions build the parts one by one; `Learner` holds them all, for those who compute chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.components import build_model
from pipeline.config.experiment import Experiment
from pipeline.config.phases import Phase, query_weights_at
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.flat_vector import FlatVector, Layout, Params
from pipeline.maml.inner_optimizers import build_inner_optimizer
from pipeline.maml.meta_gradient import Knobs
from pipeline.worker.jobs import SMALL


@dataclass(frozen=True, eq=False)
class Learner:
    """An experiment's model and meta-parameters, ready to compute with."""

    experiment: Experiment
    model: torch.nn.Module
    """On the compute device, in the compute precision."""
    adaptation: Adaptation
    layout: Layout
    """Order and shapes of the meta-parameters in a flat vector [D]."""
    initial_theta: Tensor
    """The meta-parameters at initialisation, [D], on the compute device."""
    alpha: Tensor
    """The inner rate, a scalar. Its device and precision are those of every computation."""

    @classmethod
    def of(cls, experiment: Experiment) -> Learner:
        """Build everything. Raises ValueError naming the setting that does not fit the model, or
        `compute.device` where a GPU is asked for and there is none."""
        device, dtype = compute_device(experiment), getattr(torch, experiment.compute.dtype)
        model = model_of(experiment)
        theta = meta_parameters_of(experiment, model)
        layout = Layout.of(theta)
        initial_theta = layout.join(theta).to(device, dtype)
        model = model.to(device, dtype)
        alpha = torch.tensor(experiment.inner.lr, dtype=dtype, device=device)
        adaptation = adaptation_of(experiment, model)
        return cls(experiment, model, adaptation, layout, initial_theta, alpha)

    def on_device(self, flat: FlatVector) -> Tensor:
        """A copy of a flat vector [D] on the compute device, in the compute precision."""
        # The copy is needed: Ray hands out read-only memory, and torch would warn about aliasing.
        return torch.from_numpy(np.array(flat)).to(self.alpha)

    def knobs(self, phase: Phase, iteration: int) -> Knobs:
        """The inner rate and the weights of the query losses in an iteration.

        Where `phase` is tried out before its first iteration there are no weights yet; then all
        are 1.
        """
        if not phase.every_query_loss:
            return Knobs(self.alpha)
        weights = query_weights_at(self.experiment, iteration)
        return Knobs(self.alpha, self.alpha.new_tensor(weights or [1.0] * self.adaptation.steps))


def model_of(experiment: Experiment, seed: int | None = None) -> torch.nn.Module:
    """The experiment's model on the CPU; its initial parameters are drawn from `seed`, by default
    the run's."""
    task = experiment.build_task()
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        task.input_shape,
        task.output_size,
        experiment.seed if seed is None else seed,
    )


def adaptation_of(experiment: Experiment, model: torch.nn.Module) -> Adaptation:
    """How the experiment adapts this model. Raises ValueError naming the setting that does not fit
    the model."""
    inner = experiment.inner
    try:
        return Adaptation.of(
            model,
            steps=inner.steps,
            adapted=inner.adapted,
            not_adapted=inner.not_adapted,
            per_step=inner.per_step,
            rates=inner.rates,
            optimizer=build_inner_optimizer(inner.optimizer, inner.momentum, inner.beta1),
            batch_size=inner.batch_size,
            later_factor=inner.later_lr_factor,
        )
    except ValueError as error:
        raise ValueError(f"inner.{error}") from error


def initial_parameters(experiment: Experiment, seed: int | None = None) -> Params:
    """The meta-parameters at initialisation, on the CPU, in the compute precision."""
    return meta_parameters_of(experiment, model_of(experiment, seed))


def meta_parameters_of(experiment: Experiment, model: torch.nn.Module) -> Params:
    """The model's named parameters and, where the algorithm learns them, its inner rates; on the
    model's device, in the compute precision."""
    dtype = getattr(torch, experiment.compute.dtype)
    params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    return adaptation_of(experiment, model).meta_parameters(params, experiment.inner.lr)


def computes_little(experiment: Experiment) -> bool:
    """Whether the cost of a chunk is in calls, not in arithmetic: a small model, and no
    trajectories, which are many examples at once."""
    if experiment.reinforcement is not None:
        return False
    num_parameters = sum(value.numel() for value in initial_parameters(experiment).values())
    return num_parameters < SMALL


def compute_device(experiment: Experiment) -> torch.device:
    """The device that computes chunks: `compute.device`, with `auto` resolved by what torch sees.

    Raises ValueError where a GPU is asked for and there is none.
    """
    name = experiment.compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device: cuda was asked for, but torch sees no GPU here")
    return torch.device(name)
