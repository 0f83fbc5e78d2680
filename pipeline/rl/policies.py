"""Policies π_θ(a | o): networks, and the distributions of actions that their outputs stand for.

A network maps observations [..., O] to predictions [..., output_size]; a `Distribution` maps a
prediction to a distribution of actions. A prediction is the mean and the log standard deviation of
A continuous dimensions, [..., 2·A], or a score per discrete action, [..., A]. Log-probabilities, KL
and entropy are in nats and *summed* over the dimensions of an action.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.maml.models import check_sizes
from tasks.base import as_tensor
from tasks.control.mdp import Actions
from tasks.random import UInt64, normal, uniform

_LOG_2PI = math.log(2 * math.pi)
_SMALLEST_LOG_STD = math.log(1e-6)  # as in the code of Finn et al. 2017
Activation = Literal["relu", "tanh"]


class Distribution(NamedTuple):
    """A kind of distribution of actions, as functions of predictions."""

    log_probability: Callable[[Tensor, Tensor], Tensor]
    """(prediction [..., output_size], action [..., A] or integers [...]) -> log π(action), [...]"""
    kl: Callable[[Tensor, Tensor], Tensor]
    """(first, second) predictions -> KL(first || second), [...]"""
    entropy: Callable[[Tensor], Tensor]
    """prediction -> entropy, [...]"""
    sample: Callable[[Tensor, Tensor], Tensor]
    """(prediction, noise) -> action, without randomness of its own."""
    noise: Callable[[UInt64, int, int, int, int], Tensor]
    """(keys [B], stream, n, H, output_size) -> noise [B, n, H, ...] on the CPU, which depends on
    the keys of the tasks and the stream alone."""


def distribution_of(actions: Actions) -> Distribution:
    """The distribution for continuous or for discrete actions."""
    return GAUSSIAN if actions == "continuous" else CATEGORICAL


def _halves(prediction: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = prediction.chunk(2, -1)
    return mean, log_std


def _gaussian_log_probability(prediction: Tensor, action: Tensor) -> Tensor:
    mean, log_std = _halves(prediction)
    z = (action - mean) * torch.exp(-log_std)
    return -(0.5 * z * z + log_std + 0.5 * _LOG_2PI).sum(-1)


def _gaussian_kl(old: Tensor, new: Tensor) -> Tensor:
    (old_mean, old_log_std), (mean, log_std) = _halves(old), _halves(new)
    distance = old_mean - mean
    variance = torch.exp(2 * old_log_std) + distance * distance
    return (log_std - old_log_std + 0.5 * variance * torch.exp(-2 * log_std) - 0.5).sum(-1)


def _gaussian_entropy(prediction: Tensor) -> Tensor:
    _, log_std = _halves(prediction)
    return (log_std + 0.5 * (1 + _LOG_2PI)).sum(-1)


def _gaussian_sample(prediction: Tensor, noise: Tensor) -> Tensor:
    mean, log_std = _halves(prediction)
    return mean + torch.exp(log_std) * noise


def _gaussian_noise(keys: UInt64, stream: int, n: int, horizon: int, size: int) -> Tensor:
    numbers = normal(keys, stream, n * horizon * (size // 2))
    return as_tensor(numbers.reshape(len(keys), n, horizon, size // 2))


def _categorical_log_probability(prediction: Tensor, action: Tensor) -> Tensor:
    scores = torch.log_softmax(prediction, -1)
    return torch.gather(scores, -1, action[..., None])[..., 0]


def _categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    before, after = torch.log_softmax(old, -1), torch.log_softmax(new, -1)
    return (torch.exp(before) * (before - after)).sum(-1)


def _categorical_entropy(prediction: Tensor) -> Tensor:
    scores = torch.log_softmax(prediction, -1)
    return -(torch.exp(scores) * scores).sum(-1)


def _categorical_sample(prediction: Tensor, noise: Tensor) -> Tensor:
    """Inverse of the cumulative distribution at uniform noise."""
    cumulative = torch.cumsum(torch.softmax(prediction, -1), -1)
    # The last sum may fall short of 1 by rounding, so it is left out.
    return (noise[..., None] >= cumulative[..., :-1]).sum(-1)


def _categorical_noise(keys: UInt64, stream: int, n: int, horizon: int, size: int) -> Tensor:
    return as_tensor(uniform(keys, stream, n * horizon).reshape(len(keys), n, horizon))


GAUSSIAN = Distribution(
    _gaussian_log_probability, _gaussian_kl, _gaussian_entropy, _gaussian_sample, _gaussian_noise
)
CATEGORICAL = Distribution(
    _categorical_log_probability,
    _categorical_kl,
    _categorical_entropy,
    _categorical_sample,
    _categorical_noise,
)


class GaussianPolicy(nn.Module):
    """A network gives the mean; the log standard deviation is one parameter per dimension, the
    same for all observations. It adapts like any other parameter. [..., O] -> [..., 2·A]."""

    def __init__(self, network: nn.Module, num_actions: int, init_log_std: float):
        super().__init__()
        self.log_std = nn.Parameter(torch.full((num_actions,), init_log_std))
        self.network = network

    def forward(self, observation: Tensor) -> Tensor:
        mean = self.network(observation)
        log_std = self.log_std.clamp(min=_SMALLEST_LOG_STD)
        return torch.cat([mean, log_std.expand_as(mean)], -1)


def gaussian_policy(
    input_shape: Sequence[int],
    output_size: int,
    *,
    hidden: tuple[int, ...] = (100, 100),
    activation: Activation = "relu",
    init_log_std: float = 0.0,
) -> nn.Module:
    """A policy for continuous actions, `output_size` = 2·A.

    Finn et al. 2017 use two layers of 100 ReLUs, Rothfuss et al. 2019 (ProMP) two of 64 tanh units.
    Raises ValueError for observations that are no vectors, or for a layer without units.
    """
    num_actions = output_size // 2
    network = _layers(input_shape, num_actions, hidden, activation)
    return GaussianPolicy(network, num_actions, init_log_std)


def categorical_policy(
    input_shape: Sequence[int],
    output_size: int,
    *,
    hidden: tuple[int, ...] = (100, 100),
    activation: Activation = "relu",
) -> nn.Module:
    """A policy for discrete actions: a score for each of `output_size` actions. Raises as
    `gaussian_policy` does."""
    return _layers(input_shape, output_size, hidden, activation)


def _layers(
    input_shape: Sequence[int], output_size: int, hidden: Sequence[int], activation: Activation
) -> nn.Module:
    if len(input_shape) != 1:
        raise ValueError(f"model: a policy needs observations (O,), not {tuple(input_shape)}")
    check_sizes("hidden", hidden)
    sizes = [*input_shape, *hidden, output_size]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU() if activation == "relu" else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def log_std_of(prediction: Tensor, actions: Actions) -> Tensor | None:
    """The log standard deviation, mean over the dimensions of an action, [...]; None for discrete
    actions."""
    return _halves(prediction)[1].mean(-1) if actions == "continuous" else None
