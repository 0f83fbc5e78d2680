"""The outputs of layers, and how similar two representations of the same examples are.

A representation is [n, ..., channels]. All dimensions but the last count as examples, so every
position of an image is one (as in SVCCA, Raghu et al. 2017): [n', channels].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.maml.flat_vector import Params

Outputs = dict[str, Tensor]
"""The output of each layer by the layer's name, in the order of the computation."""

_VARIANCE_KEPT = 0.99
_EXAMPLES_PER_DIRECTION = 3  # with fewer, even noise has high canonical correlations


def weight_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Name and class name of the layers that have a parameter with two dimensions or more."""
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if any(p.dim() >= 2 for p in module.parameters(recurse=False))
    ]


def layer_label(number: int, kind: str, is_head: bool) -> str:
    """What tables and figures call a weight layer: '1 (Linear)', '3 (Linear, head)'."""
    return f"{number} ({kind}{', head' if is_head else ''})"


def layer_of_modules(model: nn.Module) -> dict[str, str]:
    """The weight layer that each module belongs to, both by name: a module behind a layer, such as
    its normalisation, belongs to that layer; one before all layers to the first."""
    layers = [name for name, _ in weight_layers(model)]
    owner, owners = layers[0], {}
    for name, _ in model.named_modules():
        owner = name if name in layers else owner
        owners[name] = owner
    return owners


def parameter_labels(model: nn.Module) -> dict[str, str]:
    """What figures call each parameter, by its name: '1 (Linear) weight', or where it belongs to
    something behind the layer, '1 (Linear) BatchNorm bias'."""
    layers, owners = weight_layers(model), layer_of_modules(model)
    called = {
        name: layer_label(number, kind, number == len(layers))
        for number, (name, kind) in enumerate(layers, 1)
    }
    labels = {}
    for name, _ in model.named_parameters():
        module, _, own = name.rpartition(".")
        behind = "" if module in called else f"{type(model.get_submodule(module)).__name__} "
        labels[name] = f"{called[owners[module]]} {behind}{own}"
    return labels


def layer_outputs(model: nn.Module, params: Params, x: Tensor) -> Outputs:
    """The output of each weight layer for inputs x, [n, ..., channels].

    An output includes what follows the layer up to the next weight layer (normalisation, ReLU): it
    is the input of the next weight layer, or the model's output for the last one. Where the model
    uses a layer several times, the last use counts.
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
    """The inputs of the last weight layer, [n, d]; x itself where it is the only one."""
    outputs = list(layer_outputs(model, params, x).values())
    return (outputs[-2] if len(outputs) > 1 else x).flatten(1)


def nearest_centroid(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
    """Scores [m, N] of a classifier without head or inner loop: the cosine of each query feature
    with the mean support feature of each class.

    `support` [n, d] with `labels` [n] in 0 .. N - 1, `query` [m, d], `classes` = N.
    """
    one_hot = nn.functional.one_hot(labels, classes).to(support.dtype)
    centroids = one_hot.T @ support  # sums: the cosine does not depend on their length
    normalize = nn.functional.normalize
    return normalize(query, dim=-1) @ normalize(centroids, dim=-1).T


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al. 2019) of [n, ..., d] and [n, ..., d'].

    A scalar: 1 for representations that agree up to rotation and scale, 0 for uncorrelated ones,
    NaN where one of them is constant.
    """
    x, y = _centred(x), _centred(y)
    alike: Tensor = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    return alike


def mean_cca(x: Tensor, y: Tensor) -> Tensor:
    """Mean canonical correlation of the directions with 99 % of the variance (SVCCA, Raghu et al.
    2017), a scalar.

    NaN where there are fewer than three examples per direction, where a representation is constant,
    or where one is not finite.
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
    """Orthonormal columns that span the directions with 99 % of the variance, [n', k]."""
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
