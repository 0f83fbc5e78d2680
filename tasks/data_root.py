"""Rules for `data.root`: its default, paths, URIs. Imports nothing heavy: help must be quick."""

import os
import re
from pathlib import Path

DATA_ROOT = "MAML_DATA_ROOT"
"""Environment variable that holds the default of `data.root`."""


def default_root() -> str:
    """`data.root` where the configuration does not give it."""
    return os.environ.get(DATA_ROOT) or "data"


def is_uri(root: str) -> bool:
    """Whether `root` is a URI, from which stores are copied, rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", root) is not None


def absolute_root(root: str) -> str:
    """Make a path absolute, for processes with another working directory; keep a URI."""
    return root if is_uri(root) else str(Path(root).expanduser().absolute())
