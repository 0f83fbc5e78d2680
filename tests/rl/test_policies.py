"""Distributions of actions: torch's own, and sampled as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.rl.policies import CATEGORICAL, GAUSSIAN, distribution_of
from tasks.random import task_keys


def test_gaussian_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    action = torch.randn(7, 3, generator=generator, dtype=torch.float64)

    def torchs(prediction: Tensor) -> torch.distributions.Distribution:
        mean, log_std = prediction.chunk(2, -1)
        return torch.distributions.Normal(mean, log_std.exp())

    torch.testing.assert_close(
        GAUSSIAN.log_probability(new, action), torchs(new).log_prob(action).sum(-1)
    )
    torch.testing.assert_close(GAUSSIAN.entropy(new), torchs(new).entropy().sum(-1))
    kl = torch.distributions.kl_divergence(torchs(old), torchs(new)).sum(-1)
    torch.testing.assert_close(GAUSSIAN.kl(old, new), kl)


def test_categorical_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    action = torch.randint(4, (7,), generator=generator)
    was, now = (torch.distributions.Categorical(logits=scores) for scores in (old, new))
    torch.testing.assert_close(CATEGORICAL.log_probability(new, action), now.log_prob(action))
    torch.testing.assert_close(CATEGORICAL.entropy(new), now.entropy())
    kl = torch.distributions.kl_divergence(was, now)
    torch.testing.assert_close(CATEGORICAL.kl(old, new), kl)


@pytest.mark.parametrize("actions", ["continuous", "discrete"])
def test_sampled_actions_have_the_predicted_distribution(actions: str) -> None:
    distribution = distribution_of(actions)  # type: ignore[arg-type]
    keys = task_keys(0, "train", np.arange(2))
    prediction = torch.tensor([0.5, -1.0, 0.1, -0.7], dtype=torch.float64)
    noise = distribution.noise(keys, 1, 200, 100, 4)
    sampled = distribution.sample(prediction.expand(2, 200, 100, 4), noise)
    if actions == "continuous":
        assert torch.allclose(sampled.mean((0, 1, 2)), prediction[:2], atol=0.03)
        assert torch.allclose(sampled.std((0, 1, 2)), prediction[2:].exp(), atol=0.03)
    else:
        frequency = torch.bincount(sampled.flatten(), minlength=4) / sampled.numel()
        assert torch.allclose(frequency.double(), prediction.softmax(-1), atol=0.01)
    # A task's noise is its own, whoever is sampled beside it.
    torch.testing.assert_close(noise[1:], distribution.noise(keys[1:], 1, 200, 100, 4))
