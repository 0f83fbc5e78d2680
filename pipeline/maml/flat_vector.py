"""Named parameters, and the flat vector in which they travel between processes.

Every pure function of this package takes and returns `Params`: tensors keyed by the parameter's
name. A `Layout` converts such a dictionary to a vector of D numbers and back.
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
"""Tensors by the name of the parameter."""


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
        """The shapes as a dictionary."""
        return dict(self.shapes)

    def split(self, flat: Tensor) -> Params:
        """Views into a flat vector [D], by name. Raises RuntimeError if the length is not D."""
        pieces = torch.split(flat, [math.prod(shape) for _, shape in self.shapes])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes, pieces, strict=True)
        }

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        """The flat vector [D] of parameters, a copy. Raises KeyError if one is missing."""
        return torch.cat([params[name].reshape(-1) for name, _ in self.shapes])


def flat_vector(theta: Params) -> FlatVector:
    """Parameters on the CPU as the vector [D] that workers take."""
    flat: FlatVector = Layout.of(theta).join(theta).numpy()
    return flat
