"""What is found to be wrong only once task, policy or schedule are built from their settings.

Each function returns lines such as 'task.shots: must be at least 1, got 0', none if all is well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.components import (
    POLICIES,
    ComponentError,
    build_task,
    check_settings,
    kinds,
)
from pipeline.config.lr_schedulers import check_scheduler
from pipeline.config.settings import Component, Outer
from tasks.base import TaskDistribution
from tasks.control.mdp import MDPs


def component_faults(
    task: Component, variants: Mapping[str, Mapping[str, Any]], model: Component, root: str
) -> list[str]:
    """What the tasks and their `variants` (changed settings by name) refuse, and whether the kind
    of the model goes with them. `root` is `data.root`."""
    faults = []
    try:
        faults += _model_faults(build_task(task.kind, task.settings, root), task.kind, model.kind)
    except ValueError as error:
        faults.append(f"task.{error}")
    for name, changes in variants.items():
        prefix = f"evaluation.variants.{name}"
        try:
            settings = check_settings(prefix, task.kind, {**task.settings, **changes}, "task")
            build_task(task.kind, settings, root)
        except ComponentError as error:
            faults += error.errors
        except ValueError as error:
            faults.append(f"{prefix}.{error}")
    return faults


def _model_faults(task: TaskDistribution, task_kind: str, kind: str) -> list[str]:
    """Whether a policy is for reinforcement learning tasks, and for actions such as theirs."""
    if not isinstance(task, MDPs):
        if kind not in POLICIES.values():
            return []
        return [
            f"model.kind: {kind} is for reinforcement learning tasks, and {task_kind} tasks are "
            "supervised"
        ]
    wanted = POLICIES[task.actions]
    if kind == wanted or kind not in kinds("model"):
        return []
    return [f"model.kind: {task.actions} actions need {wanted} or one of your own, got {kind!r}"]


def scheduler_faults(outer: Outer) -> list[str]:
    """Whether torch takes the schedule of the outer rate and its arguments."""
    try:
        check_scheduler(outer)
    except ValueError as error:
        return [str(error)]
    return []
