"""The meta-gradient against closed forms, finite differences and an obvious autograd loop."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.maml.adaptation import Adaptation, StepInputs
from pipeline.maml.adaptation_curve import adaptation_curve
from pipeline.maml.flat_vector import Layout
from pipeline.maml.inner_loop import Stages
from pipeline.maml.inner_optimizers import Point
from pipeline.maml.meta_gradient import Knobs, chunk_function
from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import conv4, linear, mlp
from tasks.base import Examples, TaskBatch
from tasks.quadratic import Quadratic
from tasks.sinusoid import Sinusoid
from tests.helpers import Cube, Images, images

ORDERS = ("second", "first")


def prepared(model, criterion):
    """Objective, layout and flat parameters, in double precision."""
    model = model.double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    layout = Layout.of(params)
    generator = torch.Generator().manual_seed(1)
    flat = layout.join(params)
    # Published initial weights are tiny or zero; a generic point says more.
    return (
        Objective(model, criterion),
        layout,
        flat + 0.3 * torch.randn(flat.shape, dtype=flat.dtype, generator=generator),
    )


def small_mlp():
    torch.manual_seed(0)
    return (
        prepared(mlp((1,), 1, hidden=(5, 4)), Sinusoid()),
        Sinusoid(shots=4, queries=3).sample(0, "train", np.arange(3)),
    )


def stride_conv():
    torch.manual_seed(0)
    shape = (1, 9, 9)
    return prepared(conv4(shape, 2, filters=3, layers=2), Images()), images(3, shape)


def pool_conv():
    torch.manual_seed(0)
    shape = (2, 8, 8)
    model = conv4(shape, 2, filters=3, layers=2, downsample="max-pool", head="flatten")
    return prepared(model, Images()), images(2, shape)


def every_parameter(layout, steps):
    """MAML's adaptation."""
    return Adaptation(steps, fast=tuple(layout.shapes_by_name))


CASES = {"mlp": small_mlp, "conv, stride": stride_conv, "conv, max-pool": pool_conv}


def gradient(case, alpha=0.05, steps=2, order="second", **options):
    (objective, layout, theta), batch = case
    chunk = chunk_function(
        objective, every_parameter(layout, steps), layout, order=order, **options
    )
    return chunk(theta, batch, Knobs(torch.tensor(alpha, dtype=theta.dtype)))


def unrolled(case, alpha, steps, order):
    """The definition, one task after the other; first order by stop-gradient."""
    (objective, layout, theta), batch = case
    theta = theta.clone().requires_grad_()
    total = torch.zeros((), dtype=theta.dtype)
    for i in range(len(batch.query.x)):
        support = Examples(batch.support.x[i], batch.support.y[i])
        adapted = theta
        for _ in range(steps):
            loss = objective.loss(layout.split(adapted), support)
            inner = torch.autograd.grad(loss, adapted, create_graph=True)[0]
            adapted = adapted - alpha * (inner if order == "second" else inner.detach())
        query = Examples(batch.query.x[i], batch.query.y[i])
        total = total + objective.loss(layout.split(adapted), query)
    return torch.autograd.grad(total, theta)[0], total.detach()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_closed_form_on_quadratics(steps, order):
    """Second order: sum_i (I − αΛ)^2K Λ (θ − c_i); first order with the power K."""
    task, alpha, indices = Quadratic(dimensions=5), 0.2, np.arange(7)
    objective, layout, theta = prepared(linear((5,), 1), task)
    total, _ = gradient(
        ((objective, layout, theta), task.sample(3, "train", indices)), alpha, steps, order
    )
    curvature = torch.from_numpy(task.curvatures)
    power = (2 if order == "second" else 1) * steps
    optima = torch.from_numpy(task.optima(3, "train", indices))
    expected = ((1 - alpha * curvature) ** power * curvature * (theta - optima)).sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_unrolled_loop(name, order):
    case = CASES[name]()
    total, metrics = gradient(case, steps=3, order=order)
    expected, loss = unrolled(case, 0.05, 3, order)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(metrics["query_loss"].sum(), loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_against_finite_differences(name):
    """`gradcheck` perturbs every parameter of the real, adapted query loss."""
    case = CASES[name]()
    (objective, layout, theta), batch = case

    class QueryLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, flat):
            total, metrics = gradient(((objective, layout, flat.detach()), batch))
            ctx.save_for_backward(total)
            return metrics["query_loss"].sum()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.saved_tensors[0]

    # Only a sample of the parameters: each costs two meta-gradients.
    free = torch.arange(0, len(theta), max(1, len(theta) // 25))

    def loss(values: Tensor) -> Tensor:
        return QueryLoss.apply(theta.index_put((free,), values))

    assert torch.autograd.gradcheck(
        loss, theta[free].clone().requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", CASES)
def test_first_order_differs_from_second(name):
    case = CASES[name]()
    second, first = (gradient(case, order=order)[0] for order in ORDERS)
    assert (second - first).norm() > 1e-3 * second.norm()


@pytest.mark.parametrize("order", ORDERS)
def test_chunks_add_up(order):
    case = stride_conv()
    setup, batch = case
    whole, metrics = gradient(case, order=order)
    parts = [
        gradient(
            (setup, TaskBatch(*(Examples(*(t[piece] for t in e)) for e in batch))), order=order
        )
        for piece in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole, rtol=1e-10, atol=1e-12)
    for name, values in metrics.items():
        joined = torch.cat([part[1][name] for part in parts])
        torch.testing.assert_close(joined, values, rtol=1e-10, atol=1e-12)


def test_metrics_are_per_task_and_from_where_they_say():
    case = stride_conv()
    (objective, layout, theta), batch = case
    _, metrics = gradient(case, steps=2)
    curve = adaptation_curve(
        objective,
        every_parameter(layout, 2),
        layout.split(theta),
        batch,
        torch.tensor(0.05).double(),
        steps=(0, 2, 4),
    )
    assert {name: tuple(v.shape) for name, v in curve.items()} == {
        "loss": (3, 3),
        "accuracy": (3, 3),
    }
    torch.testing.assert_close(metrics["query_loss"], curve["loss"][1])
    torch.testing.assert_close(metrics["query_accuracy"], curve["accuracy"][1])
    support = torch.stack(
        [
            objective.loss(layout.split(theta), Examples(x, y))
            for x, y in zip(batch.support.x, batch.support.y, strict=True)
        ]
    )
    torch.testing.assert_close(metrics["support_loss"], support)
    assert (metrics["adapted_support_loss"] < metrics["support_loss"]).all()


def test_shared_first_step_equals_a_step_per_task():
    (objective, layout, theta), batch = stride_conv()
    stages = Stages.of(objective, every_parameter(layout, 1))
    params = layout.split(theta)
    copies = {name: p.expand(3, *p.shape).contiguous() for name, p in params.items()}
    inputs = StepInputs({}, dict.fromkeys(params, torch.tensor(0.1).double()), torch.ones(()))
    outcomes = []
    for fast, shared in ((params, True), (copies, False)):
        point = Point(fast, {})
        step = stages.step(point, inputs, batch.support, shared)
        back = stages.step_back(point, step.gradient, inputs, batch.support, step.point, shared)
        outcomes.append({**step.point.fast, **{f"{n} back": v for n, v in back.point.fast.items()}})
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-12)


class CubeModel(nn.Module):
    def __init__(self, custom):
        super().__init__()
        self.layer, self.custom = nn.Linear(1, 1), custom

    def forward(self, x):
        z = self.layer(x)
        return Cube.apply(z) if self.custom else z**3


def test_a_model_without_forward_derivative_is_differentiated_in_reverse():
    batch = Sinusoid(shots=4, queries=3).sample(0, "train", np.arange(3))

    def result(custom):
        torch.manual_seed(0)
        return gradient((prepared(CubeModel(custom), Sinusoid()), batch), alpha=1e-3)[0]

    torch.testing.assert_close(result(True), result(False), rtol=1e-9, atol=1e-9)


def test_forward_and_reverse_differentiation_agree():
    from pipeline.maml.inner_loop import hessian_vector_product

    (objective, layout, theta), batch = pool_conv()
    support = Examples(batch.support.x[0], batch.support.y[0])
    params, v = layout.split(theta), layout.split(torch.cos(theta))
    products = [
        hessian_vector_product(objective.loss, params, {}, support, v, forward=forward)
        for forward in (True, False)
    ]
    torch.testing.assert_close(layout.join(products[0]), layout.join(products[1]))


def test_models_with_buffers_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"buffers.*running_mean"):
        Objective(model, Sinusoid())


def test_models_without_parameters_are_refused():
    with pytest.raises(ValueError, match="no parameters"):
        Objective(nn.Flatten(), Sinusoid())


def test_nothing_is_changed_in_place():
    case = stride_conv()
    (_, _, theta), batch = case
    before = [theta.clone(), batch.support.x.clone(), batch.query.x.clone()]
    gradient(case)
    for old, now in zip(before, (theta, batch.support.x, batch.query.x), strict=True):
        assert torch.equal(old, now)


def test_layout_round_trip():
    params = {"b": torch.randn(2, 3), "a": torch.randn(4), "scalar": torch.randn(())}
    layout = Layout.of(params)
    flat = layout.join(params)
    assert layout.size == flat.numel() == 11
    split = layout.split(flat)
    assert list(split) == ["b", "a", "scalar"]
    assert all(torch.equal(split[name], params[name]) for name in params)
    # By name, not by the order of the dictionary.
    assert torch.equal(layout.join(dict(reversed(list(params.items())))), flat)


def test_cross_entropy_is_a_mean():
    prediction, target = torch.randn(6, 3), torch.arange(3).repeat(2)
    expected = -F.log_softmax(prediction, -1)[torch.arange(6), target].sum() / 6
    torch.testing.assert_close(Images().loss(prediction, target), expected)
