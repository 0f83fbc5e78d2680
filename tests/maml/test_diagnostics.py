"""Diagnostics against closed forms and slow obvious code; warnings; records, plots, any workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.config.loading import ConfigError
from pipeline.evaluation.health import EXPLODES, health, verdict, warnings_of, why_not_finite
from pipeline.evaluation.run_report import read_diagnoses
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.diagnostics import diagnose
from pipeline.maml.flat_vector import Layout
from pipeline.maml.meta_gradient import Knobs
from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import linear, mlp
from pipeline.runs.checkpoint import load_theta
from pipeline.training.endings import Diverged
from pipeline.training.loop import train
from tasks.base import TaskBatch
from tasks.quadratic import Quadratic
from tasks.sinusoid import Sinusoid
from tests.conftest import experiment_of
from tests.helpers import Recorder, final_theta

STEPS, ALPHA = 3, 0.05


def sinusoids() -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    model = mlp((1,), 1, hidden=(5, 4), init_std=0.5).double()
    batch = Sinusoid(shots=6, queries=5).sample(0, "train", np.arange(3))
    return model, batch.to("cpu", torch.float64)


def diagnosed(
    model: nn.Module, task: Any, batch: TaskBatch, alpha: float = ALPHA, **options: Any
) -> Any:
    meta = {name: p.detach() for name, p in model.named_parameters()}
    adaptation = Adaptation.of(model, steps=options.pop("steps", STEPS))
    knobs = Knobs(torch.tensor(alpha, dtype=torch.float64), options.pop("weights", None))
    options = {"order": "second", **options}
    return diagnose(Objective(model, task), adaptation, meta, batch, knobs, **options)


def unrolled(
    model: nn.Module, batch: TaskBatch, task: int, weights: list[float]
) -> tuple[list[Tensor], Tensor]:
    """θ_0 .. θ_S of a task as nodes of one graph, and the meta-loss: obvious code."""
    names = [name for name, _ in model.named_parameters()]
    point = [p.detach().clone().requires_grad_() for p in model.parameters()]
    points, meta_loss = [point], torch.zeros((), dtype=torch.float64)
    for step in range(STEPS):
        x, y = batch.support.x[task], batch.support.y[task]
        loss = nn.functional.mse_loss(
            functional_call(model, dict(zip(names, point, strict=True)), (x,)), y
        )
        gradient = torch.autograd.grad(loss, point, create_graph=True)
        point = [p - ALPHA * g for p, g in zip(point, gradient, strict=True)]
        points.append(point)
        x, y = batch.query.x[task], batch.query.y[task]
        loss = nn.functional.mse_loss(
            functional_call(model, dict(zip(names, point, strict=True)), (x,)), y
        )
        meta_loss = meta_loss + weights[step] * loss
    return points, meta_loss


@pytest.mark.parametrize("weights", [[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
def test_norms_of_the_meta_gradient_by_step(weights: list[float]) -> None:
    model, batch = sinusoids()
    given = None if weights[0] == 0 else torch.tensor(weights, dtype=torch.float64)
    found = diagnosed(model, Sinusoid(), batch, weights=given).metrics["gradient_norm"]
    assert found.shape == (STEPS + 1, 3)
    for task in range(3):
        points, meta_loss = unrolled(model, batch, task, weights)
        for step, point in enumerate(points):
            gradient = torch.autograd.grad(meta_loss, point, retain_graph=True)
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            torch.testing.assert_close(found[step, task], norm)


def test_norms_do_not_change_on_the_way_of_first_order() -> None:
    model, batch = sinusoids()
    norms = diagnosed(model, Sinusoid(), batch, order="first").metrics["gradient_norm"]
    torch.testing.assert_close(norms, norms[-1:].expand_as(norms))


def test_curvature_is_that_of_the_hessian() -> None:
    model, batch = sinusoids()
    found = diagnosed(model, Sinusoid(), batch).metrics["curvature"]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    layout = Layout.of(dict(model.named_parameters()))
    for task in range(3):

        def loss(flat: Tensor, task: int = task) -> Tensor:
            prediction = functional_call(model, layout.split(flat), (batch.support.x[task],))
            return nn.functional.mse_loss(prediction, batch.support.y[task])

        at = flat
        for step in range(STEPS):
            g = torch.func.grad(loss)(at)
            hessian = torch.autograd.functional.hessian(loss, at)
            torch.testing.assert_close(found[step, task], g @ hessian @ g / (g @ g))
            at = at - ALPHA * g


def test_quadratics_have_closed_forms() -> None:
    """v_s = (I − αΛ)^(S−s) ∇L(θ_S) and inner losses ½ (θ_s − c)ᵀ Λ (θ_s − c)."""
    task = Quadratic(dimensions=3)
    batch = task.sample(0, "train", np.arange(4)).to("cpu", torch.float64)
    model = linear((3,), 1).double()
    theta = next(model.parameters()).detach().numpy().ravel()
    found = diagnosed(model, task, batch, alpha=0.3)
    decay = 1 - 0.3 * task.curvatures
    for i, optimum in enumerate(task.optima(0, "train", np.arange(4))):
        away = theta - optimum
        v = decay**STEPS * task.curvatures * away
        for s in range(STEPS):
            reached = decay**s * away
            loss = 0.5 * (task.curvatures * reached**2).sum()
            assert found.metrics["inner_loss"][s, i] == pytest.approx(loss)
            norm = np.linalg.norm(decay ** (STEPS - s) * v)
            assert found.metrics["gradient_norm"][s, i] == pytest.approx(norm)
    assert not found.metrics["hurt"].any()
    # A rate beyond 2 / λ climbs.
    assert diagnosed(model, task, batch, alpha=5.0).metrics["hurt"].all()


def test_both_orders_are_those_of_training(quick: dict[str, Any]) -> None:
    from pipeline.worker.chunk import ChunkComputer
    from pipeline.worker.jobs import DiagnosisJob
    from pipeline.worker.learner import initial_parameters

    gradients = {}
    for order in ("second", "first"):
        experiment = experiment_of(quick, inner={"order": order}, compute={"dtype": "float64"})
        computer = ChunkComputer(experiment, compile=False)
        theta = initial_parameters(experiment)
        flat = Layout.of(theta).join(theta).numpy()
        # The tasks of a gradient job in place of the validation tasks.
        batch = computer.program()[1]
        computer._source.held_out = lambda *a, batch=batch: batch  # type: ignore[method-assign]
        gradients[order] = computer.program(1)[0](
            torch.from_numpy(flat), batch, Knobs(torch.tensor(0.01, dtype=torch.float64))
        )[0]
        result = computer.run(flat, DiagnosisJob(0, 0, 3))
    assert result.gradient is not None
    np.testing.assert_allclose(result.gradient[0], gradients["second"].numpy())
    np.testing.assert_allclose(result.gradient[1], gradients["first"].numpy())
    metrics = health(experiment, Layout.of(theta), flat, [result])
    one, other = gradients["second"], gradients["first"]
    cosine = float(one @ other / one.norm() / other.norm())
    assert metrics["diagnostics/order_cosine"] == pytest.approx(cosine)
    ratio = float(one.norm() / other.norm())
    assert metrics["diagnostics/order_norm_ratio"] == pytest.approx(ratio)


def test_reptile_has_no_meta_gradient_to_diagnose() -> None:
    model, batch = sinusoids()
    found = diagnosed(model, Sinusoid(), batch, direction="reptile")
    assert found.second is found.first is None
    assert set(found.metrics) == {"inner_loss", "curvature", "hurt"}


# Over a run.


def test_training_is_not_touched_and_workers_do_not_matter(
    quick: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    train(experiment_of(quick), tmp_path / "without")
    diagnosed = experiment_of(quick, diagnostics={"every": 2, "tasks": 7})
    train(diagnosed, tmp_path / "here")
    two = experiment_of(quick, diagnostics={"every": 2, "tasks": 7}, cluster={"workers": 2})
    train(two, tmp_path / "actors")
    assert torch.equal(final_theta(tmp_path / "without"), final_theta(tmp_path / "here"))
    records = read_diagnoses(tmp_path / "here")
    assert [record["iteration"] for record in records] == [2, 4, 6]
    assert records == read_diagnoses(tmp_path / "actors")
    assert read_diagnoses(tmp_path / "without") == []
    drawn = {path.name for path in (tmp_path / "here" / "plots").glob("health_*.png")}
    wanted = ("gradient_norm", "inner_loss", "curvature", "order", "hurt")
    assert drawn == {f"health_{name}.png" for name in wanted}


@pytest.mark.parametrize("rates", ["per-layer-and-step", "per-parameter"])
def test_learned_rates_are_recorded_and_drawn(
    quick: dict[str, Any], tmp_path: Path, rates: str
) -> None:
    # The last layer has as many biases as there are steps: shapes tell nothing.
    experiment = experiment_of(
        {**quick, "task": {"kind": "tests.helpers:OwnClasses"}},
        inner={"rates": rates},
        diagnostics={"every": 3},
    )
    train(experiment, tmp_path / "run")
    last = read_diagnoses(tmp_path / "run")[-1]
    learned = load_theta(tmp_path / "run" / "theta.safetensors")["inner_lr.3.bias"]
    if rates == "per-layer-and-step":
        recorded = [last[f"diagnostics/inner_lr/3.bias_step{s}"] for s in range(2)]
        assert recorded == pytest.approx(learned.tolist())
    else:
        assert last["diagnostics/inner_lr/3.bias"] == pytest.approx(float(learned.mean()))
    assert last["diagnostics/inner_lr_negative_share"] == 0
    assert (tmp_path / "run" / "plots" / "health_inner_lr.png").exists()


def test_a_run_that_explodes_says_so_once_and_what_to_do(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """On quadratics of curvature up to 2, a rate of 3 multiplies distances by 5 in every step."""
    settings = {**quick, "task": {"kind": "quadratic"}, "model": {"kind": "linear"}}
    experiment = experiment_of(
        settings,
        inner={"lr": 3.0, "steps": 4},
        outer={"clip_norm": 1e-3},
        diagnostics={"every": 1, "tasks": 4},
    )
    recorder = Recorder()
    train(experiment, tmp_path / "run", watcher=recorder)
    said = [notice for notice in recorder.notices if "explodes" in notice]
    assert len(said) == 1
    for remedy in (
        "inner.order=annealed",
        "outer.query_losses=annealed",
        "fewer inner.steps",
        "inner.recompute",
        "outer.clip_norm",
    ):
        assert remedy in said[0]
    (hurts,) = (notice for notice in recorder.notices if "adaptation hurts on 100 %" in notice)
    assert "a step above" in hurts
    diagnoses = read_diagnoses(tmp_path / "run")
    all_six = "warnings in 6 of 6 diagnoses: the meta-gradient explodes, adaptation hurts"
    assert verdict(experiment, diagnoses) == all_six
    last = diagnoses[-1]
    norms = last["diagnostics/gradient_norm_step0"], last["diagnostics/gradient_norm_step4"]
    assert norms[0] / norms[1] > EXPLODES


@pytest.mark.parametrize(
    ("inner", "outer", "advice"),
    [
        ({"lr": 1e6, "steps": 5}, {}, "lower inner.lr (it is 1e+06) or inner.steps (they are 5)"),
        ({}, {"lr": 1e25, "optimizer": "sgd"}, "the meta-parameters have diverged"),
    ],
)
def test_a_run_that_diverges_before_its_first_diagnosis(
    quick: dict[str, Any], tmp_path: Path, inner: Any, outer: Any, advice: str
) -> None:
    """It is diagnosed all the same, if adaptation is to blame; the advice is what would mend it."""
    last = {"evaluation": {"every": 6}, "diagnostics": {"every": 6}}
    experiment = experiment_of(quick, inner=inner, outer=outer, **last)
    recorder = Recorder()
    with pytest.raises(Diverged) as failure:
        train(experiment, tmp_path / "run", watcher=recorder)
    assert advice in str(failure.value)
    hurts = any("adaptation hurts on 100 %" in notice for notice in recorder.notices)
    assert hurts == ("inner.lr" in advice)
    finite = why_not_finite(experiment, {"support_loss": 1.0, "query_loss": 1.0}, 1.0)
    assert "inner.order=annealed" in finite


def test_what_is_done_already_is_not_advised(quick: dict[str, Any]) -> None:
    experiment = experiment_of({**quick, "algorithm": "maml++"})
    metrics = {f"diagnostics/gradient_norm_step{s}": 10.0 ** (3 * (2 - s)) for s in range(3)}
    metrics |= {"diagnostics/hurt_share": 0.0}
    said = warnings_of(experiment, metrics)["explodes"]
    assert "inner.order" not in said
    assert "outer.query_losses" not in said
    metrics = {f"diagnostics/gradient_norm_step{s}": 10.0 ** (3 * s) for s in range(3)}
    assert set(warnings_of(experiment, metrics | {"diagnostics/hurt_share": 0.2})) == {"vanishes"}
    healthy = {f"diagnostics/gradient_norm_step{s}": 1.0 for s in range(3)}
    assert warnings_of(experiment, healthy | {"diagnostics/hurt_share": 0.2}) == {}
    negative = healthy | {
        "diagnostics/hurt_share": 0.0,
        "diagnostics/inner_lr_negative_share": 0.25,
    }
    assert "25 % of the learned inner rates" in warnings_of(experiment, negative)["negative"]


def test_a_loss_that_is_no_number_any_more_hurts() -> None:
    model, batch = sinusoids()
    found = diagnosed(model, Sinusoid(), batch, alpha=1e200)
    assert found.metrics["hurt"].all()


def test_bad_settings(quick: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"diagnostics\.every"):
        experiment_of(quick, diagnostics={"every": 0})
