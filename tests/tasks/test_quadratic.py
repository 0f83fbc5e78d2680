"""Quadratic tasks: the model's loss is the quadratic that the docstring promises."""

import numpy as np
import pytest
import torch

from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import linear
from tasks.base import Examples
from tasks.quadratic import Quadratic


def test_loss_is_the_quadratic():
    task, indices = Quadratic(dimensions=5, curvature=(0.3, 4.0)), np.arange(6)
    batch, optima = task.sample(0, "train", indices), task.optima(0, "train", indices)
    objective = Objective(linear((5,), 1).double(), task)
    w = np.random.default_rng(0).normal(size=5)
    params = {"1.weight": torch.from_numpy(w[None])}
    for i in range(6):
        loss = objective.loss(params, Examples(batch.query.x[i], batch.query.y[i]))
        expected = 0.5 * ((w - optima[i]) ** 2 * task.curvatures).sum()
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_tasks_are_pure():
    task = Quadratic()
    together = task.optima(0, "train", np.array([3, 8, 3]))
    assert (together[0] == together[2]).all()
    assert (together[1] == task.optima(0, "train", np.array([8]))[0]).all()
    assert (together[0] != task.optima(0, "test", np.array([3]))[0]).all()


def test_optima_have_the_stated_distribution():
    optima = Quadratic(mean=2.0, spread=0.5).optima(0, "train", np.arange(4000))
    assert optima.mean() == pytest.approx(2.0, abs=0.03)
    assert optima.std() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("dimensions", 0), ("curvature", (2.0, 1.0)), ("curvature", (-1.0, 1.0))],
)
def test_impossible_settings_are_named(name, setting):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Quadratic(**{name: setting})


def test_the_oracle_is_right():
    task = Quadratic()
    batch = task.sample(0, "test", np.arange(4))
    assert task.loss(task.oracle(batch), batch.query.y) == 0
