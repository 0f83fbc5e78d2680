"""The space of a search: what it may hold, what is refused before anything starts, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.loading import ConfigError, experiments, from_dict, load
from pipeline.runs.folder import RunFolderError
from pipeline.search.run import load_search, run_search
from pipeline.search.space import corners, possible_experiments, settings_of, within
from pipeline.search.trial import Ranking, bundles, ranking_of, sized_as_trial


def searching(quick: dict[str, Any], space: Any, **search: Any) -> Any:
    return from_dict({**quick, "search": {"space": space, **search}})


def refusal(quick: dict[str, Any], space: Any, **search: Any) -> str:
    with pytest.raises(ConfigError) as error:
        possible_experiments(searching(quick, space, **search))
    return str(error.value)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({}, "search.space: is empty"),
        ({"inner.rate": {"uniform": [0.1, 1]}}, "search.space.inner.rate: unknown setting"),
        ({"task.shot": {"choice": [1, 5]}}, "search.space.task.shot: unknown setting of sinusoid"),
        ({"inner.lr": {"uniform": [-1, 1]}}, "search.space.inner.lr: input should be greater"),
        ({"inner.lr": {"loguniform": [0, 1]}}, "search.space.inner.lr: a loguniform range must be"),
        ({"inner.lr": {"uniform": [2, 1]}}, "search.space.inner.lr: must be [low, high]"),
        ({"inner.lr": {"choice": []}}, "search.space.inner.lr: choice is empty"),
        ({"inner.lr": {"normal": [0, 1]}}, "search.space.inner.lr.normal: must look like"),
        ({"inner.lr": 0.1}, "search.space.inner.lr: must look like {loguniform: [low, high]}"),
        ({"inner.lr": {"grid": [1], "choice": [1]}}, "search.space.inner.lr: give exactly one of"),
        ({"inner.order": {"choice": ["third"]}}, "search.space.inner.order: input should be"),
        ({"inner.steps": {"uniform": [1, 3]}}, "inner.steps: input should be a valid integer"),
        ({"outer.iterations": {"integer": [1, 2.5]}}, "outer.iterations.integer"),
        ({"run_dir": {"choice": ["a", "b"]}}, "search.space.run_dir: says where things go"),
        ({"tracking.uri": {"choice": ["a"]}}, "search.space.tracking.uri: says where things go"),
    ],
)
def test_an_impossible_space_is_refused_by_path(
    space: Any, expected: str, quick: dict[str, Any]
) -> None:
    assert expected in refusal(quick, space)


def test_impossible_together(quick: dict[str, Any]) -> None:
    """Each value is fine alone; 12 tasks in a chunk of a meta-batch of 10 are not."""
    space = {"outer.tasks_per_batch": {"grid": [10, 20]}, "outer.tasks_per_chunk": {"grid": [12]}}
    assert "outer.tasks_per_chunk: 12 is more than outer.tasks_per_batch (10)" in refusal(
        quick, space
    )


def test_every_error_at_once(quick: dict[str, Any]) -> None:
    space = {"inner.lr": {"uniform": [-1, 1]}, "inner.rate": {"grid": [1]}, "name": {"grid": ["a"]}}
    message = refusal(quick, space)
    for path in space:
        assert f"search.space.{path}:" in message


def test_every_fault_of_the_section_is_a_line(quick: dict[str, Any]) -> None:
    space = {"inner.lr": {"uniform": [2, 1]}, "inner.steps": {"choice": []}}
    with pytest.raises(ConfigError) as caught:
        searching(quick, space, algorithm="tpe", scheduler="pbt", max_concurrent=2)
    assert [line.partition(":")[0] for line in caught.value.errors] == [
        "search.space.inner.lr",
        "search.space.inner.steps",
        "search.algorithm",
        "search.max_concurrent",
    ]


def test_what_cannot_be_combined(quick: dict[str, Any]) -> None:
    lr = {"inner.lr": {"loguniform": [0.01, 0.1]}}
    grid = refusal(quick, lr, algorithm="grid")
    assert "search.algorithm: grid needs values, such as grid: [0.01, 0.1], of inner.lr" in grid
    assert "tpe cannot be combined" in refusal(quick, lr, algorithm="tpe", scheduler="pbt")
    for scheduler in ("pbt", "hyperband"):
        assert "they take turns" in refusal(quick, lr, scheduler=scheduler, max_concurrent=2)
    fixed = {"model.hidden": {"choice": [[8], [9]]}}
    assert "pbt needs a setting that may change" in refusal(quick, fixed, scheduler="pbt")
    assert "search.samples: input should be greater" in refusal(quick, lr, samples=0)


def test_a_search_needs_a_section(quick: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="search: missing"):
        run_search(from_dict(quick), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_folder_of_a_search_is_continued(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is not the folder of a search: it has no search\.y"):
        load_search(tmp_path)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", "search.metric: 'accuracy' is none that a validation of sinusoid tasks has"),
        ("loss_step7", "search.metric: 'loss_step7': validations report adaptation steps 0, 1, 2"),
        ("loss_step", "search.metric: 'loss_step' is none"),
    ],
)
def test_a_metric_that_does_not_exist(
    metric: str, expected: str, quick: dict[str, Any], tmp_path: Path
) -> None:
    """Refused before the folder is made, let alone Ray started."""
    space = {"inner.lr": {"loguniform": [0.01, 0.1]}}
    with pytest.raises(ValueError, match=expected):
        run_search(searching(quick, space, metric=metric), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scheduler_arguments_are_checked(quick: dict[str, Any], tmp_path: Path) -> None:
    space = {"inner.lr": {"loguniform": [0.01, 0.1]}}
    wrong = searching(quick, space, scheduler_args={"patience": 3})
    with pytest.raises(ValueError, match=r"search.scheduler_args: .*patience"):
        run_search(wrong, tmp_path / "run")


def test_ranking(quick: dict[str, Any]) -> None:
    experiment = searching(quick, {"inner.lr": {"grid": [0.1]}}, metric="loss_step3")
    found = ranking_of(experiment.search, experiment, ["loss"])
    assert found == Ranking("loss", 3, "min")
    assert found.name == "loss_step3"
    free = searching(quick, {"inner.lr": {"grid": [0.1]}})
    assert ranking_of(free.search, free, ["loss"]).step_of(free) == quick["inner"]["steps"]


def test_values_of_every_kind(quick: dict[str, Any]) -> None:
    """Numbers, words, truth values and lists, written flat or nested."""
    space = {
        "inner": {"lr": {"loguniform": [0.01, 1]}, "recompute": {"choice": [True, False]}},
        "inner.steps": {"integer": [1, 3]},
        "model.hidden": {"grid": [[8], [8, 8]]},
    }
    experiment = searching(quick, space)
    assert len(corners(experiment.search)) == 3 * 2 * 2 * 2
    draw = {"inner.lr": 0.5, "inner.recompute": 1, "inner.steps": 2, "model.hidden": 1}
    assert settings_of(experiment.search, draw) == {
        "inner.lr": 0.5,
        "inner.recompute": False,
        "inner.steps": 2,
        "model.hidden": [8, 8],
    }
    far = {"inner.lr": 1.2, "inner.steps": 0.8, "inner.recompute": 0}
    assert within(experiment.search, far) == {
        "inner.lr": 1.0,
        "inner.steps": 1,
        "inner.recompute": 0,
    }


def test_the_section_survives_yaml(quick: dict[str, Any]) -> None:
    space = {"inner": {"lr": {"loguniform": [0.01, 1]}}, "model.hidden": {"grid": [[8], [8, 8]]}}
    experiment = searching(quick, space, samples=3, scheduler="pbt")
    assert from_dict(yaml.safe_load(experiment.to_yaml())) == experiment
    assert "search" not in yaml.safe_load(from_dict(quick).to_yaml())


def test_what_a_trial_takes(quick: dict[str, Any]) -> None:
    def wanted(**cluster: Any) -> Any:
        settings = {**quick, "cluster": cluster, "compute": {"compile": "never"}}
        return sized_as_trial(from_dict(settings))

    alone = wanted()
    assert bundles(alone) == [{"CPU": 1.0}]
    assert (alone.cluster.workers, alone.compute.threads, alone.compute.device) == (0, 1, "cpu")
    assert bundles(wanted(workers=2)) == [{}, {"CPU": 1.0}, {"CPU": 1.0}]
    gpu = wanted(workers=1, gpus_per_worker=0.5, cpus_per_worker=2)
    assert bundles(gpu) == [{}, {"CPU": 2.0, "GPU": 0.5}]
    assert gpu.compute.device == "auto"


@pytest.mark.parametrize("name", [name for name in experiments() if name.endswith("-search")])
def test_shipped_searches_are_possible(name: str) -> None:
    experiment = load(name)
    assert len(possible_experiments(experiment)) > 1
    assert experiment.search is not None
    assert {"inner.lr", "inner.order"} <= set(experiment.search.space)


def test_searches_are_shipped() -> None:
    assert {"sinusoid-search", "omniglot-search"} <= set(experiments())
