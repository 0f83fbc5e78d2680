"""Transfer learning for comparison: what is trained, on what, by how many, through what faults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, load
from pipeline.config.settings import Pretraining
from pipeline.evaluation.meta_test import evaluate_run
from pipeline.runs.checkpoint import load_theta
from pipeline.training import ray_train, transfer_learning
from pipeline.training.endings import Interrupted, TrainingFailed
from pipeline.training.loop import train
from pipeline.training.pretraining import Pretrainer, narrowed, wide_model
from pipeline.training.ray_train import number_of_workers
from pipeline.worker.learner import initial_parameters
from tasks.random import integers, task_keys
from tests.conftest import experiment_of
from tests.helpers import Recorder

pytestmark = pytest.mark.long


@pytest.fixture
def pooled(quick: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A quick pretraining on the curves of all tasks."""
    return {
        **quick,
        "data": {"root": str(tmp_path / "data")},
        "pretraining": {"batch_size": 7, "part_size": 3, "report_every": 2},
        "compute": {**quick["compute"], "dtype": "float64"},
    }


@pytest.fixture
def characters(quick: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A quick pretraining on drawn characters."""
    return {
        **quick,
        "task": {"kind": "glyphs", "ways": 3, "shots": 1, "queries": 2, "num_classes": 40},
        "model": {"kind": "conv4", "filters": 8},
        "inner": {"lr": 0.5, "steps": 2},
        "pretraining": {"batch_size": 16},
        "evaluation": {"tasks": 6, "validation_tasks": 4, "steps": [0, 2]},
        "data": {"root": str(tmp_path / "data")},
    }


def section(experiment: Experiment) -> Pretraining:
    assert experiment.pretraining is not None
    return experiment.pretraining


def test_an_update_is_that_of_obvious_code(pooled: dict[str, Any]) -> None:
    experiment = experiment_of(pooled)
    trainer = Pretrainer(experiment, section(experiment), torch.device("cpu"))
    model = wide_model(experiment, section(experiment)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.outer.lr)
    for iteration in range(4):
        x, y = experiment.build_task().pooled(0, np.arange(7 * iteration, 7 * iteration + 7))
        loss = ((model(x.double()) - y.double()) ** 2).mean()  # parts of 3, 3 and 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer.run(4, trainer.model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.theta[name], p.detach())


NORMALISED = {"kind": "mlp", "hidden": [8], "normalisation": "batch"}


@pytest.mark.parametrize("objective", ["pooled", "multi-task"])
def test_parts_add_up_whoever_computes_them(pooled: dict[str, Any], objective: str) -> None:
    """The mean over workers of their gradients is that of one worker, also where normalisation
    makes it matter which examples are seen together; metrics add up."""
    experiment = experiment_of(
        {**pooled, "model": NORMALISED}, pretraining={"objective": objective, "tasks": 4}
    )

    def computed(rank: int, size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        trainer = Pretrainer(experiment, section(experiment), torch.device("cpu"))
        metrics = trainer._accumulate(trainer.model, rank, size)
        return {n: p.grad.clone() for n, p in trainer.model.named_parameters()}, metrics

    whole, metrics = computed(0, 1)
    for size in (2, 3):  # of parts of 3, 3 and 1 examples
        shares = [computed(rank, size) for rank in range(size)]
        for name, value in whole.items():
            torch.testing.assert_close(sum(s[0][name] for s in shares) / size, value)
        torch.testing.assert_close(sum(s[1]["loss"] for s in shares), metrics["loss"])


def test_each_head_sees_its_own_task(pooled: dict[str, Any]) -> None:
    """Against obvious code, with heads of three outputs."""
    experiment = experiment_of(
        {**pooled, "task": {"kind": "glyphs", "ways": 3, "shots": 1, "queries": 2}},
        pretraining={"objective": "multi-task", "tasks": 4, "batch_size": 5, "part_size": 5},
        data={"root": pooled["data"]["root"]},
    )
    assert wide_model(experiment, section(experiment))[-1].out_features == 12
    trainer = Pretrainer(experiment, section(experiment), torch.device("cpu"))
    loss, metrics = trainer.loss_of(np.arange(5, 10), trainer.model)
    task, body = experiment.build_task(), trainer.model[:-1]
    head = trainer.model[-1]
    which = integers(task_keys(0, "train", np.arange(5, 10)), 2**16, 1, 4)[:, 0]
    assert len(set(which.tolist())) > 1
    batch = task.sample(0, "train", which).to("cpu", torch.float64)
    features = body(torch.cat([*batch.support.x, *batch.query.x])).split([3] * 5 + [6] * 5)
    losses = []
    for i, number in enumerate(which):
        rows = slice(3 * number, 3 * number + 3)
        own = torch.cat([features[i], features[5 + i]])
        scores = own @ head.weight[rows].T + head.bias[rows]
        labels = torch.cat([batch.support.y[i], batch.query.y[i]])
        losses.append(nn.functional.cross_entropy(scores, labels))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert 0 <= metrics["accuracy"] <= 1
    theta = narrowed(experiment, section(experiment), trainer.theta)
    last = [name for name in theta if name.endswith("weight")][-1]
    blocks = trainer.theta[last].view(4, 3, -1)
    torch.testing.assert_close(theta[last], blocks.mean(0))


def test_classes_of_the_training_split_alone(characters: dict[str, Any]) -> None:
    experiment = experiment_of(characters)
    task = experiment.build_task()
    assert task.pooled_size == 26  # 13 of every 20
    examples = task.pooled(0, np.arange(400))
    assert set(examples.y.tolist()) == set(range(26))
    # Examples are pure, and labels are those of the classes.
    again = task.pooled(0, np.array([7, 3]))
    assert torch.equal(again.x, examples.x[[7, 3]])
    store = task.open_store()
    training = [each for each in store.classes if task.split_of(each) == "train"]
    for x, y in zip(examples.x[:50], examples.y[:50], strict=True):
        drawn = store.images[training[y].first : training[y].first + training[y].count]
        image = (255 * x).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert (drawn == image).all((1, 2, 3)).any()


def test_turned_characters(characters: dict[str, Any]) -> None:
    task = experiment_of(characters, task={"rotations": "classes"}).build_task()
    plain = experiment_of(characters).build_task().pooled(0, np.arange(60))
    turned = task.pooled(0, np.arange(60))
    assert task.pooled_size == 4 * 26
    assert (turned.y // 4).tolist() == plain.y.tolist()
    for x, label, image in zip(turned.x, turned.y, plain.x, strict=True):
        assert torch.equal(x, torch.rot90(image, int(label % 4), (1, 2)))


def test_the_body_is_kept_and_the_head_is_new(characters: dict[str, Any], tmp_path: Path) -> None:
    characters["evaluation"]["baselines"] = ["random-init", "nearest-centroid"]
    experiment = experiment_of(characters, outer={"iterations": 4})
    curves = train(experiment, tmp_path / "run")
    theta, fresh = (
        load_theta(tmp_path / "run" / "theta.safetensors"),
        initial_parameters(experiment),
    )
    head = [name for name in fresh if name.startswith("14.")]
    assert all(torch.equal(theta[name], fresh[name]) for name in head)
    assert not torch.equal(theta["1.weight"], fresh["1.weight"])
    assert [curve.who for curve in curves] == ["trained", "random init", "nearest centroid"]
    assert "loss" not in curves[-1].mean
    centroid = curves[-1].mean["accuracy"]
    assert centroid[0] == centroid[1] > 1 / 3
    again = evaluate_run(experiment, tmp_path / "run", split="test", num_tasks=6, steps=(0, 2))
    assert again[0].mean == curves[0].mean
    assert again[0].protocol["algorithm"] == "pretrained, pooled"


def cut(at: int) -> tuple[Recorder, Any]:
    """Asks for an end after iteration `at`."""
    seen: list[int] = []
    return Recorder(lambda iteration, recorder: seen.append(iteration)), lambda: at in seen


def same(one: Path, other: Path, exactly: bool = True) -> bool:
    """Whether two runs ended with the same θ, or up to the order of additions."""
    left, right = (load_theta(folder / "theta.safetensors") for folder in (one, other))
    close = torch.equal if exactly else torch.allclose
    return all(close(left[name], right[name]) for name in left)


def recorded(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines if "train/loss" in line]


def test_an_interrupted_run_ends_with_the_same_bits(pooled: dict[str, Any], tmp_path: Path) -> None:
    train(experiment_of(pooled), tmp_path / "calm")
    recorder, should_stop = cut(at=4)
    with pytest.raises(Interrupted, match="after iteration 4"):
        train(experiment_of(pooled), tmp_path / "cut", watcher=recorder, should_stop=should_stop)
    train(experiment_of(pooled), tmp_path / "cut", resume=True)
    assert same(tmp_path / "calm", tmp_path / "cut")
    assert recorded(tmp_path / "cut") == [2, 4, 6]
    # Longer is as if it had been longer from the start.
    longer = experiment_of(pooled, outer={"iterations": 8})
    train(longer, tmp_path / "cut", resume=True)
    train(longer, tmp_path / "long")
    assert same(tmp_path / "long", tmp_path / "cut")


def test_what_is_trained_is_never_lost_at_the_end(
    pooled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between the last update and the validation, or shortened to where it was stopped: θ is
    the pretrained one all the same."""
    train(experiment_of(pooled), tmp_path / "calm")

    def stop(session: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer_learning, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(experiment_of(pooled), tmp_path / "late")
    monkeypatch.undo()
    train(experiment_of(pooled), tmp_path / "late", resume=True)
    assert same(tmp_path / "calm", tmp_path / "late")
    recorder, should_stop = cut(at=4)
    with pytest.raises(Interrupted):
        train(experiment_of(pooled), tmp_path / "short", watcher=recorder, should_stop=should_stop)
    four = experiment_of(pooled, outer={"iterations": 4})
    train(four, tmp_path / "short", resume=True)
    train(four, tmp_path / "four")
    assert same(tmp_path / "four", tmp_path / "short")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_ray_train_survives_a_worker_and_goes_on_where_it_was(
    pooled: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """Two workers, one of which dies after the second report; stopped after the third and continued
    in this process: θ is that of one process alone. The many iterations are for workers that get
    far before they hear of the end."""
    normalised = {**pooled, "model": NORMALISED, "outer": {**pooled["outer"], "iterations": 60}}
    train(experiment_of(normalised), tmp_path / "calm")
    dying = {"kind": "tests.helpers:DyingSinusoid", "shots": 5, "queries": 5, "at": 30}
    settings = {**normalised, "task": {**dying, "once": str(tmp_path / "died")}}
    recorder, should_stop = cut(at=6)
    with pytest.raises(Interrupted, match=r"after iteration \d+"):
        train(
            experiment_of(settings, cluster={"workers": 2}),
            tmp_path / "hit",
            watcher=recorder,
            should_stop=should_stop,
        )
    assert (tmp_path / "died").exists()
    (said,) = (notice for notice in recorder.notices if "lost" in notice)
    # Its last copies may not have been complete.
    assert re.fullmatch("a worker was lost; all go on from iteration [024]", said)
    assert list((tmp_path / "hit").glob("pretraining-*")) == []
    train(experiment_of(settings), tmp_path / "hit", resume=True)
    assert recorded(tmp_path / "hit") == list(range(2, 61, 2))
    assert same(tmp_path / "calm", tmp_path / "hit", exactly=False)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_that_always_dies_ends_the_run(
    pooled: dict[str, Any], tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_train, "_MAX_FAILURES", 1)  # each takes 15 seconds
    failing = {"kind": "tests.helpers:FailingSinusoid", "shots": 5, "queries": 5}
    with pytest.raises(TrainingFailed, match="these data are broken"):
        train(experiment_of({**pooled, "task": failing}, cluster={"workers": 1}), tmp_path / "run")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_workers_of_ray_train_have_the_threads_that_were_asked_for(
    pooled: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """More than a worker has CPUs, of which there would be one thread each."""
    task = {"kind": "tests.helpers:ThreadsSinusoid", "shots": 5, "queries": 5}
    settings = {**pooled, "task": {**task, "seen": str(tmp_path / "threads")}}
    sections = {"cluster": {"workers": 1}, "compute": {"threads": 3}}
    train(experiment_of(settings, **sections), tmp_path / "run")
    assert (tmp_path / "threads").read_text() == "3"


def test_workers_that_do_not_fit_are_refused(
    pooled: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    experiment = experiment_of(pooled, cluster={"workers": 2, "gpus_per_worker": 1})
    with pytest.raises(ValueError, match=r"2 workers of 0\.5 CPU, 1 GPU, together 2 GPU, and Ray"):
        train(experiment, tmp_path / "run")
    # No more workers than parts.
    many = experiment_of(pooled, cluster={"workers": 9})
    assert number_of_workers(many, section(many)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "anil"}, "pretraining does not meta-learn"),
        ({"inner": {"rates": "per-parameter"}}, "inner.rates: pretraining learns no"),
        ({"diagnostics": {"every": 1}}, "diagnostics.every: pretraining has no"),
        ({"pretraining": {"objective": "both"}}, "pretraining.objective"),
        ({"pretraining": {"epochs": 3}}, "pretraining.epochs: unknown setting"),
    ],
)
def test_what_makes_no_sense_is_refused(
    pooled: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_of({**pooled, **change})


def test_tasks_without_common_targets_are_refused(quick: dict[str, Any], tmp_path: Path) -> None:
    own = {**quick, "task": {"kind": "tests.helpers:OwnClasses"}, "pretraining": {}}
    with pytest.raises(ValueError, match="pretraining: OwnClasses tasks have no common targets"):
        train(experiment_of(own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_regression_has_no_nearest_centroid(quick: dict[str, Any], tmp_path: Path) -> None:
    quick["evaluation"]["baselines"] = ["nearest-centroid"]
    with pytest.raises(ValueError, match=r"evaluation\.baselines: sinusoid tasks have no classes"):
        train(experiment_of(quick), tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["omniglot-5w1s-pretrained", "sinusoid-pretrained", "sinusoid-multi-task"]
)
def test_shipped_experiments(name: str) -> None:
    assert load(name).pretraining is not None
