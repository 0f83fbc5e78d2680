"""The functions that compute an experiment; runs of the same process share the compiled ones.

θ, the tasks and the inner rate are arguments of a program. Everything else is frozen in it and is
the key by which it is found again, so the trials of a search that differ in rates, seeds or
iterations are compiled once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from pipeline.config.components import resolve
from pipeline.config.experiment import Experiment
from pipeline.config.phases import Phase, phases
from pipeline.maml.compilation import Compiler
from pipeline.maml.flat_vector import Params
from pipeline.maml.meta_gradient import ChunkFunction, chunk_function
from pipeline.maml.meta_loss import TaskLoss
from pipeline.rl.fisher import fisher_product
from pipeline.rl.policy_loss import PolicyObjective
from pipeline.rl.rollouts import CollectedBatch
from pipeline.worker.learner import Learner

_Program = TypeVar("_Program", bound=Callable[..., Any])
_MOST_PROGRAMS = 16
_programs: dict[Any, Any] = {}
_programs_lock = threading.Lock()


def program_of(
    learner: Learner,
    phase: Phase,
    objective: TaskLoss,
    constants: tuple[Any, ...],
    compile: bool,
) -> ChunkFunction:
    """`meta_gradient.chunk_function` of an experiment, for one of its phases.

    `constants` are those of the objective, see `TaskSource.constants`.
    """
    inner, direction = learner.experiment.inner, learner.experiment.outer.direction

    def make() -> ChunkFunction:
        return chunk_function(
            objective,
            learner.adaptation,
            learner.layout,
            order="second" if phase.second_order else "first",
            direction=direction,
            recompute=inner.recompute,
            compile=compile,
        )

    if not compile:
        return make()
    device = learner.alpha.device
    key = (*_frozen(learner.experiment), constants, phase, direction, learner.layout, device)
    return _shared(key, make)


FisherFunction = Callable[[Params, CollectedBatch, Tensor, Params], Params]
"""(θ, B tasks, inner rate, direction) -> the Fisher product, summed over the tasks."""


def fisher_program_of(
    learner: Learner, objective: PolicyObjective, constants: tuple[Any, ...], compile: bool
) -> FisherFunction:
    """`fisher.fisher_product` of an experiment; `constants` as in `program_of`."""
    second_order = learner.experiment.inner.order != "first"
    adaptation = learner.adaptation

    def fisher(theta: Params, batch: CollectedBatch, alpha: Tensor, direction: Params) -> Params:
        return fisher_product(
            objective, adaptation, theta, batch, alpha, direction, second_order=second_order
        )

    if not compile:
        return fisher
    key = ("fisher", *_frozen(learner.experiment), constants, second_order)
    return _shared(key, lambda: Compiler().compiled(fisher))


def identity(experiment: Experiment) -> str:
    """All that a run may compile, as text. Runs have the same if they differ only in what their
    programs have arguments for: rates, seeds, numbers of iterations."""
    outer, reinforcement = experiment.outer, experiment.reinforcement
    others = [
        phases(experiment),
        outer.direction,
        outer.tasks_per_batch,
        outer.tasks_per_chunk,
        reinforcement and reinforcement.model_dump(mode="json"),
        experiment.compute.device,
    ]
    return json.dumps([_settings(experiment), others])


def _frozen(experiment: Experiment) -> tuple[Any, ...]:
    """What every program of an experiment freezes: it has no argument for it."""
    task, model = resolve("task", experiment.task.kind), resolve("model", experiment.model.kind)
    return _settings(experiment), task, model


def _settings(experiment: Experiment) -> str:
    """The settings that every program of an experiment freezes, as text."""
    task, model = experiment.task, experiment.model
    inner = experiment.inner.model_dump(mode="json", exclude={"lr", "order", "second_order_from"})
    # A program freezes what a model or task of the user's own holds besides parameters.
    seed = experiment.seed if ":" in task.kind + model.kind else None
    names = [task.kind, model.kind, experiment.data.root, experiment.compute.dtype, seed]
    return json.dumps([*names, task.settings, model.settings, inner], sort_keys=True)


def _shared(key: Any, make: Callable[[], _Program]) -> _Program:
    """The program with this key, made where there is none yet. The most recent ones are kept."""
    with _programs_lock:
        program: _Program = _programs.pop(key) if key in _programs else make()
        _programs[key] = program  # the one used last is last
        if len(_programs) > _MOST_PROGRAMS:
            del _programs[next(iter(_programs))]
        return program
