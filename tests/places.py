"""Where the checkout is, and where the real data sets are that some tests need."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("MAML_TEST_DATA", ROOT.parent / "shared" / "data"))
