"""The table of algorithms: an entry is all that a new one takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.algorithms import PRESETS, Preset, unknown
from pipeline.config.loading import ConfigError, json_schema, load
from pipeline.training.loop import train
from tests.conftest import experiment_of


def test_a_new_algorithm_is_an_entry_of_the_table(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"inner.adapted": ["head"], "inner.rates": "per-parameter"}
    monkeypatch.setitem(PRESETS, "fast-head", Preset("the head adapts at learned rates", settings))
    experiment = experiment_of({**quick, "algorithm": "fast-head"})
    assert experiment.inner.adapted == ("head",)
    assert experiment.algorithm_name == "fast-head"
    assert "fast-head" in json_schema()["properties"]["algorithm"]["enum"]
    train(experiment, tmp_path / "run")
    again = load(str(tmp_path / "run" / "config.yaml"))
    assert again.algorithm_name == "fast-head"
    assert load("sinusoid", ["algorithm=fast-head"]).inner.rates == "per-parameter"


def test_an_unknown_algorithm_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        load("sinusoid", ["algorithm=mamal", "inner.lr=-1"])
    first, second = caught.value.errors
    assert first.startswith("algorithm: 'mamal' is none of maml, fomaml, reptile, anil")
    assert first.endswith("; did you mean maml?")
    assert second.startswith("inner.lr: ")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mamlpp", "maml++"),
        ("maml+", "maml++"),
        ("MAML_plus_plus", "maml++"),
        ("MAML", "maml"),
        ("metasgd", "meta-sgd"),
        ("fo-maml", "fomaml"),
    ],
)
def test_another_spelling_is_understood(name: str, meant: str) -> None:
    assert (unknown(name) or "").endswith(f"; did you mean {meant}?")


def test_the_schema_lists_the_algorithms() -> None:
    assert json_schema()["properties"]["algorithm"]["enum"] == list(PRESETS)


def test_a_schedule_of_ones_own_does_not_get_the_arguments_of_the_presets() -> None:
    changes = ["algorithm=maml++", "outer.scheduler=StepLR", "outer.scheduler_args.step_size=5"]
    assert load("sinusoid", changes).outer.scheduler_args == {"step_size": 5}
