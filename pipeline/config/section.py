"""The base of all sections of an experiment, and the rules that a section keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Rule(NamedTuple):
    """A condition that makes a section wrong, and the message for it."""

    where: str
    """The path of the setting that the message names."""
    when: Callable[[Any], object]
    """Called with the section; a true value means that the section breaks the rule."""
    why: str | Callable[[Any], str]
    """The message, or a function that makes it from the section's values."""

    def message(self, section: Any) -> str:
        """The line for a section that breaks the rule: 'where: why'."""
        return f"{self.where}: {self.why if isinstance(self.why, str) else self.why(section)}"


def truth_is_no_number(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """A validator of all fields: where a number is wanted, true is the text 'true', which is none.

    Python, and so pydantic, takes it for 1.
    """
    kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
    return _as_text(value) if kinds & {int, float} and not kinds & {bool, Any} else value


def _kinds_in(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) is Literal:
        return set()
    parts = get_args(annotation)
    return set().union(*map(_kinds_in, parts)) if parts else {annotation}


def _as_text(value: Any) -> Any:
    """The value with the words true and false for what they name, also within lists and
    mappings."""
    if isinstance(value, list | tuple):
        return [_as_text(each) for each in value]
    if isinstance(value, dict):
        return {name: _as_text(each) for name, each in value.items()}
    return str(value).lower() if isinstance(value, bool) else value


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot be changed afterwards.

    Once every field is right by itself, each of the section's `faults` is a line of one ValueError.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    _numbers = field_validator("*", mode="before")(truth_is_no_number)

    def faults(self) -> list[str]:
        """What is wrong with the fields together, as 'path: why': a line for each broken rule."""
        return [rule.message(self) for rule in self.rules if rule.when(self)]

    @model_validator(mode="after")
    def _has_no_faults(self) -> Self:
        if faults := self.faults():
            raise ValueError("\n".join(faults))
        return self
