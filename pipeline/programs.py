"""Chunk functions of experiments; compiled ones are shared by the runs of a process."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch

from pipeline.adaptation import Adaptation
from pipeline.algorithms import Phase
from pipeline.components import resolve
from pipeline.config import Experiment
from pipeline.meta_gradient import ChunkFunction, chunk_function
from pipeline.meta_loss import TaskLoss
from pipeline.parameters import Layout

_MOST_PROGRAMS = 16
_programs: dict[Any, ChunkFunction] = {}
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
    """`chunk_function` of an experiment, for one of its phases.

    θ, the tasks and the inner rate are arguments of a program; the key holds all the rest. So the
    trials of a search that differ in rates, seeds or iterations are compiled once.
    """
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
    task, model = experiment.task, experiment.model
    constants = inner.model_dump(mode="json", exclude={"lr", "order", "second_order_from"})
    # A program freezes what a model or task of the user's own holds besides parameters.
    own = ":" in task.kind + model.kind
    acting = experiment.reinforcement
    key = (
        experiment.seed if own else None,
        experiment.data.root,
        resolve("task", task.kind),
        resolve("model", model.kind),
        json.dumps([task.settings, model.settings, constants], sort_keys=True),
        phase,
        estimator,
        layout,
        None if acting is None else (acting.estimator, acting.update, acting.clip),
        experiment.compute.dtype,
        device,
    )
    with _programs_lock:
        program = _programs.pop(key) if key in _programs else make()
        _programs[key] = program  # the one used last is last
        if len(_programs) > _MOST_PROGRAMS:
            del _programs[next(iter(_programs))]
        return program
