"""Quadratic tasks, whose meta-gradient has a closed form that tests compare with.

Task i has an optimum c_i ~ N(mean, spread²·I) and the loss

    L_i(w) = ½ (w − c_i)ᵀ Λ (w − c_i),      Λ = diag(λ_1 .. λ_D),

which is what the mean squared error of a linear model without bias (`model.kind: linear`) becomes
on the D examples x_j = √(λ_j·D/2)·e_j, y_j = x_jᵀ c_i. K steps of gradient descent (eq. 2) give

    θ'_i = c_i + (I − αΛ)^K (θ − c_i),

so the meta-gradient of eq. 4 averaged over tasks is

    second order: mean_i (I − αΛ)^2K Λ (θ − c_i),
    first order:  mean_i (I − αΛ)^K  Λ (θ − c_i).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tasks.base import Examples, Regression, TaskBatch, as_tensor, ascending, at_least
from tasks.random import normal, task_keys

_OPTIMUM = 0  # random stream


@dataclass(frozen=True, kw_only=True)
class Quadratic(Regression):
    """D-dimensional quadratics with curvatures evenly spaced over `curvature`."""

    dimensions: int = 4
    curvature: tuple[float, float] = (0.5, 2.0)
    mean: float = 1.0
    spread: float = 1.0

    output_size = 1

    def __post_init__(self) -> None:
        at_least("dimensions", self.dimensions, 1)
        ascending("curvature", self.curvature)
        if self.curvature[0] <= 0:
            raise ValueError(f"curvature: must be positive, got {list(self.curvature)}")

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]  # depends on a setting
        return (self.dimensions,)

    @property
    def curvatures(self) -> npt.NDArray[np.float64]:
        """λ, [D]."""
        return np.linspace(*self.curvature, self.dimensions)

    def optima(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """c_i, [B, D]."""
        keys = task_keys(seed, split, indices)
        return self.mean + self.spread * normal(keys, _OPTIMUM, self.dimensions)

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        """x [B, D, D], y [B, D, 1]; support and query set are the same."""
        optima = self.optima(seed, split, indices)
        scale = np.sqrt(self.curvatures * self.dimensions / 2)
        x = np.broadcast_to(np.diag(scale), (len(optima), self.dimensions, self.dimensions))
        examples = Examples(as_tensor(x), as_tensor((optima * scale)[..., None]))
        return TaskBatch(support=examples, query=examples)

    def oracle(self, batch: TaskBatch) -> Tensor:
        """The predictions at the optimum: the targets themselves."""
        return batch.query.y

    def protocol(self) -> dict[str, Any]:
        return {"dimensions": self.dimensions, "curvature": list(self.curvature)}
