"""Ports for servers of the tests."""

from __future__ import annotations

import itertools
import os
import socket

# Neither those that the system gives away when asked for any (from 32768), to Ray for one, nor
# those of Ray's workers (10002 to 19999), nor those of another test process.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
_ports = itertools.cycle(range(20000 + 1000 * _PROCESS, 21000 + 1000 * _PROCESS))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, and that nobody else here will ask for soon."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
