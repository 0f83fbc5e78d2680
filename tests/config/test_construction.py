"""An Experiment that is constructed is as complete, and as checked, as one that is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import Experiment
from pipeline.config.loading import from_dict
from pipeline.config.settings import Component, Inner, Outer, Reinforcement


def test_sections_and_plain_values_are_the_same_experiment(either: dict[str, Any]) -> None:
    made = Experiment(
        **{
            **either,
            "task": Component(**either["task"]),
            "inner": Inner(**either["inner"]),
            "outer": Outer(**either["outer"]),
        }
    )
    assert made == from_dict(either)
    assert Experiment(**either) == made
    assert Experiment.model_validate_json(made.model_dump_json()) == made


def test_the_algorithm_fills_in_what_is_left_open(quick: dict[str, Any]) -> None:
    made = Experiment(**{**quick, "algorithm": "anil", "inner": Inner(lr=0.02)})
    assert (made.inner.adapted, made.inner.lr) == (("head",), 0.02)
    assert made.algorithm_name == "anil"
    own = Experiment(**{**quick, "algorithm": "anil", "inner": Inner(adapted=("all",))})
    assert own.inner.adapted == ("all",)


def test_settings_of_task_and_model_get_their_defaults(quick: dict[str, Any]) -> None:
    made = Experiment(**quick)
    assert made.task.settings["amplitude"] == [0.1, 5.0]
    assert made.model.settings["normalisation"] == "none"


def test_the_section_reinforcement_is_there_for_policies_alone(
    quick: dict[str, Any], moving: dict[str, Any]
) -> None:
    assert Experiment(**quick).reinforcement is None
    assert Experiment(**moving).reinforcement == Reinforcement(cg_iterations=3)
    assert Experiment(**{**moving, "reinforcement": None}).reinforcement == Reinforcement()
    del moving["reinforcement"]
    assert Experiment(**moving).reinforcement == Reinforcement()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"kind": "sinusoid", "shoots": 1}}, "task.shoots: unknown setting of sinusoid"),
        ({"task": {"kind": "sinusoid", "shots": 0}}, "task.shots: must be at least 1"),
        ({"model": {"kind": "gaussian-policy"}}, "sinusoid tasks are supervised"),
        ({"reinforcement": {}}, "reinforcement: sinusoid tasks are supervised"),
        ({"evaluation": {"variants": {"big": {"shots": 0}}}}, "evaluation.variants.big.shots"),
        ({"algorithm": "mamal"}, "did you mean maml?"),
        (
            {"outer": {"iterations": 1, "tasks_per_batch": 1, "scheduler": "StepLR"}},
            "outer.scheduler_args: StepLR refuses them",
        ),
        ({"run": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_refused(
    quick: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        Experiment(**{**quick, **change})
    assert message in str(caught.value)


def test_what_is_given_is_not_changed(quick: dict[str, Any]) -> None:
    given = {**quick, "algorithm": "reptile", "inner": {"steps": 2}}
    Experiment(**given)
    assert given["inner"] == {"steps": 2}
    assert "scheduler" not in given["outer"]
