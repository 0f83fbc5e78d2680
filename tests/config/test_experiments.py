"""Configurations: what is accepted, and what a person reads when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.components import kinds
from pipeline.config.loading import (
    ConfigError,
    apply_overrides,
    experiments,
    from_dict,
    json_schema,
    load,
    load_run,
    load_to_resume,
)
from tests.conftest import experiment_of

SHIPPED = {
    "sinusoid",
    "sinusoid-paper",
    "glyphs",
    "omniglot-5w1s",
    "omniglot-5w1s-reptile",
    "omniglot-5w5s",
    "omniglot-20w1s",
    "omniglot-20w5s",
    "image-folder",
}


def test_all_experiments_are_shipped() -> None:
    assert set(experiments()) >= SHIPPED
    assert all(experiments().values()), "every experiment has a description"
    first, *others = experiments()
    assert first == "sinusoid", "the quick look"
    assert others == sorted(others)


@pytest.mark.parametrize("name", sorted(experiments()))
def test_shipped_experiments_load_and_round_trip(name: str, tmp_path: Path) -> None:
    experiment = load(name)
    assert experiment.name == name
    path = tmp_path / "again.yaml"
    path.write_text(experiment.to_yaml())
    assert load(str(path)) == experiment


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sinusiod", "there is no experiment 'sinusiod'; did you mean sinusoid?\n"),
        ("image", "there is no experiment 'image'; did you mean image-folder?\n"),
        ("ant", "; did you mean ant-direction, ant-direction-gym, ant-velocity, ant-velocity-gym?"),
        ("qqq", "there is no experiment 'qqq'\n`maml config list` shows"),
        ("nofile.yaml", "there is no file nofile.yaml"),
        ("sinusoid.yml", "there is no file sinusoid.yml; did you mean sinusoid?"),
        ("runs/x/best.yaml", "there is no file runs/x/best.yaml"),
        ("runs/sinusoid", "there is no file runs/sinusoid"),
        ("some/folder", "some/folder is a folder"),
    ],
)
def test_what_is_not_there_is_said_with_what_was_meant(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()[0]) < 110


@pytest.mark.parametrize(
    ("name", "ways", "shots", "steps", "tasks"),
    [
        ("omniglot-5w1s", 5, 1, 1, 32),
        ("omniglot-5w5s", 5, 5, 1, 32),
        ("omniglot-20w1s", 20, 1, 5, 16),
        ("omniglot-20w5s", 20, 5, 5, 16),
    ],
)
def test_omniglot_has_the_settings_of_the_paper(
    name: str, ways: int, shots: int, steps: int, tasks: int
) -> None:
    experiment = load(name)
    task = experiment.task.settings
    assert (task["ways"], task["shots"], task["queries"]) == (ways, shots, shots)
    assert task["rotations"] == "per-task"
    assert (experiment.inner.steps, experiment.outer.tasks_per_batch) == (steps, tasks)
    assert (experiment.outer.iterations, experiment.outer.lr) == (60_000, 1e-3)
    # The paper's rate is for a loss that is summed over the classes.
    assert experiment.inner.lr == pytest.approx({5: 0.4, 20: 0.1}[ways] * ways)


def test_sinusoid_has_the_settings_of_the_paper() -> None:
    experiment = load("sinusoid-paper")
    # The rate of the original code, not of the paper's text: see the comment in the file.
    assert (experiment.inner.lr, experiment.inner.steps) == (0.001, 1)
    assert (experiment.outer.iterations, experiment.outer.tasks_per_batch) == (70_000, 25)
    assert experiment.task.settings["amplitude"] == [0.1, 5.0]
    assert experiment.model.settings["init_std"] == 0.01


def test_overrides_are_read_as_yaml() -> None:
    experiment = load(
        "sinusoid",
        ["inner.lr=1e-1", "inner.order=first", "evaluation.steps=[0,2]", "outer.scheduler=null"],
    )
    assert experiment.inner.lr == 0.1
    assert experiment.inner.order == "first"
    assert experiment.evaluation.steps == (0, 2)
    assert experiment.outer.scheduler is None


def test_another_kind_drops_the_settings_of_the_first() -> None:
    experiment = load(
        "sinusoid",
        ["task.kind=quadratic", "task.dimensions=3", "model.kind=linear", "evaluation.variants={}"],
    )
    assert experiment.task.settings["dimensions"] == 3
    assert "shots" not in experiment.task.settings


@pytest.mark.parametrize("path", ["inner.checkpoint", "outer.estimator", "inner.recomputed"])
def test_unknown_settings_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"{path}: unknown setting"):
        load("sinusoid", [f"{path}=true"])


def test_every_error_is_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(
            {
                "name": "x",
                "task": {"kind": "sinusoid", "shots": "many", "shoots": 1},
                "model": {"kind": "mlp", "hidden": 40},
                "inner": {"lr": -1, "steps": 1.5, "order": "third"},
                "outer": {"iterations": 0, "tasks_per_batch": 4, "tasks_per_chunk": 8, "beta": 1},
                "cluster": {"workers": -1},
                "wokers": 2,
            }
        )
    message = str(caught.value)
    for field in (
        "task.shots",
        "task.shoots",
        "model.hidden",
        "inner.lr",
        "inner.steps",
        "inner.order",
        "outer.iterations",
        "outer.beta",
        "cluster.workers",
        "wokers",
    ):
        assert field in message, field
    assert "got -1" in message
    assert "'second', 'first' or 'annealed'" in message, "what is allowed is said"
    assert f"{len(caught.value.errors)} errors" in message


def test_a_setting_of_several_types_has_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load("sinusoid", ["cluster.workers=two", "outer.query_losses=most"])
    assert caught.value.errors == [
        "outer.query_losses: input should be 'last', 'all' or 'annealed' or a list, got 'most'",
        "cluster.workers: input should be 'auto' or a valid integer, got 'two'",
    ]


def test_the_message_says_where_to_mend(tmp_path: Path) -> None:
    """The file is not blamed for what came from the command line."""
    (tmp_path / "half.yaml").write_text("task: {kind: sinusoid}\nmodel: {kind: mlp}")
    half = str(tmp_path / "half.yaml")
    for name, overrides, message in (
        ("sinusoid", ["inner.lr=-1", "outer.beta=1"], "2 errors in inner.lr=-1 outer.beta=1:"),
        (half, ["inner.lr=-1"], f"2 errors in {half} with inner.lr=-1:"),
        (half, [], f"1 error in {half}:"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(name, overrides)
        assert str(caught.value).splitlines()[0] == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.shots=0", "task.shots: must be at least 1, got 0"),
        ("task.amplitude=[3,1]", "task.amplitude: must be [low, high]"),
        ("task.kind=sinus", "task.kind: 'sinus' is none of sinusoid, quadratic"),
        ("task.kind=nowhere.module:Tasks", "task.kind: cannot import nowhere.module:Tasks"),
        ("task.kind=pathlib:Path", "not a subclass of tasks.base.TaskDistribution"),
        ("model.kind=resnet", "model.kind: 'resnet' is none of linear, mlp, conv4"),
        ("outer.scheduler=Cosine", "outer.scheduler: 'Cosine' is none of"),
        ("outer.scheduler=StepLR", "outer.scheduler_args: StepLR refuses them"),
        ("inner.lrr=0.1", "inner.lrr: unknown setting; did you mean inner.lr?"),
        ("lr=0.1", "lr: unknown setting; did you mean inner.lr?"),
        ("evaluation.steps=5", "evaluation.steps: input should be a list, got 5"),
        ("outer.momentum=0.9", "outer.momentum: only sgd has momentum"),
        ("evaluation.steps=[1,0]", "evaluation.steps: must be ascending"),
        ("evaluation.variants.big={shots: 0}", "evaluation.variants.big.shots: must be at least 1"),
        ("evaluation.variants.big={size: 1}", "evaluation.variants.big.size: unknown setting"),
        ("inner.lr=.nan", "inner.lr"),
        ("compute.dtype=float16", "compute.dtype: input should be 'float32' or 'float64'"),
        ("inner=3", "inner: "),
        ("inner.lr", "must look like inner.lr=0.1"),
        ("inner.lr=[", "the value is not YAML"),
        ("name=a/b", "name: "),
    ],
)
def test_bad_settings_name_the_field(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("sinusoid", [change])
    assert message in str(caught.value)


def test_unknown_experiments_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no experiment 'sinusiod'"):
        load("sinusiod")
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold sections"):
        load(str(tmp_path / "list.yaml"))
    (tmp_path / "half.yaml").write_text("task: {kind: sinusoid}\nmodel: {kind: mlp}")
    with pytest.raises(ConfigError, match="outer: missing"):
        load(str(tmp_path / "half.yaml"))


def test_own_components_are_checked_like_ours() -> None:
    own = load("sinusoid", ["task.kind=tests.helpers:SlowSinusoid", "task.seconds=0.5"])
    assert own.build_task().seconds == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"task\.seconds"):
        load("sinusoid", ["task.kind=tests.helpers:SlowSinusoid", "task.seconds=soon"])


def test_overrides_leave_the_file_alone() -> None:
    data: dict[str, Any] = {"inner": {"lr": 1}}
    assert apply_overrides(data, ["inner.lr=2", "a.b.c=3"]) == {
        "inner": {"lr": 2},
        "a": {"b": {"c": 3}},
    }
    assert data == {"inner": {"lr": 1}}


def test_resume_allows_what_does_not_touch_results(quick: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(experiment_of(quick).to_yaml())
    longer = load_to_resume(tmp_path, ["outer.iterations=9", "cluster.workers=2"])
    assert longer.outer.iterations == 9
    with pytest.raises(ConfigError, match=r"inner\.lr: was 0\.01"):
        load_to_resume(tmp_path, ["inner.lr=0.5"])
    with pytest.raises(ConfigError, match=r"sinusoid: .* says which experiment goes on"):
        load_to_resume(tmp_path, ["sinusoid"])
    with pytest.raises(ConfigError, match=r"nothing is not the folder of a run: there is no such"):
        load_run(tmp_path / "nothing")


def test_json_schema_covers_every_kind() -> None:
    schema = json.loads(json.dumps(json_schema()))
    for section in ("task", "model"):
        named = [
            option["properties"]["kind"].get("const")
            for option in schema["properties"][section]["anyOf"]
        ]
        assert set(kinds(section)) <= set(named)
    assert "lr" in schema["$defs"]["Inner"]["properties"]


def test_flat_settings_have_the_paths_of_overrides(quick: dict[str, Any]) -> None:
    experiment = experiment_of(quick)
    flat = experiment.flat()
    assert flat["inner.lr"] == 0.01
    assert flat["task.kind"] == "sinusoid"
    dumped = yaml.safe_load(experiment.to_yaml())
    assert dumped["outer"]["tasks_per_batch"] == flat["outer.tasks_per_batch"]


def test_every_broken_rule_is_an_error_of_its_own() -> None:
    changes = ["algorithm=meta-sgd", "outer.direction=reptile", "outer.weight_decay=0.1"]
    with pytest.raises(ConfigError) as caught:
        load("sinusoid", [*changes, "outer.query_losses=all"])
    assert caught.value.errors == [
        "inner.order: reptile has no second order",
        "inner.rates: reptile has no gradient by which rates could be learned",
        "outer.query_losses: reptile uses no query losses",
        "outer.weight_decay: would pull the learned inner.rates to zero",
    ]


def test_rules_of_one_section_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load("sinusoid", ["outer.momentum=0.5", "outer.scheduler_args={gamma: 1}"])
    assert caught.value.errors == [
        "outer.momentum: only sgd has momentum, not adam",
        "outer.scheduler_args: given without outer.scheduler",
    ]


@pytest.mark.parametrize("weights", ["[]", "[1, -1]", "[0]", "[1, 1]"])
def test_query_weights_are_one_per_step(weights: str) -> None:
    with pytest.raises(ConfigError, match=r"outer\.query_losses: needs a weight of at least"):
        load("sinusoid", ["inner.steps=1", f"outer.query_losses={weights}"])
