"""A real Ray head with token authentication, in a process and a home of its own, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.commands import clean_environment
from tests.ports import free_port

TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass
class Cluster:
    """Nodes, each a `ray start` process that was started here and is ended here."""

    home: Path
    """HOME of the nodes, where jobs have their runs. Short: Ray puts sockets below it."""
    gcs_port: int
    dashboard_port: int
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def client(self) -> dict[str, str]:
        """What a person's shell needs to talk to it."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_TOKEN": TOKEN}

    def add_node(self) -> subprocess.Popen[bytes]:
        """One more node with one CPU; comes up by itself."""
        # A folder of its own, as on a machine of its own: the working directory travels there too.
        folder = self.home / f"node{len(self.nodes)}"
        node = self._start(f"--address=127.0.0.1:{self.gcs_port}", f"--temp-dir={folder}")
        self.nodes.append(node)
        return node

    def start_head(self) -> None:
        ports = {
            "port": self.gcs_port,
            "dashboard-port": self.dashboard_port,
            "dashboard-host": "127.0.0.1",
            "ray-client-server-port": free_port(),
            "temp-dir": self.home / "ray",
        }
        self.nodes.append(self._start("--head", *(f"--{k}={v}" for k, v in ports.items())))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.nodes[0].poll() is None:
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(f"{self.address}/api/version", timeout=2).close()
                except urllib.error.HTTPError as error:
                    error.close()
                return
            time.sleep(0.2)
        raise RuntimeError((self.home / "start.log").read_text())

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As when a machine is switched off: its raylet gets no time for anything."""
        children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
        raylets = [pid for pid in children if "raylet" in _command(pid)]
        assert raylets
        for pid in raylets:
            os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.terminate()
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in clean_environment().items() if not k.startswith("RAY_")}
        environment |= {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            # Or workers would get nothing beside the other processes of the tests.
            "RAY_worker_niceness": "0",
            # A node that is gone is noticed after a second or two instead of fifteen; one that is
            # only slow, because the machine is busy, is left alone.
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "10000",
            "RAY_health_check_failure_threshold": "3",
        }
        options = (
            *options,
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            "--node-ip-address=127.0.0.1",
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--block",
        )
        with (self.home / "start.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
                env=environment,
                cwd=self.home,
                stdout=log,
                stderr=log,
            )


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A head that answers, and whatever nodes are added to it."""
    home = Path(tempfile.mkdtemp(prefix="maml-", dir="/tmp"))
    cluster = Cluster(home, free_port(), free_port())
    current = Path("/tmp/ray/ray_current_cluster")
    before = current.read_bytes() if current.exists() else None
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.stop()
        # Ray leaves it behind; another process would take it for a running cluster.
        if before is None and current.exists() and str(cluster.gcs_port) in current.read_text():
            current.unlink()
        shutil.rmtree(home, ignore_errors=True)


def _command(pid: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    return ""
