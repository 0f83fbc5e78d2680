"""Every algorithm of the family against its paper, written out by hand, task by task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.config.algorithms import PRESETS
from pipeline.maml.adaptation import RATE, Adaptation
from pipeline.maml.adaptation_curve import adapt
from pipeline.maml.flat_vector import Layout, Params
from pipeline.maml.inner_optimizers import build_inner_optimizer
from pipeline.maml.meta_gradient import Knobs, chunk_function
from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import conv4, mlp
from tasks.base import Examples, TaskBatch
from tasks.quadratic import Quadratic
from tasks.sinusoid import Sinusoid
from tests.maml.test_meta_gradient import Images, images

STEPS, ALPHA = 3, 0.05
WEIGHTS = (0.2, 0.3, 0.5)


def regression() -> tuple[nn.Module, Any, TaskBatch]:
    model = mlp((1,), 1, hidden=(5, 4), normalisation="batch-affine", init_std=0.5)
    return model, Sinusoid(), Sinusoid(shots=6, queries=5).sample(0, "train", np.arange(3))


def classification() -> tuple[nn.Module, Any, TaskBatch]:
    shape = (1, 8, 8)
    model = conv4(shape, 2, filters=3, layers=2, normalisation="batch-affine")
    return model, Images(), images(3, shape, shots=2, queries=2)


CASES = {"mlp": regression, "conv": classification}
Loss = Callable[[Params, Examples], Tensor]


def grads(loss: Tensor, params: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, params, create_graph=True))


def maml(theta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
    for _ in range(STEPS):
        names = list(theta)
        g = grads(loss(theta, support), [theta[n] for n in names])
        theta = {n: theta[n] - ALPHA * g[i] for i, n in enumerate(names)}
    return loss(theta, query)


def fomaml(theta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
    for _ in range(STEPS):
        names = list(theta)
        g = grads(loss(theta, support), [theta[n] for n in names])
        theta = {n: theta[n] - ALPHA * g[i].detach() for i, n in enumerate(names)}
    return loss(theta, query)


def only(is_adapted: Callable[[str], bool]) -> Callable[..., Tensor]:
    def algorithm(theta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
        for _ in range(STEPS):
            names = [n for n in theta if is_adapted(n)]
            g = grads(loss(theta, support), [theta[n] for n in names])
            theta = theta | {n: theta[n] - ALPHA * g[i] for i, n in enumerate(names)}
        return loss(theta, query)

    return algorithm


def meta_sgd(meta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
    theta = {n: p for n, p in meta.items() if not n.startswith(RATE)}
    for _ in range(STEPS):
        names = list(theta)
        g = grads(loss(theta, support), [theta[n] for n in names])
        theta = {n: theta[n] - meta[RATE + n] * g[i] for i, n in enumerate(names)}
    return loss(theta, query)


def maml_plus_plus(meta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
    """Rates per layer and step, normalisation of its own in every step, weighted query losses."""
    norms = [n for n in meta if n.endswith("scale") or f"{n[:-4]}scale" in meta]
    fast = {n: p for n, p in meta.items() if n not in norms and not n.startswith(RATE)}
    total = torch.zeros((), dtype=torch.float64)
    for s in range(STEPS):
        of_step = {n: meta[n][s] for n in norms}
        names = list(fast)
        g = grads(loss(fast | of_step, support), [fast[n] for n in names])
        fast = {n: fast[n] - meta[RATE + n][s] * g[i] for i, n in enumerate(names)}
        total = total + WEIGHTS[s] * loss(fast | of_step, query)
    return total


def adam(theta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
    mean = {n: torch.zeros_like(p) for n, p in theta.items()}
    square = {n: torch.zeros_like(p) for n, p in theta.items()}
    for t in range(1, STEPS + 1):
        names = list(theta)
        g = dict(zip(names, grads(loss(theta, support), [theta[n] for n in names]), strict=True))
        mean = {n: 0.9 * mean[n] + 0.1 * g[n] for n in names}
        square = {n: 0.999 * square[n] + 0.001 * g[n] ** 2 for n in names}
        theta = {
            n: theta[n]
            - ALPHA
            * (mean[n] / (1 - 0.9**t))
            / ((square[n] / (1 - 0.999**t) + 1e-300).sqrt() + 1e-8)
            for n in names
        }
    return loss(theta, query)


def momentum(theta: Params, support: Examples, query: Examples, loss: Loss) -> Tensor:
    velocity = {n: torch.zeros_like(p) for n, p in theta.items()}
    for _ in range(STEPS):
        names = list(theta)
        g = grads(loss(theta, support), [theta[n] for n in names])
        velocity = {n: 0.8 * velocity[n] + g[i] for i, n in enumerate(names)}
        theta = {n: theta[n] - ALPHA * velocity[n] for n in names}
    return loss(theta, query)


def is_head(model: nn.Module) -> Callable[[str], bool]:
    last = [name for name, _ in model.named_parameters()][-1].split(".")[0]
    return lambda name: name.split(".")[0] == last


BY_HAND: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "maml": lambda model: maml,
    "fomaml": lambda model: fomaml,
    "anil": lambda model: only(is_head(model)),
    "boil": lambda model: only(lambda name: not is_head(model)(name)),
    "meta-sgd": lambda model: meta_sgd,
    "maml++": lambda model: maml_plus_plus,
    "maml with adam": lambda model: adam,
    "maml with momentum": lambda model: momentum,
}
OWN = {
    "maml with adam": {"optimizer": build_inner_optimizer("adam")},
    "maml with momentum": {"optimizer": build_inner_optimizer("momentum", momentum=0.8)},
}


def adaptation_for(name: str, model: nn.Module) -> Adaptation:
    preset = PRESETS[name].settings if name in PRESETS else {}
    return Adaptation.of(
        model,
        steps=STEPS,
        adapted=preset.get("inner.adapted", ["all"]),
        not_adapted=preset.get("inner.not_adapted", []),
        per_step=preset.get("inner.per_step", []),
        rates=preset.get("inner.rates", "fixed"),
        **OWN.get(name, {}),
    )


def perturbed(meta: Params) -> Params:
    """A generic point: published initial values are full of zeros, ones and equal rates."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: p
        + (0.01 if name.startswith(RATE) else 0.2)
        * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in meta.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BY_HAND)
def test_meta_gradient_equals_the_algorithm_by_hand(name: str, case: str) -> None:
    """With respect to every meta-parameter: θ, rates, normalisation per step, head."""
    torch.manual_seed(0)
    model, criterion, batch = CASES[case]()
    model = model.double()
    batch = batch.to("cpu", torch.float64)
    adaptation = adaptation_for(name, model)
    meta = perturbed(adaptation.meta_parameters(dict(model.named_parameters()), ALPHA))
    layout = Layout.of(meta)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) if name == "maml++" else None
    chunk = chunk_function(
        Objective(model, criterion),
        adaptation,
        layout,
        order="first" if name == "fomaml" else "second",
    )
    total, _ = chunk(
        layout.join(meta), batch, Knobs(torch.tensor(ALPHA, dtype=torch.float64), weights)
    )

    def loss(params: Params, examples: Examples) -> Tensor:
        return criterion.loss(functional_call(model, params, (examples.x,)), examples.y)

    leaves = {n: p.clone().requires_grad_() for n, p in meta.items()}
    by_hand = BY_HAND[name](model)
    losses = [
        by_hand(
            dict(leaves),
            Examples(batch.support.x[i], batch.support.y[i]),
            Examples(batch.query.x[i], batch.query.y[i]),
            loss,
        )
        for i in range(len(batch.query.x))
    ]
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    named = layout.split(total)
    for n, g in zip(leaves, expected, strict=True):
        torch.testing.assert_close(
            named[n], g, rtol=1e-8, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}"
        )
        assert g.abs().max() > 0, f"{n} has a gradient to compare"


def test_every_algorithm_is_compared_by_hand_or_below() -> None:
    assert set(PRESETS) - set(BY_HAND) == {"reptile"}


def reptile(theta: Tensor, batch: TaskBatch, steps: int, rate: float) -> Tensor:
    model = nn.Sequential(nn.Flatten(), nn.Linear(batch.support.x.shape[-1], 1, bias=False))
    adaptation = Adaptation.of(model.double(), steps=steps)
    layout = Layout.of(dict(model.named_parameters()))
    chunk = chunk_function(
        Objective(model, Quadratic(dimensions=theta.numel())),
        adaptation,
        layout,
        order="first",
        direction="reptile",
    )
    return chunk(theta, batch, Knobs(torch.tensor(rate, dtype=torch.float64)))[0]


def test_reptile_points_from_where_tasks_lead_to_theta() -> None:
    """On quadratics θ'_S = c + (1 − αΛ)^S (θ − c), so θ − θ'_S = (1 − (1 − αΛ)^S)(θ − c): its
    expectation vanishes at the mean optimum, and descent along it goes there."""
    task, steps, rate = Quadratic(dimensions=4), 3, 0.1
    theta = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    indices = np.arange(2000)
    batch = task.sample(0, "train", indices)
    optima = torch.from_numpy(task.optima(0, "train", indices))
    shrink = 1 - (1 - rate * torch.from_numpy(task.curvatures)) ** steps
    measured = reptile(theta, batch, steps, rate)
    torch.testing.assert_close(measured, (shrink * (theta - optima)).sum(0), rtol=1e-9, atol=1e-9)
    at_optimum = reptile(optima.mean(0), batch, steps, rate) / len(indices)
    torch.testing.assert_close(at_optimum, torch.zeros(4).double(), atol=1e-9, rtol=0)


def test_reptile_takes_its_support_set_in_turns() -> None:
    model = nn.Linear(1, 1)
    adaptation = Adaptation.of(model, steps=3, batch_size=4)
    support = Examples(torch.arange(6.0).reshape(1, 6, 1), torch.zeros(1, 6, 1))
    seen = [support.at_step(s, adaptation.batch_size).x.flatten().tolist() for s in range(3)]
    assert seen == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]


def test_anil_leaves_the_body_alone_but_learns_it() -> None:
    model, criterion, batch = classification()
    adaptation = adaptation_for("anil", model)
    meta = adaptation.meta_parameters(dict(model.named_parameters()), ALPHA)
    head = {n for n in meta if is_head(model)(n)}
    objective, batch = Objective(model, criterion), batch.to("cpu", torch.float32)
    *_, last = adapt(
        objective, adaptation, meta, batch.support, torch.tensor(ALPHA), 3, len(batch.query.x)
    )
    assert set(last.fast) == head
    assert all(torch.equal(last.slow[n], meta[n]) for n in set(meta) - head)
    layout = Layout.of(meta)
    total, _ = chunk_function(objective, adaptation, layout)(
        layout.join(meta), batch, Knobs(torch.tensor(ALPHA))
    )
    assert all(g.abs().max() > 0 for g in layout.split(total).values())


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_inner_adam_is_torchs(beta1: float) -> None:
    model = mlp((1,), 1, hidden=(5,), init_std=0.5).double()
    batch = Sinusoid(shots=6, queries=5).sample(0, "train", np.arange(1)).to("cpu", torch.float64)
    adaptation = Adaptation.of(model, steps=6, optimizer=build_inner_optimizer("adam", beta1=beta1))
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    objective = Objective(model, Sinusoid())
    alpha = torch.tensor(0.01, dtype=torch.float64)
    *_, last = adapt(objective, adaptation, params, batch.support, alpha, 6, len(batch.query.x))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(beta1, 0.999))
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch.support.x[0]), batch.support.y[0]).backward()
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(last.fast[n][0], p.detach(), rtol=1e-9, atol=1e-12)


def test_inner_adam_survives_units_without_gradient() -> None:
    """√0 has no derivative; a dead unit must not make everything NaN."""
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    batch = Sinusoid(shots=6, queries=5).sample(0, "train", np.arange(2)).to("cpu", torch.float64)
    adaptation = Adaptation.of(model, steps=2, optimizer=build_inner_optimizer("adam"))
    layout = Layout.of(dict(model.named_parameters()))
    flat = layout.join({n: p.detach() for n, p in model.named_parameters()})
    chunk = chunk_function(Objective(model, Sinusoid()), adaptation, layout)
    assert torch.isfinite(
        chunk(flat, batch, Knobs(torch.tensor(0.01, dtype=torch.float64)))[0]
    ).all()


def test_steps_beyond_the_trained_ones_repeat_the_last() -> None:
    model = mlp((1,), 1, hidden=(4,), normalisation="batch-affine")
    adaptation = adaptation_for("maml++", model)
    meta = perturbed(adaptation.meta_parameters(dict(model.named_parameters()), ALPHA))
    alpha = torch.tensor(ALPHA)
    for later in (STEPS, STEPS + 7):
        for of in (adaptation.slow, lambda m, s: adaptation.at(m, alpha, s).rates):
            assert all(torch.equal(v, of(meta, later)[n]) for n, v in of(meta, STEPS - 1).items())
    assert not torch.equal(
        *(adaptation.at(meta, alpha, s).rates[adaptation.fast[0]] for s in (0, 1))
    )
