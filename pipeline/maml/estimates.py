"""A mean over tasks and its 95 % confidence interval: made in one way, written in one way."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Estimate(NamedTuple):
    """A mean over tasks."""

    mean: float
    ci95: float | None
    """Half the width of its confidence interval, 1.96·sd/√n; None where it is not known."""

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Estimate:
        """Of one value per task; tasks for which there is none (NaN) are left out."""
        known = values[np.isfinite(values)]
        if len(known) < 2:
            return cls(float(known.mean()) if len(known) else math.nan, None)
        mean, ci95 = mean_and_ci95(known)
        return cls(float(mean), float(ci95))

    def text(self, percent: bool = False) -> str:
        """For people: 'mean ± half', or '–'."""
        if not math.isfinite(self.mean):
            return "–"
        return interval(self.mean, math.nan if self.ci95 is None else self.ci95, percent)

    def to_json(self) -> dict[str, float | None]:
        """Plain values; JSON knows no NaN."""
        return {
            name: value if value is None or math.isfinite(value) else None
            for name, value in self._asdict().items()
        }


def mean_and_ci95(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Over the last axis, [..., tasks] -> mean and half the width of its interval, [...]."""
    exact = values.astype(np.float64)
    return exact.mean(-1), 1.96 * exact.std(-1, ddof=1) / np.sqrt(values.shape[-1])


def interval(mean: float, half: float, percent: bool, *, signed: bool = False) -> str:
    """mean ± half, with the digits that mean something."""
    sign = "+" if signed else ""
    if percent:
        return f"{100 * mean:{sign}.2f} ± {100 * half:.2f}"
    if abs(mean) >= 100:
        return f"{mean:{sign}.3g} ± {half:.2g}"
    digits = 2 if abs(mean) >= 0.1 else 3
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"
