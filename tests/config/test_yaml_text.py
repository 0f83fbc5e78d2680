"""YAML: scientific notation is a number, and what is written is read again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.loading import ConfigError, load
from pipeline.config.yaml_text import read, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e3", -2500.0),
        (".5e1", 5.0),
        ("1.0e-5", 1e-5),
        ("1_0e2", 1000.0),
        ("7", 7),
        ("'1e-5'", "1e-5"),
        ("1e", "1e"),
        ("1e-5x", "1e-5x"),
        ("e5", "e5"),
    ],
)
def test_numbers(text: str, value: Any) -> None:
    assert read(text) == value
    assert type(read(text)) is type(value)


some_text = st.text("ab01eE_.:#'-+ ")
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | some_text
    | st.from_regex(r"[-+]?[0-9._]{1,3}[eE][-+]?[0-9]{1,2}", fullmatch=True),
    lambda values: st.lists(values) | st.dictionaries(some_text, values),
    max_leaves=5,
)


@given(plain)
def test_what_is_written_is_read_again(value: Any) -> None:
    assert read(write(value)) == value


@given(plain)
def test_others_read_the_same_in_what_is_written(value: Any) -> None:
    assert yaml.safe_load(write(value)) == value


def test_nothing_but_plain_values_is_made() -> None:
    with pytest.raises(yaml.YAMLError):
        read("!!python/object/apply:os.getcwd []")
    assert math.isnan(read(".nan"))


def test_arguments_of_schedulers_are_numbers() -> None:
    changes = ["outer.scheduler=CosineAnnealingLR", "outer.scheduler_args={eta_min: 1e-5}"]
    assert load("sinusoid", changes).outer.scheduler_args == {"eta_min": 1e-5}
    assert load("sinusoid", [*changes[:1], "outer.scheduler_args.eta_min=1e-5"]) == load(
        "sinusoid", changes
    )


def test_an_argument_that_is_looked_at_in_the_first_step_alone() -> None:
    changes = ["outer.scheduler=ExponentialLR", "outer.scheduler_args.gamma=fast"]
    with pytest.raises(ConfigError) as caught:
        load("sinusoid", changes)
    assert "outer.scheduler_args: ExponentialLR refuses them" in str(caught.value)
