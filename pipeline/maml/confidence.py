"""A mean over tasks and its 95 % confidence interval: computed here, and written in one format."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Estimate(NamedTuple):
    """A mean over tasks."""

    mean: float
    ci95: float | None
    """Half the width of the 95 % confidence interval, 1.96·sd/√n; None for fewer than two tasks."""

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Estimate:
        """The mean of one value per task, [B]; tasks whose value is not finite are left out."""
        known = values[np.isfinite(values)]
        if len(known) < 2:
            return cls(float(known.mean()) if len(known) else math.nan, None)
        mean, ci95 = mean_and_ci95(known)
        return cls(float(mean), float(ci95))

    def text(self, percent: bool = False) -> str:
        """The estimate as 'mean ± half', or '–' where there is no mean."""
        if not math.isfinite(self.mean):
            return "–"
        return interval(self.mean, math.nan if self.ci95 is None else self.ci95, percent)

    def to_json(self) -> dict[str, float | None]:
        """The fields by name; None stands for NaN and infinity, which JSON does not have."""
        return {
            name: value if value is None or math.isfinite(value) else None
            for name, value in self._asdict().items()
        }


def mean_and_ci95(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Mean over the last axis, and half the width of its 95 % confidence interval (normal
    approximation); [..., tasks] -> [...], in double precision."""
    exact = values.astype(np.float64)
    return exact.mean(-1), 1.96 * exact.std(-1, ddof=1) / np.sqrt(values.shape[-1])


def interval(mean: float, half: float, percent: bool, *, signed: bool = False) -> str:
    """'mean ± half' with as many digits as the interval supports.

    `percent` multiplies both by 100; `signed` writes a plus before a positive mean.
    """
    sign = "+" if signed else ""
    if percent:
        return f"{100 * mean:{sign}.2f} ± {100 * half:.2f}"
    if abs(mean) >= 100:
        return f"{mean:{sign}.3g} ± {half:.2g}"
    digits = 2 if abs(mean) >= 0.1 else 3
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"
