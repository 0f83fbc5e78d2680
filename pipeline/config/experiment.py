"""The whole experiment as one typed schema that completes and checks itself.

The sections `task` and `model` hold a `kind` and the settings of whatever that kind names - a task
distribution's or a model builder's keyword parameters (see `components`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.algorithms import PRESETS, expanded, named, unknown
from pipeline.config.component_checks import component_faults, scheduler_faults
from pipeline.config.components import ComponentError, build_task, check_settings, resolve
from pipeline.config.rules import EXPERIMENT_RULES
from pipeline.config.search import Search
from pipeline.config.section import Section
from pipeline.config.settings import (
    Checkpointing,
    Cluster,
    Component,
    Compute,
    Data,
    Diagnostics,
    Evaluation,
    Inner,
    Outer,
    Pretraining,
    Reinforcement,
    Tracking,
)
from pipeline.config.yaml_text import write
from tasks.base import TaskDistribution
from tasks.control.mdp import MDPs
from tasks.credentials import refusal
from tasks.data_root import absolute_root


class Experiment(Section):
    """Everything that is asked for: tasks, model, settings of every part; checked and frozen.

    `load` makes one from a name or a file; constructing one does the same with sections or plain
    values. What is left open gets the value of the algorithm's preset, else its default: also the
    settings of task and model, and `reinforcement` for reinforcement learning tasks alone. Raises
    pydantic's ValidationError (a ValueError) for settings that are wrong: fields first; once these
    are right, everything that contradicts each other and all that task, policy or schedule refuse.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    run_dir: str | None = Field(None, description="null: runs/NAME-DATE-TIME")
    algorithm: str = Field(
        "maml",
        description="fills in the settings of the family that are not given",
        json_schema_extra=lambda schema: schema.update(enum=[*PRESETS]),
    )
    task: Component
    model: Component
    inner: Inner = Inner()
    outer: Outer
    reinforcement: Reinforcement | None = Field(
        None,
        validate_default=True,
        description="of reinforcement learning tasks; filled in for them",
    )
    compute: Compute = Compute()
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    diagnostics: Diagnostics = Diagnostics()
    pretraining: Pretraining | None = Field(
        None, description="null: meta-learning; else ordinary training and fine-tuning"
    )
    tracking: Tracking = Tracking()
    checkpoint: Checkpointing = Checkpointing()
    data: Data = Field(default_factory=Data)
    search: Search | None = Field(None, description="what `maml search` tries")

    rules = EXPERIMENT_RULES

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        """Give the settings of the algorithm's preset to those that are left open."""
        if not isinstance(given, Mapping):
            return given  # an Experiment, or reported by pydantic
        data = {
            name: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for name, value in given.items()
        }
        return expanded(data, _settings_of_model(data.get("model")))

    @field_validator("algorithm")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if fault := unknown(name):
            raise ValueError(f"algorithm: {fault}")
        return name

    @field_validator("task", "model")
    @classmethod
    def _fill_in_defaults(cls, component: Component, info: ValidationInfo) -> Component:
        """Check the types of the kind's settings, and give those left open their default."""
        try:
            settings = check_settings(str(info.field_name), component.kind, component.settings)
        except ComponentError as error:
            raise ValueError(str(error)) from None
        return Component(kind=component.kind, **settings)

    @field_validator("reinforcement")
    @classmethod
    def _is_there_for_policies(
        cls, section: Reinforcement | None, info: ValidationInfo
    ) -> Reinforcement | None:
        """Whether this section exists says everywhere whether policies are trained."""
        task = info.data.get("task")
        if task is None:
            return section  # the task is wrong, and reported
        kind = resolve("task", task.kind)
        if isinstance(kind, type) and issubclass(kind, MDPs):
            return section or Reinforcement()
        if section is not None:
            raise ValueError(f"reinforcement: {task.kind} tasks are supervised")
        return None

    def faults(self) -> list[str]:
        """Broken rules, and what is found to be wrong by building task and schedule."""
        variants = self.evaluation.variants
        return [
            *super().faults(),
            *component_faults(self.task, variants, self.model, self.data.root),
            *scheduler_faults(self.outer),
            *(fault for path, value in self.flat().items() for fault in _text_faults(path, value)),
        ]

    @property
    def algorithm_name(self) -> str:
        """The algorithm that these settings make: 'custom' where it is no preset, and
        'pretrained, OBJECTIVE' without meta-learning."""
        if self.pretraining is not None:
            return f"pretrained, {self.pretraining.objective}"
        return named(self.flat(), self.algorithm)

    @property
    def second_order_from(self) -> int:
        """The iteration at which annealed order becomes second."""
        return self.inner.second_order_from or max(1, self.outer.iterations // 3)

    @property
    def query_losses_until(self) -> int:
        """The iteration from which annealed query losses are the last one alone."""
        return self.outer.query_losses_until or max(1, self.outer.iterations // 15)

    @property
    def validate_every(self) -> int:
        """Iterations between validations."""
        return self.evaluation.every or max(1, self.outer.iterations // 10)

    @property
    def checkpoint_every(self) -> int:
        """Iterations between checkpoints."""
        return self.checkpoint.every or self.validate_every

    @property
    def track_every(self) -> int:
        """Iterations whose means make one MLflow record."""
        return self.tracking.every or max(1, self.outer.iterations // 1000)

    @property
    def selection_step(self) -> int:
        """The adaptation step whose validation metric chooses the best checkpoint."""
        chosen = self.evaluation.selection_step
        return self.inner.steps if chosen is None else chosen

    @property
    def report_steps(self) -> tuple[int, ...]:
        """The adaptation steps that evaluations report."""
        if self.evaluation.steps is not None:
            return self.evaluation.steps
        return tuple(sorted({*range(self.inner.steps + 1), 10}))

    def build_task(self, **changes: Any) -> TaskDistribution:
        """Build the task distribution, with some of its settings changed (`evaluation.variants`).

        Raises ValueError if the task refuses a setting.
        """
        settings = {**self.task.settings, **changes}
        return build_task(self.task.kind, settings, absolute_root(self.data.root))

    def changed(self, **changes: Any) -> Experiment:
        """A copy with settings of sections changed, or with whole sections replaced; not checked.

        `changed(compute={"device": "cpu"}, search=None)` does one of each.
        """
        sections = {
            name: getattr(self, name).model_copy(update=change)
            for name, change in changes.items()
            if isinstance(change, dict)
        }
        return self.model_copy(update={**changes, **sections})

    def without_gpu(self) -> Experiment:
        """The experiment for a process that was given no GPU: `auto` then means the CPU.

        Ray hides GPUs from no process that asked for none, so all of them would use the first one.
        """
        if self.cluster.gpus_per_worker or self.compute.device != "auto":
            return self
        return self.changed(compute={"device": "cpu"})

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted path, as MLflow records parameters."""

        def walk(prefix: str, value: Any) -> dict[str, Any]:
            if isinstance(value, dict) and value:
                return {
                    path: leaf
                    for key, inner in value.items()
                    for path, leaf in walk(f"{prefix}{key}.", inner).items()
                }
            return {prefix[:-1]: value}

        return walk("", self.plain())

    def plain(self) -> dict[str, Any]:
        """The resolved configuration as plain values; loading them gives the same experiment."""
        dump = self.model_dump(mode="json")
        for section in ("search", "pretraining", "reinforcement"):
            if dump[section] is None:
                del dump[section]
        return dump

    def to_yaml(self) -> str:
        """`plain` as YAML text."""
        return write(self.plain())


def _text_faults(path: str, value: Any) -> list[str]:
    """What no text of a setting may hold: credentials, and NUL, which no file name can."""
    faults = [refusal(path, str(value))]
    if isinstance(value, str) and "\0" in value:
        faults.append(f"{path}: holds a NUL character")
    return [fault for fault in faults if fault]


def _settings_of_model(model: Any) -> Mapping[str, Any]:
    """A model's settings, defaults included; none where they are wrong, which is reported later."""
    if not isinstance(model, Mapping) or not isinstance(model.get("kind"), str):
        return {}
    settings = {key: value for key, value in model.items() if key != "kind"}
    try:
        return check_settings("model", model["kind"], settings)
    except ComponentError:
        return {}
