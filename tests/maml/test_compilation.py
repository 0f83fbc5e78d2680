"""Compiled results against eager ones, and what happens when compilation is impossible.

Models are tiny: each program costs seconds to compile the first time.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.maml import compilation
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.compilation import Compiler, Work, worth_compiling
from pipeline.maml.flat_vector import Layout, flat_vector
from pipeline.maml.meta_gradient import Knobs, chunk_function
from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import mlp
from pipeline.training.loop import train
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import FisherJob, GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tasks.base import Examples, TaskBatch
from tasks.sinusoid import Sinusoid
from tests.conftest import experiment_of
from tests.helpers import Squares, final_theta

pytestmark = pytest.mark.long

TWO_CHUNKS = {"iterations": 2, "tasks_per_batch": 4, "tasks_per_chunk": 2}
"""Even ones: of a policy's updates, one program each."""


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    task = Sinusoid(shots=3, queries=4)
    model = mlp((1,), 1, hidden=(4,), init_std=None)
    params = {name: p.detach() for name, p in model.named_parameters()}
    layout = Layout.of(params)
    batch = task.sample(0, "train", np.arange(3))
    batch = TaskBatch(*(Examples(*(t.float() for t in examples)) for examples in batch))
    return Objective(model, task), layout, layout.join(params), batch


def second_order(setup, steps, **options):
    objective, layout, *_ = setup
    adaptation = Adaptation(steps, fast=tuple(layout.shapes_by_name))
    return chunk_function(objective, adaptation, layout, **options)


@pytest.fixture
def programs(monkeypatch):
    """The graphs compiled during the test."""
    graphs = []
    trace = compilation.trace
    monkeypatch.setattr(compilation, "trace", lambda *a: graphs.append(trace(*a)) or graphs[-1])
    return graphs


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-5)


def test_compiled_equals_eager_for_any_rate_and_batch(setup, programs):
    _, _, theta, batch = setup
    eager = second_order(setup, 2)
    compiled = second_order(setup, 2, compile=True)
    same_twice = TaskBatch(batch.support, batch.support)  # one tensor as two arguments
    other = TaskBatch(batch.support, Examples(batch.support.x + 1, batch.support.y))
    for knobs in (Knobs(torch.tensor(0.01)), Knobs(torch.tensor(0.1))):
        assert_same(compiled(theta, batch, knobs), eager(theta, batch, knobs))
    assert len(programs) == 1
    for case in (same_twice, other):
        assert_same(compiled(theta, case, knobs), eager(theta, case, knobs))
    assert len(programs) == 2, "another number of queries is another program, aliasing is not"


def test_recomputing_equals_keeping(setup, programs):
    _, _, theta, batch = setup
    knobs = Knobs(torch.tensor(0.1))
    eager = second_order(setup, 3)
    recomputing = second_order(setup, 3, recompute=True, compile=True)
    assert_same(recomputing(theta, batch, knobs), eager(theta, batch, knobs))
    assert len(programs) == 5, "step and step back, each shared and per task, and the query"


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_are_walked_through_once_compile(setup, programs, recompute):
    _, _, theta, batch = setup
    model = mlp((1,), 1, hidden=(4,), init_std=None)
    adaptation = Adaptation.of(model, steps=3, adapted=["head"], rates="per-layer-and-step")
    layout = Layout.of(adaptation.meta_parameters(dict(model.named_parameters()), 0.1))
    flat, knobs = (
        torch.cat([theta, torch.full((layout.size - len(theta),), 0.1)]),
        Knobs(torch.tensor(0.1)),
    )
    eager, compiled = (
        chunk_function(Objective(model, Squares()), adaptation, layout, **options)
        for options in ({}, {"recompute": recompute, "compile": True})
    )
    assert_same(compiled(flat, batch, knobs), eager(flat, batch, knobs))
    assert len(programs) == (6 if recompute else 1), "that of all steps besides"


def test_compiling_twice_in_a_process_gives_the_same_bits(setup, programs):
    _, _, theta, batch = setup
    knobs = Knobs(torch.tensor(0.1))
    one, other = (second_order(setup, 2, compile=True) for _ in range(2))
    assert torch.equal(one(theta, batch, knobs)[0], other(theta, batch, knobs)[0])
    assert len(programs) == 2


def test_the_graph_computes_nothing_twice():
    """The walk back repeats the forward pass of the step; the trace has it once."""

    def product_twice(a, b):
        return [torch.mm(a, b) + 1, torch.mm(a, b.view(2, 2).detach()) + 2]

    graph = compilation.trace(product_twice, [torch.ones(2, 2), torch.ones(2, 2)]).graph
    assert sum(node.target is torch.ops.aten.mm.default for node in graph.nodes) == 1


def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(caplog):
    def depends_on_data(x):
        return x * 2 if x.sum().item() > 0 else x * 3

    compiler = Compiler()
    one, other = compiler.compiled(depends_on_data), compiler.compiled(depends_on_data)
    with caplog.at_level(logging.WARNING):
        for function in (one, one, other):
            assert function(torch.ones(2)).tolist() == [2, 2]
            assert function(-torch.ones(2)).tolist() == [-3, -3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot compile, running eagerly" in caplog.text


def test_an_error_of_the_function_itself_is_raised():
    with pytest.raises(RuntimeError, match="shape"):
        Compiler().compiled(lambda a, b: a @ b)(torch.ones(2, 3), torch.ones(2, 3))


def test_whether_compilation_pays_is_a_matter_of_calls(setup):
    _, _, theta, batch = setup
    chunk = second_order(setup, 1)
    arguments = (theta, batch, Knobs(torch.tensor(0.1)))
    answers = [worth_compiling([Work(chunk, arguments, calls)]) for calls in (1, 10, 1_000_000)]
    assert answers == [False, False, True]
    assert answers == [
        worth_compiling([Work(chunk, arguments, calls)]) for calls in (1, 10, 1_000_000)
    ]
    assert worth_compiling([Work(chunk, arguments, 1), Work(chunk, arguments, 1_000_000)])


def test_fisher_products_are_compiled_once_for_any_rate(
    moving: dict[str, Any], programs, caplog
) -> None:
    """And are the eager ones."""
    products = []
    for rate in (0.1, 0.5):
        experiment = experiment_of(moving, inner={"lr": rate}, outer=TWO_CHUNKS)
        theta = flat_vector(initial_parameters(experiment))
        direction = np.random.default_rng(0).normal(size=theta.shape).astype(theta.dtype)
        compiled, eager = (
            ChunkComputer(experiment, compile)
            .run(theta, FisherJob(0, Span(0, 1)), direction)
            .gradient
            for compile in (True, False)
        )
        np.testing.assert_allclose(compiled, eager, rtol=1e-3, atol=1e-5 * np.abs(eager).max())
        products.append(eager)
    assert not np.allclose(*products, rtol=0.01)
    assert len(programs) == 1
    assert "cannot compile" not in caplog.text


def test_compiled_policy_updates_give_the_same_bits_on_actors(
    moving: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    settings = {**moving, "compute": {**moving["compute"], "compile": "always"}}
    train(experiment_of(settings, outer=TWO_CHUNKS), tmp_path / "alone")
    train(experiment_of(settings, outer=TWO_CHUNKS, cluster={"workers": 2}), tmp_path / "actors")
    assert torch.equal(final_theta(tmp_path / "alone"), final_theta(tmp_path / "actors"))


def test_runs_of_a_process_share_programs(quick: dict[str, Any], programs) -> None:
    """Another rate or seed is not another program, another number of steps is; results are those
    of a program of one's own."""
    settings = {**quick, "compute": {**quick["compute"], "compile": "always"}}
    one = ChunkComputer(experiment_of(settings), compile=True)
    other = ChunkComputer(experiment_of(settings, inner={"lr": 0.02}), compile=True)
    longer = ChunkComputer(experiment_of(settings, inner={"steps": 3}), compile=True)
    eager = ChunkComputer(experiment_of(settings, inner={"lr": 0.02}), compile=False)
    functions = [computer.program()[0] for computer in (one, other, longer)]
    assert functions[0] is functions[1]
    assert functions[0] is not functions[2]
    theta = initial_parameters(experiment_of(settings))
    flat = Layout.of(theta).join(theta).numpy()
    job = GradientJob(0, Span(0, 1))
    first, second = one.run(flat, job).gradient, other.run(flat, job).gradient
    expected = eager.run(flat, job).gradient
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(first, second, rtol=1e-4)
    assert len(programs) == 1
