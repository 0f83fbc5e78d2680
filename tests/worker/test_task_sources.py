"""What a worker knows of its tasks: each kind answers its own jobs and refuses foreign ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.experiment import Experiment
from pipeline.config.phases import Phase
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.chunk import ChunkComputer, task_source_of
from pipeline.worker.jobs import (
    CandidateJob,
    Cut,
    DiagnosisJob,
    EvaluationJob,
    FisherJob,
    GradientJob,
    Job,
)
from pipeline.worker.learner import Learner
from pipeline.worker.reinforcement import ReinforcementTasks
from pipeline.worker.supervised import SupervisedTasks
from pipeline.worker.task_source import TaskSource, Variants
from pipeline.worker.tree import Span
from tasks.base import TaskDistribution
from tests.conftest import experiment_of

CUT = Cut(per_batch=6, per_chunk=4)


def source_of(settings: dict[str, Any], **sections: dict[str, Any]) -> TaskSource:
    return task_source_of(Learner.of(experiment_of(settings, **sections)), CUT, compile=False)


def initial(source: TaskSource) -> FlatVector:
    theta: FlatVector = source.learner.initial_theta.numpy()
    return theta


class NeitherKind(TaskDistribution):
    """Has nothing to learn from."""

    input_shape = (1,)
    output_size = 1


def test_the_task_distribution_decides_the_source(
    quick: dict[str, Any], moving: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(source_of(quick), SupervisedTasks)
    assert isinstance(source_of(moving), ReinforcementTasks)
    learner = Learner.of(experiment_of(quick))
    monkeypatch.setattr(Experiment, "build_task", lambda self: NeitherKind())
    with pytest.raises(ValueError, match="meta-learning needs supervised tasks, not NeitherKind"):
        task_source_of(learner, CUT, compile=False)


def test_every_kind_has_training_tasks_and_is_evaluated(either: dict[str, Any]) -> None:
    computer = ChunkComputer(experiment_of(either), compile=False)
    theta = initial(source_of(either))
    gradient = computer.run(theta, GradientJob(0, Span(0, 1)))
    assert gradient.gradient is not None
    assert gradient.gradient.shape == theta.shape
    assert all(values.shape == (gradient.num_tasks,) for values in gradient.metrics.values())
    job = EvaluationJob("validation", 1, 3, (0, 2))
    found = computer.run(theta, job, theta)
    assert (found.job, found.num_tasks, found.gradient) == (job, 3, None)
    assert list(found.metrics) == computer.metric_names()
    assert all(values.shape == (2, 3) for values in found.metrics.values())


def test_supervised_tasks_are_diagnosed(quick: dict[str, Any]) -> None:
    source = source_of(quick)
    theta = source.learner.layout.split(source.learner.initial_theta)
    found = source.answer(theta, DiagnosisJob(0, 0, 3))
    assert found.num_tasks == 3
    assert found.gradient is not None
    assert found.gradient.shape == (2, source.learner.layout.size)
    shapes = {name: tuple(values.shape) for name, values in found.metrics.items()}
    assert shapes == {
        "inner_loss": (2, 3),
        "curvature": (2, 3),
        "gradient_norm": (3, 3),
        "hurt": (1, 3),
    }
    reptile = source_of({**quick, "algorithm": "reptile"})
    theta = reptile.learner.layout.split(reptile.learner.initial_theta)
    assert reptile.answer(theta, DiagnosisJob(0, 0, 3)).gradient is None


@pytest.mark.parametrize("chunk", [0, 1])
def test_reinforcement_learning_tasks_are_asked_about_trajectories(
    moving: dict[str, Any], chunk: int
) -> None:
    source = source_of(moving)
    theta, flat = source.learner.layout.split(source.learner.initial_theta), initial(source)
    members = len(CUT.members(chunk))
    chunks = Span(chunk, chunk + 1)
    product = source.answer_chunk(theta, FisherJob(0, chunks), chunk, theta)
    assert product.gradient is not None
    assert (product.num_tasks, product.gradient.shape) == (members, flat.shape)
    assert float(product.gradient @ source.learner.initial_theta) >= 0  # positive semi-definite
    worth = source.answer_chunk(theta, CandidateJob(0, chunks), chunk, theta)
    assert (worth.num_tasks, worth.gradient) == (members, None)
    assert set(worth.metrics) == {"surrogate", "kl"}
    assert worth.metrics["kl"].abs().max() < 1e-6  # the candidate is θ itself
    weighted = CandidateJob(0, chunks, inner_kl_weight=0.1)
    step = source.answer_chunk(theta, weighted, chunk, theta)
    assert step.gradient is not None
    assert step.gradient.shape == flat.shape
    assert set(step.metrics) == {"surrogate", "kl", "inner_kl"}


@pytest.mark.parametrize(
    ("kind", "job", "there"),
    [
        ("quick", FisherJob(0, Span(0, 1)), "GradientJob, EvaluationJob, DiagnosisJob"),
        ("quick", CandidateJob(0, Span(0, 1)), "GradientJob, EvaluationJob, DiagnosisJob"),
        ("moving", DiagnosisJob(0, 0, 2), "GradientJob, FisherJob, CandidateJob, EvaluationJob"),
    ],
    ids=["fisher", "candidate", "diagnosis"],
)
def test_a_foreign_job_is_refused_in_one_sentence(
    request: pytest.FixtureRequest, kind: str, job: Job, there: str
) -> None:
    experiment = experiment_of(request.getfixturevalue(kind))
    theta = Learner.of(experiment).initial_theta.numpy()
    with pytest.raises(ValueError, match=f"the job {type(job).__name__}; they have") as refused:
        ChunkComputer(experiment, compile=False).run(theta, job, theta)
    said = str(refused.value)
    assert said.startswith(f"{experiment.task.kind} tasks are ")
    assert said.endswith(f"they have {there}")
    assert "\n" not in said


def test_only_policies_collect_trajectories(quick: dict[str, Any], moving: dict[str, Any]) -> None:
    collected = ChunkComputer(experiment_of(moving), compile=False).collect(
        initial(source_of(moving)), "test", 2, steps=1
    )
    assert [len(each.trajectories.rewards) for each in collected.steps] == [2, 2]
    with pytest.raises(ValueError, match="sinusoid tasks are SupervisedTasks, which have no traj"):
        ChunkComputer(experiment_of(quick), compile=False).collect(
            initial(source_of(quick)), "test", 2, steps=1
        )


def test_what_a_kind_lacks_does_nothing(quick: dict[str, Any], moving: dict[str, Any]) -> None:
    supervised, collecting = source_of(quick), source_of(moving)
    theta = supervised.learner.layout.split(supervised.learner.initial_theta)
    supervised.warm_up(theta)
    assert supervised.works(theta, chunks=8) == []
    assert supervised.constants == ()
    policy = collecting.learner.layout.split(collecting.learner.initial_theta)
    assert collecting.training_chunk(policy, 0, 0).metrics
    assert not collecting.prepare_ahead()  # trajectories depend on the next θ
    assert not supervised.training_chunk(theta, 0, 0).metrics
    assert supervised.prepare_ahead()


@pytest.mark.parametrize(("update", "products"), [("trpo", 80), ("promp", 0), ("gradient", 0)])
def test_fisher_products_are_work_of_trpo_alone(
    moving: dict[str, Any], update: str, products: int
) -> None:
    source = source_of(moving, reinforcement={"update": update, "cg_iterations": 10})
    theta = source.learner.layout.split(source.learner.initial_theta)
    assert sum(work.calls for work in source.works(theta, chunks=8)) == products


def test_variants_are_built_once(quick: dict[str, Any]) -> None:
    experiment = experiment_of(quick)
    task = experiment.build_task()
    variants = Variants(experiment, task)
    assert variants.of({}) is task
    more = variants.of({"shots": 9, "queries": 2})
    assert (more.shots, more.queries) == (9, 2)  # type: ignore[attr-defined]
    assert variants.of({"queries": 2, "shots": 9}) is more


# The learner that sources are built from.


def test_flat_vectors_are_copied(quick: dict[str, Any]) -> None:
    """Ray hands out memory that must not be written to."""
    learner = Learner.of(experiment_of(quick, compute={"dtype": "float64"}))
    given = np.ones(learner.layout.size)
    given.flags.writeable = False
    taken = learner.on_device(given)
    assert taken.dtype == torch.float64
    taken += 1
    assert (given == 1).all()


def test_knobs_of_a_phase_that_is_tried_out_early(quick: dict[str, Any]) -> None:
    learner = Learner.of(
        experiment_of(quick, outer={"query_losses": "annealed", "query_losses_until": 3})
    )
    every, last = Phase(True, every_query_loss=True), Phase(True, every_query_loss=False)
    first = learner.knobs(every, 0).query_weights
    assert first is not None
    assert first.tolist() == pytest.approx([0.5, 0.5])
    late = learner.knobs(every, 5).query_weights  # there are no weights any more
    assert late is not None
    assert late.tolist() == [1.0, 1.0]
    assert learner.knobs(last, 5).query_weights is None
