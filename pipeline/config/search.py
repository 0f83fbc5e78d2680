"""The `search:` section of an experiment: which settings are tried, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from pipeline.config.settings import Section


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
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The two ends of a range, or the values to choose from."""
        return tuple(getattr(self, self.kind))

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}

    def fault(self) -> str | None:
        """What is wrong with the given values, in words; None if nothing is."""
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            return f"give exactly one of {', '.join(type(self).model_fields)}"
        if self.kind in ("choice", "grid"):
            return None if self.values else f"{self.kind} is empty"
        low, high = self.values
        if not low < high:
            return f"must be [low, high] with low < high, got {list(self.values)}"
        if self.kind == "loguniform" and low <= 0:
            return f"a loguniform range must be above 0, got {list(self.values)}"
        return None


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

    @model_validator(mode="after")
    def _possible(self) -> Search:
        if not self.space:
            raise ValueError("search.space: is empty; name a setting, such as inner.lr")
        for path, domain in self.space.items():
            if fault := domain.fault():
                raise ValueError(f"search.space.{path}: {fault}")
            if self.algorithm == "grid" and domain.kind in ("uniform", "loguniform"):
                raise ValueError(
                    f"search.space.{path}: algorithm grid needs values, such as grid: [0.01, 0.1]"
                )
        if self.scheduler == "pbt" and self.algorithm == "tpe":
            raise ValueError("search.algorithm: tpe cannot be combined with scheduler pbt")
        if self.scheduler in ("pbt", "hyperband") and self.max_concurrent:
            raise ValueError(
                f"search.max_concurrent: {self.scheduler} compares all trials with each other, and "
                "where there is no room for all of them they take turns: leave it null"
            )
        return self
