"""The layers against torch's own, and the published networks' sizes."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.maml.models import BatchNorm, Conv3x3, MaxPool2x2, conv4, linear, mlp


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (6, 9), (8, 8)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_conv3x3_is_a_convolution(size, stride, bias):
    torch.manual_seed(0)
    layer = Conv3x3(3, 4, stride, bias).double()
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    # Weights are ordered (row tap, column tap, input channel), output channel.
    weight = layer.weight.view(3, 3, 3, 4).permute(3, 2, 0, 1)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, layer.bias, stride=stride, padding=1)
    torch.testing.assert_close(layer(x), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (8, 6)])
def test_max_pool(size):
    x = torch.randn(2, *size, 3)
    expected = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert torch.equal(MaxPool2x2()(x), expected)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 5, 4)])
def test_batch_norm_uses_the_statistics_of_the_batch(shape):
    layer = BatchNorm(4)
    nn.init.normal_(layer.bias)
    x = 3 + 2 * torch.randn(shape)
    expected = F.batch_norm(
        x.reshape(-1, 4), None, None, bias=layer.bias, training=True, eps=layer.epsilon
    )
    for mode in (layer.train(), layer.eval()):
        torch.testing.assert_close(mode(x), expected.view(shape))
    assert not list(layer.buffers())


def test_published_sizes():
    """Counted by hand from the original code (convolution biases, which it also has, cancel)."""
    assert num_parameters(mlp((1,), 1)) == 1761
    omniglot = 9 * 64 + 64 + 3 * (9 * 64 * 64 + 64) + 64 * 5 + 5
    assert num_parameters(conv4((1, 28, 28), 5)) == omniglot == 111_749
    mini_imagenet = 9 * 3 * 32 + 32 + 3 * (9 * 32 * 32 + 32) + 800 * 5 + 5
    model = conv4((3, 84, 84), 5, filters=32, downsample="max-pool", head="flatten")
    assert num_parameters(model) == mini_imagenet == 32_645
    hidden = [784, 256, 128, 64, 64]
    images = sum(a * b + 2 * b for a, b in pairwise(hidden)) + 64 * 5 + 5
    model = mlp((1, 28, 28), 5, hidden=(256, 128, 64, 64), normalisation="batch")
    assert num_parameters(model) == images


@pytest.mark.parametrize("normalisation", ["batch", "none"])
@pytest.mark.parametrize("downsample", ["stride", "max-pool"])
@pytest.mark.parametrize("head", ["mean", "flatten"])
def test_output_shapes(normalisation, downsample, head):
    model = conv4(
        (3, 20, 23), 7, filters=4, downsample=downsample, head=head, normalisation=normalisation
    )
    assert model(torch.randn(2, 3, 20, 23)).shape == (2, 7)


def test_initialisation():
    torch.manual_seed(0)
    layers = [m for m in mlp((1,), 1, hidden=(300, 300)) if isinstance(m, nn.Linear)]
    weight = layers[1].weight
    assert weight.abs().max() <= 0.02  # truncated at two deviations
    # The deviation of a normal distribution truncated there is 0.88 of the original one.
    assert weight.std().item() == pytest.approx(0.0088, rel=0.02)
    assert all(not layer.bias.any() for layer in layers)
    conv = Conv3x3(64, 64, 2, bias=True)
    bound = math.sqrt(6 / (9 * 64 + 9 * 64))
    assert conv.weight.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not conv.bias.any()


def test_linear_has_no_bias_unless_asked():
    assert num_parameters(linear((4,), 1)) == 4
    assert num_parameters(linear((2, 2), 3, bias=True)) == 15


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: conv4((28, 28), 5), "images"),
        (lambda: conv4((1, 28, 28), 5, filters=0), "model.filters"),
        (lambda: conv4((1, 28, 28), 5, layers=0), "model.layers"),
        (lambda: conv4((1, 8, 8), 5, downsample="max-pool"), "model.layers"),
        (lambda: mlp((1,), 1, hidden=(40, 0)), "model.hidden"),
    ],
)
def test_impossible_sizes_are_named(build, field):
    with pytest.raises(ValueError, match=field):
        build()
