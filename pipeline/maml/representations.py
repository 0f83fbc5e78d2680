"""What layers make of examples, and how alike two such representations are.

A representation is [n, ..., channels]; all but the last dimension count as examples (the positions
of an image, that is, as SVCCA does it: Raghu et al. 2017), [n', channels].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.maml.parameters import Params

Outputs = dict[str, Tensor]
"""By layer, in the order of the computation."""

_VARIANCE_KEPT = 0.99
_EXAMPLES_PER_DIRECTION = 3  # with fewer, canonical correlations of noise are high


def weight_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Name and kind of the layers that have weights: a parameter with two dimensions or more."""
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if any(p.dim() >= 2 for p in module.parameters(recurse=False))
    ]


def layer_outputs(model: nn.Module, params: Params, x: Tensor) -> Outputs:
    """What each weight layer, with all that follows it up to the next one, makes of x.

    That is the input of the next weight layer; of the last one, the model's output. Channels are
    the last dimension. A layer that is used several times counts with its last use.
    """
    seen: list[tuple[str, Tensor]] = []
    layers = {name for name, _ in weight_layers(model)}

    def look(name: str, module: nn.Module) -> Any:
        channels_first = isinstance(module, nn.modules.conv._ConvNd)

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            at = inputs[0]
            seen.append((name, at.movedim(1, -1) if channels_first else at))

        return module.register_forward_pre_hook(hook)

    hooks = [look(name, module) for name, module in model.named_modules() if name in layers]
    try:
        output: Tensor = functional_call(model, params, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    after = [tensor for _, tensor in seen[1:]] + [output]
    return {name: tensor for (name, _), tensor in zip(seen, after, strict=True)}


def head_inputs(model: nn.Module, params: Params, x: Tensor) -> Tensor:
    """The features that the last weight layer sees, [n, d]; where it is the only one, x itself."""
    outputs = list(layer_outputs(model, params, x).values())
    return (outputs[-2] if len(outputs) > 1 else x).flatten(1)


def nearest_centroid(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
    """Scores [m, N]: the cosine of each query feature [m, d] with every class's mean support
    feature, of features [n, d] with labels [n]. No inner loop, and no head."""
    one_hot = nn.functional.one_hot(labels, classes).to(support.dtype)
    centroids = one_hot.T @ support  # of the right direction, which is all that counts
    normalize = nn.functional.normalize
    return normalize(query, dim=-1) @ normalize(centroids, dim=-1).T


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al. 2019): 1 for representations that agree up
    to rotation and scale, 0 for orthogonal ones. NaN where one of them is constant."""
    x, y = _centred(x), _centred(y)
    alike: Tensor = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    return alike


def mean_cca(x: Tensor, y: Tensor) -> Tensor:
    """Mean canonical correlation of the directions that hold 99 % of the variance (SVCCA).

    NaN where there are fewer than three examples for each of them, or none.
    """
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return x.new_tensor(math.nan)
    one, other = _main_directions(x), _main_directions(y)
    width = min(one.shape[1], other.shape[1])
    if not width or one.shape[0] < _EXAMPLES_PER_DIRECTION * max(one.shape[1], other.shape[1]):
        return x.new_tensor(math.nan)
    correlations: Tensor = torch.linalg.svdvals(one.T @ other)
    return correlations[:width].clamp(max=1).mean()


def _main_directions(x: Tensor) -> Tensor:
    """Orthonormal columns that span the directions of most variance, [n', k]."""
    left: Tensor
    values: Tensor
    left, values, _ = torch.linalg.svd(_centred(x), full_matrices=False)
    energy = values.square()
    if not energy.sum() > 0:
        return left[:, :0]
    kept = int((energy.cumsum(0) < _VARIANCE_KEPT * energy.sum()).sum()) + 1
    return left[:, :kept]


def _centred(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).double()
    return flat - flat.mean(0)
