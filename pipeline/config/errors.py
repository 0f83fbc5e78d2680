"""Turns pydantic's errors about a configuration into messages for a person."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pipeline.config.experiment import Experiment
from pipeline.config.section import Section
from pipeline.config.wording import shown

_TYPE = re.compile(r"int|(literal|tuple)\[.*\]")
"""Parts of an error's path that name a type: pydantic adds them for settings of several types."""
_ALIKE = 0.75  # of 1: what a mistyped setting has in common with the one that was meant


def readable(found: Sequence[Any]) -> list[str]:
    """pydantic's errors as 'path: what is wrong, got value'.

    A setting that may be of several types has one error; a section has one for each of its rules
    that it breaks.
    """
    by_path: dict[str, list[Any]] = {}
    for error in found:
        path = ".".join(str(part) for part in error["loc"] if not _TYPE.fullmatch(str(part)))
        by_path.setdefault(path, []).append(error)
    # The messages of a section's rules are lines of one error of pydantic's.
    return [
        line for path, errors in by_path.items() for line in _message(path, errors).splitlines()
    ]


def _message(path: str, errors: Sequence[Any]) -> str:
    """The message for one path; pydantic has an error for each type that the setting may have."""
    kind, text = errors[0]["type"], str(errors[0]["msg"])
    if kind == "extra_forbidden":
        return f"{path}: unknown setting{_meant(path)}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "value_error":
        return text.removeprefix("Value error, ")
    wanted = text[0].lower() + text[1:]
    for other in errors[1:]:
        wanted += " or " + str(other["msg"]).removeprefix("Input should be ").partition(",")[0]
    wanted = wanted.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    return f"{path}: {wanted}, got {shown(errors[0]['input'])}"


def _meant(path: str) -> str:
    """The question '; did you mean SETTING?' about an unknown path; '' if no setting is like it."""
    known = [f"{section}.{name}" for section, name in _settings()]
    by_name = {name: f"{section}.{name}" for section, name in reversed(_settings())}
    close = [
        *difflib.get_close_matches(path, known, 1, _ALIKE),
        *(by_name[name] for name in difflib.get_close_matches(path, by_name, 1, _ALIKE)),
    ]
    return f"; did you mean {close[0]}?" if close else ""


def _settings() -> list[tuple[str, str]]:
    """The section and the name of every setting, in the order of the schema."""
    found = []
    for section, field in Experiment.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found += [(section, name) for name in kind.model_fields]
    return found
