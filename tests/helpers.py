"""Task distributions that misbehave, named in tests by their dotted path."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.base import Examples, TaskBatch
from tasks.sinusoid import Sinusoid


@dataclass(frozen=True, kw_only=True)
class SlowSinusoid(Sinusoid):
    """Sampling takes a while, so that there is time to kill somebody."""

    seconds: float = 0.05

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        time.sleep(self.seconds)
        return super().sample(seed, split, indices)


@dataclass(frozen=True, kw_only=True)
class NanSinusoid(Sinusoid):
    """Training tasks first_bad .. last_bad have a target that is not a number."""

    first_bad: int = 0
    last_bad: int = 0

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        batch = super().sample(seed, split, indices)
        y = batch.query.y.clone()
        if split == "train":
            y[(indices >= self.first_bad) & (indices <= self.last_bad)] = float("nan")
        return TaskBatch(batch.support, Examples(batch.query.x, y))


@dataclass(frozen=True, kw_only=True)
class BrokenSinusoid(Sinusoid):
    """Cannot be sampled."""

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        raise ZeroDivisionError("on purpose")
