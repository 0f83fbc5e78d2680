"""JSON as every reader of JSON takes it: NaN and infinity, which it does not have, are null."""

from __future__ import annotations

import json
import math
from typing import Any


def write(value: Any, *, indent: int | None = 1) -> str:
    """Plain values as JSON text, null for each number that is not finite; `indent` None: one line.

    Raises TypeError for what is no plain value.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
