"""Named parameters, and the one flat vector in which they cross process boundaries.

`Params` is the currency of every pure function here: parameters are keyed by name, never zipped
from lists. A `Layout` is the bijection between such a dictionary and a vector of D numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FlatVector = npt.NDArray[np.floating[Any]]
"""Parameters as workers and the driver exchange them: one vector [D] on the CPU."""
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters, in the order of the flat vector."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Layout:
        """The layout of these parameters."""
        return cls(tuple((name, tuple(p.shape)) for name, p in params.items()))

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def shapes_by_name(self) -> dict[str, tuple[int, ...]]:
        """Without the order."""
        return dict(self.shapes)

    def split(self, flat: Tensor) -> Params:
        """Views into a flat vector [D], by name."""
        pieces = torch.split(flat, [math.prod(shape) for _, shape in self.shapes])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes, pieces, strict=True)
        }

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        """The flat vector [D] of parameters."""
        return torch.cat([params[name].reshape(-1) for name, _ in self.shapes])


def flat_vector(theta: Params) -> FlatVector:
    """Parameters as workers take them."""
    flat: FlatVector = Layout.of(theta).join(theta).numpy()
    return flat
