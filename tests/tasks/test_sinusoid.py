"""Sinusoid tasks: the sign of the phase, the ranges, and purity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.random import choose, normal, task_keys, uniform
from tasks.sinusoid import Sinusoid

GOLDEN_KEYS = [2558736989570252433, 17913671590881668180]
GOLDEN_UNIFORM = [0.20375916801366423, 0.1872289490867345]


def tensors(batch):
    return [*batch.support, *batch.query]


def test_targets_are_the_sine_of_x_minus_phase():
    task, indices = Sinusoid(shots=6, queries=4), np.arange(50)
    amplitude, phase = task.parameters(0, "train", indices).T
    for examples in task.sample(0, "train", indices):
        x = examples.x.numpy()
        expected = amplitude[:, None, None] * np.sin(x - phase[:, None, None])
        np.testing.assert_allclose(examples.y.numpy(), expected, atol=1e-12)


def test_shapes_and_ranges():
    task, indices = Sinusoid(shots=6, queries=4, query_x_range=(5, 10)), np.arange(2000)
    batch = task.sample(0, "train", indices)
    assert batch.support.x.shape == batch.support.y.shape == (2000, 6, 1)
    assert batch.query.x.shape == batch.query.y.shape == (2000, 4, 1)
    parameters = task.parameters(0, "train", indices)
    drawn = [parameters[:, 0], parameters[:, 1], batch.support.x.numpy(), batch.query.x.numpy()]
    for values, (low, high) in zip(
        drawn, [(0.1, 5.0), (0.0, math.pi), (-5.0, 5.0), (5.0, 10.0)], strict=True
    ):
        assert low <= values.min()
        assert values.max() < high
        # Mean and deviation of a uniform distribution, within five standard errors.
        error = 5 * (high - low) / math.sqrt(12 * values.size)
        assert values.mean() == pytest.approx((low + high) / 2, abs=error)
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)


def test_support_and_query_are_different_points():
    batch = Sinusoid(shots=10, queries=10).sample(0, "train", np.arange(20))
    assert not set(batch.support.x.flatten().tolist()) & set(batch.query.x.flatten().tolist())


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**63 - 1),
    split=st.sampled_from(["train", "validation", "test"]),
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=6),
)
def test_a_task_depends_on_nothing_but_its_own_index(seed, split, indices):
    task = Sinusoid(shots=3, queries=2)
    together = tensors(task.sample(seed, split, np.array(indices)))
    backwards = tensors(task.sample(seed, split, np.array(indices[::-1])))
    for i, index in enumerate(indices):
        alone = tensors(task.sample(seed, split, np.array([index])))
        for a, b, c in zip(alone, together, backwards, strict=True):
            assert torch.equal(a[0], b[i])
            assert torch.equal(a[0], c[len(indices) - 1 - i])


def test_seeds_splits_and_indices_give_different_tasks():
    task = Sinusoid()
    cases = [(s, split) for s in (0, 1) for split in ("train", "validation", "test")]
    drawn = np.concatenate([task.parameters(*case, np.arange(100)) for case in cases])
    assert len(np.unique(drawn[:, 0])) == 100 * len(cases)


def test_random_state_is_neither_read_nor_written():
    task, indices = Sinusoid(), np.arange(3)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = task.sample(0, "train", indices)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    np.random.seed(1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(one), tensors(task.sample(0, "train", indices)), strict=True)
    )


def test_golden_numbers():
    """Tasks must never change between versions: runs could not be compared."""
    assert task_keys(0, "train", [0, 1]).tolist() == GOLDEN_KEYS
    assert uniform(task_keys(7, "test", [5]), 2, 2)[0].tolist() == GOLDEN_UNIFORM


def test_normal_numbers():
    values = normal(task_keys(0, "train", np.arange(1000)), 0, 20)
    assert values.mean() == pytest.approx(0, abs=0.04)
    assert values.std() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_choose_takes_different_items_evenly(count):
    chosen = choose(task_keys(0, "train", np.arange(3000)), 0, 7, count)
    assert chosen.shape == (3000, count)
    assert (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all()
    frequency = np.bincount(chosen[:, 0], minlength=7) / 3000
    assert frequency == pytest.approx(np.full(7, 1 / 7), abs=0.035)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("shots", 0),
        ("queries", 0),
        ("amplitude", (2.0, 2.0)),
        ("phase", (1.0, 0.0)),
        ("x_range", (5.0, -5.0)),
        ("query_x_range", (1.0, 1.0)),
    ],
)
def test_impossible_settings_are_named(name, setting):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Sinusoid(**{name: setting})


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="split: 'dev' is not one of train, validation, test"):
        Sinusoid().sample(0, "dev", np.arange(2))


def test_the_oracle_is_right():
    task = Sinusoid()
    batch = task.sample(0, "test", np.arange(4))
    assert task.loss(task.oracle(batch), batch.query.y) == 0
