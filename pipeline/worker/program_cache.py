"""The functions that experiments compute by; compiled ones are shared by the runs of a process.

θ, the tasks and the inner rate are arguments of a program; the key holds all the rest. So the
trials of a search that differ in rates, seeds or iterations are compiled once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.config.components import resolve
from pipeline.config.experiment import Experiment
from pipeline.config.phases import Phase
from pipeline.maml.adaptation import Adaptation
from pipeline.maml.compilation import Compiler
from pipeline.maml.meta_gradient import ChunkFunction, chunk_function
from pipeline.maml.meta_loss import TaskLoss
from pipeline.maml.parameters import Layout, Params
from pipeline.rl.fisher import fisher_product
from pipeline.rl.policy_loss import PolicyObjective
from pipeline.rl.rollouts import CollectedBatch

_Program = TypeVar("_Program", bound=Callable[..., Any])
_MOST_PROGRAMS = 16
_programs: dict[Any, Any] = {}
_programs_lock = threading.Lock()


def program_of(
    experiment: Experiment,
    phase: Phase,
    objective: TaskLoss,
    adaptation: Adaptation,
    layout: Layout,
    device: torch.device,
    compile: bool,
) -> ChunkFunction:
    """`chunk_function` of an experiment, for one of its phases."""
    inner, estimator = experiment.inner, experiment.outer.estimator

    def make() -> ChunkFunction:
        return chunk_function(
            objective,
            adaptation,
            layout,
            order="second" if phase.second_order else "first",
            estimator=estimator,
            checkpoint=inner.checkpoint,
            compile=compile,
        )

    if not compile:
        return make()
    return _shared((*_constants(experiment), phase, estimator, layout, device), make)


FisherFunction = Callable[[Params, CollectedBatch, Tensor, Params], Params]
"""(θ, B tasks, inner rate, direction) -> the product, summed over the tasks."""


def fisher_program_of(
    experiment: Experiment, objective: PolicyObjective, adaptation: Adaptation, compile: bool
) -> FisherFunction:
    """`fisher.fisher_product` of an experiment."""
    second_order = experiment.inner.order != "first"

    def fisher(theta: Params, batch: CollectedBatch, alpha: Tensor, direction: Params) -> Params:
        return fisher_product(
            objective, adaptation, theta, batch, alpha, direction, second_order=second_order
        )

    if not compile:
        return fisher
    key = ("fisher", *_constants(experiment), second_order)
    return _shared(key, lambda: Compiler().compiled(fisher))


def _constants(experiment: Experiment) -> tuple[Any, ...]:
    """What a program holds of an experiment, other than what is an argument of it."""
    task, model = experiment.task, experiment.model
    inner = experiment.inner.model_dump(mode="json", exclude={"lr", "order", "second_order_from"})
    # A program freezes what a model or task of the user's own holds besides parameters.
    own = ":" in task.kind + model.kind
    acting = experiment.reinforcement
    return (
        experiment.seed if own else None,
        experiment.data.root,
        resolve("task", task.kind),
        resolve("model", model.kind),
        json.dumps([task.settings, model.settings, inner], sort_keys=True),
        None if acting is None else (acting.estimator, acting.update, acting.clip),
        experiment.compute.dtype,
    )


def _shared(key: Any, make: Callable[[], _Program]) -> _Program:
    """The program with this key, made where there is none yet."""
    with _programs_lock:
        program: _Program = _programs.pop(key) if key in _programs else make()
        _programs[key] = program  # the one used last is last
        if len(_programs) > _MOST_PROGRAMS:
            del _programs[next(iter(_programs))]
        return program
