"""The `search:` section of an experiment: which settings are tried, and how."""

from __future__ import annotations

import operator
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer

from pipeline.config.section import Rule, Section


class Domain(Section):
    """The values that one setting may take: exactly one of these."""

    loguniform: tuple[float, float] | None = Field(None, description="[low, high], low > 0")
    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    integer: tuple[int, int] | None = Field(None, description="[low, high], both included")
    choice: tuple[Any, ...] | None = Field(None, description="one of these, drawn at random")
    grid: tuple[Any, ...] | None = Field(
        None, description="each of these, with every draw (tpe: drawn)"
    )

    @property
    def given(self) -> list[str]:
        """The names of the fields that are given; one, in a search that has been checked."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return self.given[0]

    @property
    def values(self) -> tuple[Any, ...]:
        """The two ends of a range, or the values to choose from."""
        return tuple(getattr(self, self.kind))

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}


def _is_range(name: str) -> Rule:
    """The rule that the ends of a range are in order."""
    return Rule(
        "search.space.PATH",
        lambda domain: name in domain.given and not operator.lt(*getattr(domain, name)),
        lambda domain: f"must be [low, high] with low < high, got {list(getattr(domain, name))}",
    )


def _has_values(name: str) -> Rule:
    """The rule that there is something to choose from."""
    return Rule("search.space.PATH", lambda domain: getattr(domain, name) == (), f"{name} is empty")


_OF_DOMAINS = (
    Rule(
        "search.space.PATH",
        lambda domain: len(domain.given) != 1,
        f"give exactly one of {', '.join(Domain.model_fields)}",
    ),
    *map(_is_range, ("loguniform", "uniform", "integer")),
    *map(_has_values, ("choice", "grid")),
    Rule(
        "search.space.PATH",
        lambda domain: domain.loguniform and domain.loguniform[0] <= 0,
        lambda domain: f"a loguniform range must be above 0, got {list(domain.loguniform)}",
    ),
)
"""Rules of a domain; PATH is that of the setting, which the domain does not know."""


class Search(Section):
    """A Ray Tune search over settings of the experiment; `maml train` ignores it."""

    space: dict[str, Domain] = Field(
        description="settings by their path: inner.lr: {loguniform: [0.001, 1]}"
    )
    samples: int = Field(
        8, ge=1, description="random draws; each is tried with every point of the grids"
    )
    metric: str | None = Field(
        None,
        description="of validation, after evaluation.selection_step adaptation steps (NAME_stepK: "
        "after K); null: that by which checkpoints are chosen",
    )
    mode: Literal["min", "max"] | None = Field(
        None, description="null: a loss is to be small, an accuracy large"
    )
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = Field(
        "asha", description="which trials are stopped early; pbt changes settings in flight"
    )
    scheduler_args: dict[str, Any] = Field(
        default_factory=dict, description="arguments of Ray Tune's scheduler"
    )
    algorithm: Literal["random", "grid", "tpe"] = Field(
        "random", description="grid: every combination, once; tpe: Optuna's, learns from results"
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="trials at the same time; null: as many as there is room for"
    )
    time_budget: float | None = Field(None, gt=0, description="seconds until all trials are ended")

    @field_validator("space", mode="before")
    @classmethod
    def _by_path(cls, space: Any) -> Any:
        """`inner: {lr: ...}` is another way to write `inner.lr: ...`."""

        def walk(prefix: str, value: Any) -> dict[str, Any]:
            if not isinstance(value, dict) or not value:
                raise ValueError(
                    f"search.space.{prefix}: must look like {{loguniform: [low, high]}} (or "
                    f"{', '.join(Domain.model_fields)}), got {value!r}"
                )
            if set(value) & set(Domain.model_fields):
                return {prefix: value}
            return {
                path: leaf
                for key, inner in value.items()
                for path, leaf in walk(f"{prefix}.{key}" if prefix else str(key), inner).items()
            }

        return walk("", space) if isinstance(space, dict) and space else space

    rules = (
        Rule(
            "search.space", lambda search: not search.space, "is empty; name a setting, as inner.lr"
        ),
        Rule(
            "search.algorithm",
            lambda search: search.algorithm == "grid" and _continuous(search),
            lambda search: (
                f"grid needs values, such as grid: [0.01, 0.1], of {', '.join(_continuous(search))}"
            ),
        ),
        Rule(
            "search.algorithm",
            lambda search: search.scheduler == "pbt" and search.algorithm == "tpe",
            "tpe cannot be combined with scheduler pbt",
        ),
        Rule(
            "search.max_concurrent",
            lambda search: search.scheduler in ("pbt", "hyperband") and search.max_concurrent,
            lambda search: (
                f"{search.scheduler} compares all trials with each other, and where there is no "
                "room for all of them they take turns: leave it null"
            ),
        ),
    )

    def faults(self) -> list[str]:
        """Broken rules of the domains, each under the path of its setting, and of the section."""
        of_domains = [
            rule._replace(where=f"search.space.{path}").message(domain)
            for path, domain in self.space.items()
            for rule in _OF_DOMAINS
            if rule.when(domain)
        ]
        return [*of_domains, *super().faults()]


def _continuous(search: Search) -> list[str]:
    """The paths of settings whose domain has no list of values."""
    return [path for path, domain in search.space.items() if domain.uniform or domain.loguniform]
