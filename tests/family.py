"""Two small models with tasks, and the adaptation of every algorithm to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.algorithms import PRESETS
from pipeline.maml.adaptation import RATE, Adaptation
from pipeline.maml.flat_vector import Params
from pipeline.maml.inner_optimizers import build_inner_optimizer
from pipeline.maml.models import conv4, mlp
from tasks.base import TaskBatch
from tasks.sinusoid import Sinusoid
from tests.helpers import Images, images

STEPS, ALPHA = 3, 0.05
WEIGHTS = (0.2, 0.3, 0.5)


def regression() -> tuple[nn.Module, Any, TaskBatch]:
    model = mlp((1,), 1, hidden=(5, 4), normalisation="batch-affine", init_std=0.5)
    return model, Sinusoid(), Sinusoid(shots=6, queries=5).sample(0, "train", np.arange(3))


def classification() -> tuple[nn.Module, Any, TaskBatch]:
    shape = (1, 8, 8)
    model = conv4(shape, 2, filters=3, layers=2, normalisation="batch-affine")
    return model, Images(), images(3, shape, shots=2, queries=2)


OWN = {
    "maml with adam": {"optimizer": build_inner_optimizer("adam")},
    "maml with momentum": {"optimizer": build_inner_optimizer("momentum", momentum=0.8)},
}


def adaptation_for(name: str, model: nn.Module) -> Adaptation:
    preset = PRESETS[name].settings if name in PRESETS else {}
    return Adaptation.of(
        model,
        steps=STEPS,
        adapted=preset.get("inner.adapted", ["all"]),
        not_adapted=preset.get("inner.not_adapted", []),
        per_step=preset.get("inner.per_step", []),
        rates=preset.get("inner.rates", "fixed"),
        **OWN.get(name, {}),
    )


def perturbed(meta: Params) -> Params:
    """A generic point: published initial values are full of zeros, ones and equal rates."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: p
        + (0.01 if name.startswith(RATE) else 0.2)
        * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in meta.items()
    }
