"""What `data.root` may say. Light: the command line's help and the configuration need no more."""

import os
import re
from pathlib import Path

DATA_ROOT = "MAML_DATA_ROOT"
"""Environment variable: `data.root`, unless the configuration says otherwise."""


def default_root() -> str:
    """`data.root` where the configuration does not give it."""
    return os.environ.get(DATA_ROOT) or "data"


def is_uri(root: str) -> bool:
    """Whether stores are copied from `root` instead of being opened there."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", root) is not None


def absolute_root(root: str) -> str:
    """A URI as it is; a path as it is meant here, for processes that run elsewhere."""
    return root if is_uri(root) else str(Path(root).expanduser().absolute())
