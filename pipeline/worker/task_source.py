"""What a worker knows about its tasks: where their data comes from, how they are judged.

`supervised` samples examples; `reinforcement` acts. Everything between - adaptation,
meta-gradients, chunks, workers, the driver - is the same for both and asks through this interface.
"""

from __future__ import annotations

import json
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config.experiment import Experiment
from pipeline.maml.meta_loss import Batch, TaskLoss
from pipeline.maml.parameters import Params
from pipeline.worker.jobs import Judged
from tasks.base import TaskDistribution

Indices = npt.NDArray[np.int64]
EVALUATION_SEED = 0
"""Validation and test tasks are the same for every run, whatever its seed: curves can be paired."""

_Tasks = TypeVar("_Tasks", bound=TaskDistribution)


class Taken(NamedTuple):
    """The tasks of a chunk."""

    batch: Batch
    facts: dict[str, Tensor]
    """What collecting them had to say, per task, [B]."""


class Domain(Protocol):
    """Supervised tasks, or tasks to act in."""

    @property
    def objective(self) -> TaskLoss:
        """The losses of a task."""
        ...

    def take(self, theta: Params, iteration: int, chunk: int) -> Taken:
        """The training tasks of a chunk, for this θ."""
        ...

    def prepare_ahead(self) -> bool:
        """Use idle time for the next iteration; False if there is nothing to do."""
        ...

    def examine(
        self,
        theta: Params,
        split: str,
        indices: Indices,
        steps: tuple[int, ...],
        changes: dict[str, Any],
        judged: Judged,
    ) -> dict[str, Tensor]:
        """Metrics of each task after each of `steps`, [len(steps), B].

        `changes` are task settings that differ from the experiment's.
        """
        ...


class Variants(Generic[_Tasks]):
    """The experiment's tasks with some settings changed; built once."""

    def __init__(self, experiment: Experiment, task: _Tasks):
        self._experiment = experiment
        self._built: dict[str, Any] = {json.dumps({}): task}

    def of(self, changes: dict[str, Any]) -> _Tasks:
        """The tasks with these changes."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self._built:
            self._built[key] = self._experiment.build_task(**changes)
        task: _Tasks = self._built[key]
        return task
