"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable

PATIENCE = 150.0  # seconds; generous, since no test that waits is about speed


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; fails where it does not in a long time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
