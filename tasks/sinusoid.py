"""Sinusoid regression (paper section 5.1): y = A·sin(x − φ), a new (A, φ) for every task."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tasks.base import Examples, Regression, TaskBatch, as_tensor, ascending, at_least
from tasks.random import UInt64, task_keys, uniform

_AMPLITUDE, _PHASE, _SUPPORT, _QUERY = range(4)  # random streams


@dataclass(frozen=True, kw_only=True)
class Sinusoid(Regression):
    """A ~ U[amplitude], φ ~ U[phase], x ~ U[x_range]; noiseless targets.

    The defaults are the published ranges. Evaluate with other ranges (`evaluation.variants`) to see
    how a model generalises beyond those of its training. `query_x_range` changes the query points
    alone: [5, 10] asks for extrapolation from support points inside the training range.
    """

    shots: int = 10
    queries: int = 10
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    x_range: tuple[float, float] = (-5.0, 5.0)
    query_x_range: tuple[float, float] | None = None

    input_shape = (1,)
    output_size = 1

    def __post_init__(self) -> None:
        at_least("shots", self.shots, 1)
        at_least("queries", self.queries, 1)
        for name in ("amplitude", "phase", "x_range"):
            ascending(name, getattr(self, name))
        if self.query_x_range is not None:
            ascending("query_x_range", self.query_x_range)

    def parameters(
        self, seed: int, split: str, indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """(A, φ) of the tasks, [B, 2]."""
        return self._parameters(task_keys(seed, split, indices))

    def _parameters(self, keys: UInt64) -> npt.NDArray[np.float64]:
        amplitude = uniform(keys, _AMPLITUDE, 1, *self.amplitude)
        phase = uniform(keys, _PHASE, 1, *self.phase)
        return np.concatenate([amplitude, phase], axis=1)

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        """x and y of shape [B, shots, 1] and [B, queries, 1]."""
        keys = task_keys(seed, split, indices)
        amplitude, phase = np.split(self._parameters(keys), 2, axis=1)

        def examples(stream: int, count: int, x_range: tuple[float, float]) -> Examples:
            x = uniform(keys, stream, count, *x_range)
            y = amplitude * np.sin(x - phase)
            return Examples(as_tensor(x[..., None]), as_tensor(y[..., None]))

        return TaskBatch(
            support=examples(_SUPPORT, self.shots, self.x_range),
            query=examples(_QUERY, self.queries, self.query_x_range or self.x_range),
        )

    def oracle(self, batch: TaskBatch) -> Tensor:
        """The predictions with known (A, φ): without noise, the targets themselves."""
        return batch.query.y

    def protocol(self) -> dict[str, Any]:
        return {
            "shots": self.shots,
            "queries": self.queries,
            "amplitude": list(self.amplitude),
            "phase": list(self.phase),
            "x_range": list(self.x_range),
            "query_x_range": list(self.query_x_range or self.x_range),
        }
