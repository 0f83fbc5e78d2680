"""How much better an action was than expected: baseline, generalised advantages.

The baseline is a linear function of features of observation and time (Duan et al. 2016), fitted to
the discounted returns of the very trajectories that it is subtracted from: per task and per step of
adaptation. Reaching the horizon ends a trajectory: nothing is added for what might have followed,
as in the original code.

Shapes: B tasks, n trajectories, H time steps, F = 2·O + 4 features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.control.mdp import Trajectories

_RIDGE = 1e-5
_LARGEST_OBSERVATION = 10.0  # as in the original code: squares of outliers would rule the fit
_TINY = 1e-8


class Advantages(NamedTuple):
    """What came of the estimation."""

    values: Tensor
    """Standardised over the valid steps of each task, [B, n, H]; 0 where masked."""
    explained_variance: Tensor
    """Of the discounted returns by the baseline, [B]: 1 is perfect, 0 as good as their mean."""


def advantages(trajectories: Trajectories, discount: float, gae_lambda: float) -> Advantages:
    """Of every action of B tasks (leading dimension of the record)."""
    mask = trajectories.mask
    rewards = trajectories.rewards * mask
    returns = discounted_sums(rewards, discount) * mask
    baseline = fitted(trajectories.observations, mask, returns)
    following = torch.cat([baseline[..., 1:], torch.zeros_like(baseline[..., :1])], -1)
    surprise = (rewards + discount * following - baseline) * mask
    raw = discounted_sums(surprise, discount * gae_lambda) * mask
    left = _variance(returns - baseline, mask)
    explained = 1 - left / _variance(returns, mask).clamp(min=_TINY)
    return Advantages(standardised(raw, mask), explained)


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Σ_{t' ≥ t} discount^(t' − t) values_t', for every t; [..., H] -> [..., H]."""
    horizon = values.shape[-1]
    times = torch.arange(horizon, device=values.device)
    ahead = times[:, None] - times  # rows are summed over: later minus now
    weights = torch.where(ahead >= 0, discount ** ahead.clamp(min=0).to(values.dtype), 0.0)
    return values @ weights


def fitted(observations: Tensor, mask: Tensor, returns: Tensor) -> Tensor:
    """The baseline's values [B, n, H], by least squares for each task; 0 where masked.

    With a small ridge, in double precision: features are far from independent.
    """
    features = _features(observations, mask).flatten(1, 2).double()
    squares = features.mT @ features
    size = squares.shape[-1]
    squares = squares + _RIDGE * torch.eye(size, dtype=squares.dtype, device=squares.device)
    projected = features.mT @ returns.flatten(1, 2).double()[..., None]
    weights = torch.linalg.solve(squares, projected)
    values: Tensor = (features @ weights).to(returns.dtype).view_as(returns)
    return values


def standardised(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the valid steps of each task; 0 where masked."""
    count = mask.sum((-2, -1), keepdim=True)
    centred = (values - values.sum((-2, -1), keepdim=True) / count) * mask
    deviation = torch.sqrt((centred * centred).sum((-2, -1), keepdim=True) / count)
    return centred / (deviation + _TINY)


def _features(observations: Tensor, mask: Tensor) -> Tensor:
    """o, o², t/100 and its powers, 1; 0 where masked. [B, n, H, F]."""
    o = observations.clamp(-_LARGEST_OBSERVATION, _LARGEST_OBSERVATION)
    t = torch.arange(o.shape[-2], device=o.device, dtype=o.dtype)[:, None] / 100
    t = t.expand(*o.shape[:-1], 1)
    parts = [o, o * o, t, t**2, t**3, torch.ones_like(t)]
    return torch.where(mask[..., None] > 0, torch.cat(parts, -1), 0.0)


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum((-2, -1))
    mean = (values * mask).sum((-2, -1)) / count
    return ((values - mean[..., None, None]) ** 2 * mask).sum((-2, -1)) / count
