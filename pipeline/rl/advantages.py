"""Advantages of actions: a fitted baseline, and generalised advantage estimation.

The baseline is a linear function of features of observation and time (Duan et al. 2016). For every
task and every step of adaptation it is fitted to the discounted returns of the same trajectories
that it is subtracted from. A trajectory ends at the horizon: as in the code of Finn et al., no
value is added for the time after it.

Shapes: B tasks, n trajectories, H time steps, F = 2·O + 4 features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.control.mdp import Trajectories

_RIDGE = 1e-5
_LARGEST_OBSERVATION = 10.0  # as in that code: squares of outliers would dominate the fit
_TINY = 1e-8


class Advantages(NamedTuple):
    """The advantages of the actions of B tasks, and how good the baseline was."""

    values: Tensor
    """Standardised over the valid steps of each task, [B, n, H]; 0 where masked."""
    explained_variance: Tensor
    """The part of the variance of the discounted returns that the baseline explains, [B]: 1 where
    it is perfect, 0 where it is as good as their mean."""


def advantages(trajectories: Trajectories, discount: float, gae_lambda: float) -> Advantages:
    """Generalised advantages (Schulman et al. 2016) of every action of B tasks.

    With rewards r_t, baseline V_t, discount γ and λ = `gae_lambda`: δ_t = r_t + γ V_{t+1} − V_t and
    A_t = Σ_{t' ≥ t} (γλ)^(t' − t) δ_t', standardised over the valid steps of each task. Tensors of
    `trajectories` have the leading dimension B.
    """
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
    ahead = times[:, None] - times  # t' - t: t' by row, t by column
    weights = torch.where(ahead >= 0, discount ** ahead.clamp(min=0).to(values.dtype), 0.0)
    return values @ weights


def fitted(observations: Tensor, mask: Tensor, returns: Tensor) -> Tensor:
    """The values of the baseline [B, n, H], fitted by least squares for each task; 0 where masked.

    `observations` [B, n, H, O], `mask` and `returns` [B, n, H]. The features are nearly dependent,
    so the fit uses a small ridge and double precision.
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
    """Shift and scale [B, n, H] to mean 0 and deviation 1 over the valid steps of each task; 0
    where masked."""
    count = mask.sum((-2, -1), keepdim=True)
    centred = (values - values.sum((-2, -1), keepdim=True) / count) * mask
    deviation = torch.sqrt((centred * centred).sum((-2, -1), keepdim=True) / count)
    return centred / (deviation + _TINY)


def _features(observations: Tensor, mask: Tensor) -> Tensor:
    """The features o, o², t/100, (t/100)², (t/100)³ and 1, [B, n, H, F]; 0 where masked."""
    o = observations.clamp(-_LARGEST_OBSERVATION, _LARGEST_OBSERVATION)
    t = torch.arange(o.shape[-2], device=o.device, dtype=o.dtype)[:, None] / 100
    t = t.expand(*o.shape[:-1], 1)
    parts = [o, o * o, t, t**2, t**3, torch.ones_like(t)]
    return torch.where(mask[..., None] > 0, torch.cat(parts, -1), 0.0)


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    """Variance over the valid steps of each task, [B, n, H] -> [B]."""
    count = mask.sum((-2, -1))
    mean = (values * mask).sum((-2, -1)) / count
    return ((values - mean[..., None, None]) ** 2 * mask).sum((-2, -1)) / count
