"""Transfer learning for comparison: what is trained, on what, by how many, through what faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoint import load_theta
from pipeline.chunk import initial_parameters
from pipeline.evaluation import evaluate_run
from pipeline.experiments import ConfigError, load
from pipeline.pretraining import Pretrainer, narrowed, wide_model
from pipeline.session import Interrupted, TrainingFailed
from pipeline.training import train
from tests.conftest import experiment_of
from tests.helpers import Recorder


@pytest.fixture
def pooled(quick: dict[str, Any]) -> dict[str, Any]:
    """A quick pretraining on the curves of all tasks."""
    return {
        **quick,
        "pretraining": {"batch_size": 7, "report_every": 2},
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


def test_an_update_is_that_of_obvious_code(pooled: dict[str, Any]) -> None:
    experiment = experiment_of(pooled)
    trainer = Pretrainer(experiment, torch.device("cpu"))
    model = wide_model(experiment).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.outer.lr)
    for iteration in range(4):
        x, y = experiment.build_task().pooled(0, np.arange(7 * iteration, 7 * iteration + 7))
        loss = ((model(x.double()) - y.double()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer.run(4, trainer.model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.theta[name], p.detach())


def test_shares_of_any_size_add_up(pooled: dict[str, Any]) -> None:
    """The mean over workers of their gradients is the gradient of the whole batch."""
    experiment = experiment_of(pooled)

    def gradients(rank: int, size: int) -> dict[str, torch.Tensor]:
        trainer = Pretrainer(experiment, torch.device("cpu"))
        loss, _ = trainer._loss(trainer.model, rank, size)
        loss.backward()
        return {n: p.grad.clone() for n, p in trainer.model.named_parameters()}

    whole = gradients(0, 1)
    shares = [gradients(rank, 3) for rank in range(3)]  # of 3, 2 and 2 examples
    for name, value in whole.items():
        torch.testing.assert_close(sum(s[name] for s in shares) / 3, value)


def test_each_head_sees_its_own_task(pooled: dict[str, Any]) -> None:
    experiment = experiment_of(
        pooled, pretraining={"objective": "multi-task", "tasks": 4, "batch_size": 2}
    )
    assert wide_model(experiment)[-1].out_features == 4
    trainer = Pretrainer(experiment, torch.device("cpu"))
    loss, _ = trainer._loss(trainer.model, 0, 1)
    loss.backward()
    head = trainer.model[-1].weight.grad
    assert ((head != 0).any(1)).sum() in (1, 2)  # of two draws out of four
    theta = narrowed(experiment, trainer.theta)
    torch.testing.assert_close(theta["3.weight"], trainer.theta["3.weight"].mean(0, keepdim=True))
    torch.testing.assert_close(theta["1.weight"], trainer.theta["1.weight"])


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
    centroid = curves[-1].mean["accuracy"]
    assert centroid[0] == centroid[1] > 1 / 3
    again = evaluate_run(experiment, tmp_path / "run", split="test", num_tasks=6, steps=(0, 2))
    assert again[0].mean == curves[0].mean
    assert again[0].protocol["algorithm"] == "pretrained, pooled"


def test_an_interrupted_run_ends_with_the_same_bits(pooled: dict[str, Any], tmp_path: Path) -> None:
    train(experiment_of(pooled), tmp_path / "calm")
    stop: list[int] = []
    recorder = Recorder(lambda iteration, recorder: stop.append(iteration))
    with pytest.raises(Interrupted):
        train(
            experiment_of(pooled),
            tmp_path / "cut",
            watcher=recorder,
            should_stop=lambda: 4 in stop,
        )
    train(experiment_of(pooled), tmp_path / "cut", resume=True)
    calm, cut = (load_theta(tmp_path / name / "theta.safetensors") for name in ("calm", "cut"))
    assert all(torch.equal(calm[name], cut[name]) for name in calm)
    lines = [
        json.loads(line)
        for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        if "train/loss" in line
    ]
    assert [line["iteration"] for line in lines] == [2, 4, 6]


@pytest.mark.timeout(300)
def test_ray_train_survives_a_worker_and_changes_nothing(
    pooled: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """One of two workers dies after the first checkpoint; θ is that of one process, up to the order
    of additions."""
    train(experiment_of(pooled), tmp_path / "calm")
    dying = {"kind": "tests.helpers:DyingSinusoid", "shots": 5, "queries": 5}
    recorder = Recorder()
    train(
        experiment_of(
            {**pooled, "task": {**dying, "at": 30, "once": str(tmp_path / "died")}},
            cluster={"workers": 2},
        ),
        tmp_path / "hit",
        watcher=recorder,
    )
    assert (tmp_path / "died").exists()
    calm, hit = (load_theta(tmp_path / name / "theta.safetensors") for name in ("calm", "hit"))
    for name, value in calm.items():
        torch.testing.assert_close(hit[name], value)


@pytest.mark.timeout(300)
def test_a_worker_that_always_dies_ends_the_run(
    pooled: dict[str, Any], tmp_path: Path, ray_local: None
) -> None:
    failing = {"kind": "tests.helpers:FailingSinusoid", "shots": 5, "queries": 5}
    with pytest.raises(TrainingFailed, match="these data are broken"):
        train(experiment_of({**pooled, "task": failing}, cluster={"workers": 1}), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "anil"}, "pretraining has none of the family"),
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
