"""Model builders: plain `nn.Module`s that contain nothing special to meta-learning.

A builder is `build(input_shape, output_size, *, settings...) -> nn.Module`; its keyword parameters
are the settings of the `model:` section. Modules hold parameters and no other state: batch
normalisation uses the statistics of the current batch, in training and at test (the transductive
protocol of Finn et al. 2017), and no forward pass changes a module.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDEST = 1_000_000
Normalisation = Literal["batch", "batch-affine", "none"]


class BatchNorm(nn.Module):
    """Normalises each channel (the last dimension) by the statistics of the current batch.

    It has a bias and, as in the code of Finn et al., no scale: a ReLU follows, so the weights of
    the next layer can absorb a positive scale. They cannot absorb one per step, so MAML++ needs
    `scale`. Input and output are [n, ..., C].
    """

    def __init__(self, channels: int, scale: bool = False, epsilon: float = 1e-5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = nn.Parameter(torch.ones(channels)) if scale else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(x.dim() - 1))
        centred = x - x.mean(axes)
        variance = (centred * centred).mean(axes)
        normalised = centred * torch.rsqrt(variance + self.epsilon)
        return (normalised if self.scale is None else normalised * self.scale) + self.bias


class Conv3x3(nn.Module):
    """A 3x3 convolution with padding 1, channels last: [n, H, W, C] -> [n, ⌈H/s⌉, ⌈W/s⌉, C_out].

    It multiplies patches by a matrix instead of calling `F.conv2d`: with a weight per task, vmap
    turns `F.conv2d` into a grouped convolution, whose second derivative is slow and cannot be
    fused, while this becomes one batched matrix product (measured in benchmarks/).

    The weight is [9·C, C_out], its rows ordered (row tap, column tap, input channel). To load the
    weight `w` [C_out, C, 3, 3] of an `nn.Conv2d` with padding 1 and stride s:
    `conv.weight.copy_(w.permute(2, 3, 1, 0).reshape(9 * C, C_out))`. A bias is the same in both.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(9 * in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride = stride
        # Xavier initialisation: each unit has 9·C inputs and feeds 9·C_out outputs.
        bound = math.sqrt(6 / (9 * in_channels + 9 * out_channels))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        patches = neighbours(neighbours(x, 2, self.stride), 1, self.stride)
        out = patches @ self.weight
        return out if self.bias is None else out + self.bias


def neighbours(x: Tensor, dim: int, stride: int) -> Tensor:
    """Concatenate every `stride`-th element along `dim` with its two neighbours, as channels.

    Channels are the last dimension, C -> 3·C in the order (before, centre, after); zeros stand
    beyond the ends. `stride` is 1 or 2. Applied along both dimensions of an image it gives 3x3
    patches. It uses only pads, unbinds and concatenations: their derivatives are again such
    operations, while the derivative of a strided slice fills and adds whole tensors.
    """
    after_dim = (0, 0) * (x.dim() - 1 - dim)
    if stride == 1:
        before, centre, after = F.pad(x, (*after_dim, 1, -1)), x, F.pad(x, (*after_dim, -1, 1))
    else:
        if x.shape[dim] % 2:
            x = F.pad(x, (*after_dim, 0, 1))
        centre, after = torch.unflatten(x, dim, (-1, 2)).unbind(dim + 1)
        before = F.pad(after, (*after_dim, 1, -1))
    return torch.cat([before, centre, after], dim=-1)


class MaxPool2x2(nn.Module):
    """2x2 max-pooling, [n, H, W, C] -> [n, ⌊H/2⌋, ⌊W/2⌋, C]; drops an odd last row or column."""

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2]
        return x.reshape(n, height // 2, 2, width // 2, 2, channels).amax((2, 4))


class ChannelsLast(nn.Module):
    """Moves channels last, [n, C, H, W] -> [n, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class SpatialMean(nn.Module):
    """Averages over positions, [n, H, W, C] -> [n, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


def linear(input_shape: Sequence[int], output_size: int, *, bias: bool = False) -> nn.Module:
    """One linear map. With `task.kind: quadratic` its meta-gradient has a closed form."""
    features = math.prod(input_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, output_size, bias=bias))


def mlp(
    input_shape: Sequence[int],
    output_size: int,
    *,
    hidden: tuple[int, ...] = (40, 40),
    normalisation: Normalisation = "none",
    init_std: float | None = 0.01,
) -> nn.Module:
    """Fully connected ReLU network (Finn et al. 2017).

    The paper uses `hidden` (40, 40) for the sinusoid and (256, 128, 64, 64) for Omniglot. Biases
    start at 0. Weights start from a normal distribution of deviation `init_std`, truncated at two
    deviations, as in the authors' code; with null, from Xavier's uniform distribution. Raises
    ValueError naming the setting.
    """
    check_sizes("hidden", hidden)
    if init_std is not None and not init_std > 0:
        raise ValueError(f"model.init_std: must be positive, or null, got {init_std}")
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(input_shape)
    for width in hidden:
        layers.append(nn.Linear(features, width))
        if normalisation != "none":
            layers.append(BatchNorm(width, scale=normalisation == "batch-affine"))
        layers.append(nn.ReLU())
        features = width
    layers.append(nn.Linear(features, output_size))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            if init_std is None:
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def conv4(
    input_shape: Sequence[int],
    output_size: int,
    *,
    filters: int = 64,
    downsample: Literal["stride", "max-pool"] = "stride",
    head: Literal["mean", "flatten"] = "mean",
    layers: int = 4,
    normalisation: Normalisation = "batch",
) -> nn.Module:
    """`layers` blocks of 3x3 convolution, batch normalisation and ReLU; then a linear layer.

    Finn et al. 2017 use 64 filters, `downsample: stride`, `head: mean` for Omniglot, and 32
    filters, `downsample: max-pool`, `head: flatten` for miniImageNet. Images are [n, C, H, W].
    Raises ValueError naming the setting, also for images that are too small for the poolings.
    """
    if len(input_shape) != 3:
        raise ValueError(f"model: conv4 needs images (C, H, W), the task has {tuple(input_shape)}")
    check_sizes("filters", (filters,))
    check_sizes("layers", (layers,))
    channels, height, width = input_shape
    modules: list[nn.Module] = [ChannelsLast()]
    for _ in range(layers):
        stride = 2 if downsample == "stride" else 1
        # Subtracting the mean would cancel a bias before the normalisation.
        modules.append(Conv3x3(channels, filters, stride, bias=normalisation == "none"))
        if normalisation != "none":
            modules.append(BatchNorm(filters, scale=normalisation == "batch-affine"))
        modules.append(nn.ReLU())
        channels = filters
        if downsample == "stride":
            height, width = (height + 1) // 2, (width + 1) // 2
        else:
            modules.append(MaxPool2x2())
            height, width = height // 2, width // 2
    if height * width == 0:
        raise ValueError(
            f"model.layers: {layers} poolings leave nothing of images of {tuple(input_shape)}"
        )
    modules += [SpatialMean()] if head == "mean" else [nn.Flatten()]
    features = channels if head == "mean" else channels * height * width
    classifier = nn.Linear(features, output_size)
    nn.init.xavier_uniform_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(*modules, classifier)


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError naming the setting `model.NAME` unless all sizes are positive, and not
    beyond any memory."""
    if any(not 1 <= size <= _WIDEST for size in sizes):
        raise ValueError(
            f"model.{name}: must be positive, and at most {_WIDEST:,}, got {list(sizes)}"
        )
