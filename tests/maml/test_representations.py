"""Representations: whose they are, and measures of likeness with known values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import vmap

from pipeline.maml.models import conv4, mlp
from pipeline.maml.representations import (
    head_inputs,
    layer_outputs,
    linear_cka,
    mean_cca,
    nearest_centroid,
    weight_layers,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(noise(size, size, seed=9))[0]


def test_cka_and_cca_of_the_same_representation_are_one() -> None:
    x = noise(60, 4)
    for alike in (linear_cka, mean_cca):
        assert alike(x, x) == pytest.approx(1)
        # Neither looks at directions, size or offset.
        assert alike(x, 3 * x @ rotation(4) + 7) == pytest.approx(1)
    # Any invertible map is the same to CCA, but not to CKA.
    stretched = x @ torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    assert mean_cca(x, stretched) == pytest.approx(1)
    assert linear_cka(x, stretched) < 0.9


def test_cka_and_cca_of_orthogonal_representations_are_zero() -> None:
    columns = torch.linalg.qr(noise(50, 9) - noise(50, 9).mean(0))[0]
    columns = torch.linalg.qr(torch.cat([torch.ones(50, 1, dtype=torch.float64), columns], 1))[0]
    x, y = columns[:, 1:5], columns[:, 5:9]
    assert linear_cka(x, y) == pytest.approx(0, abs=1e-12)
    assert mean_cca(x, y) == pytest.approx(0, abs=1e-9)


def test_cka_is_the_published_formula() -> None:
    """Kornblith et al. 2019, eq. 3: HSIC of the two Gram matrices."""
    x, y = noise(20, 5), noise(20, 3, seed=1)
    centring = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, m = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    hsic = (k * m).sum() / ((k * k).sum().sqrt() * (m * m).sum().sqrt())
    torch.testing.assert_close(linear_cka(x, y), hsic)


def test_what_cannot_be_measured_is_nan() -> None:
    constant = torch.ones(50, 3)
    assert math.isnan(linear_cka(constant, noise(50, 3)))
    assert math.isnan(mean_cca(constant, noise(50, 3)))
    assert math.isnan(mean_cca(noise(10, 8), noise(10, 8, seed=1)))  # all noise looks alike


def test_positions_of_an_image_are_examples() -> None:
    x = noise(4, 5, 5, 3)
    torch.testing.assert_close(
        linear_cka(x, x.flatten(0, 2) @ rotation(3)), torch.ones(()).double()
    )


def test_layers_are_weights_and_what_follows_up_to_the_next() -> None:
    model = mlp((3,), 2, hidden=(5, 4), normalisation="batch")
    params = dict(model.named_parameters())
    x = torch.randn(7, 3)
    outputs = layer_outputs(model, params, x)
    assert [kind for _, kind in weight_layers(model)] == ["Linear"] * 3
    assert list(outputs) == [name for name, _ in weight_layers(model)]
    after_first = model[:4](x)  # flatten, linear, normalisation, ReLU
    torch.testing.assert_close(outputs["1"], after_first)
    torch.testing.assert_close(outputs["7"], model(x))
    torch.testing.assert_close(head_inputs(model, params, x), model[:-1](x))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_conv_layers_have_their_channels_last_and_tasks_their_own_weights() -> None:
    model = conv4((1, 8, 8), 3, filters=6, layers=2)
    params = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}
    x = torch.randn(2, 5, 1, 8, 8)
    outputs = vmap(lambda p, x: layer_outputs(model, p, x))(params, x)
    assert [tuple(t.shape) for t in outputs.values()] == [(2, 5, 4, 4, 6), (2, 5, 6), (2, 5, 3)]
    torch.testing.assert_close(outputs["8"][0], model(x[0]))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x)).mean((2, 3))

    own = Own()
    outputs = layer_outputs(own, dict(own.named_parameters()), torch.randn(3, 1, 8, 8))
    assert outputs["one"].shape == (3, 6, 6, 4)


def test_nearest_centroid_by_hand() -> None:
    support = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 2.0]])
    query = torch.tensor([[5.0, 0.1], [0.1, 0.3], [-1.0, 9.0]])
    scores = nearest_centroid(support, torch.tensor([0, 0, 1]), query, 2)
    assert scores.argmax(-1).tolist() == [0, 1, 1]
    centroid = torch.tensor([2.0, 0.5])
    wanted = torch.cosine_similarity(query[0], centroid, dim=0)
    torch.testing.assert_close(scores[0, 0], wanted)
