"""Several machines on one: each with a network, processes, temporary files and a home of its own.

They are Linux name spaces, made without privileges, joined by a switch. A cluster is started on
them by the commands of pipeline/cluster/README.md. One process holds them; with it, all ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from tests.places import ROOT
from tests.waiting import wait_for

_NETWORK = "10.77.0"
_HEAD = f"{_NETWORK}.1"
_NEW = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


class Machine:
    """One of them."""

    def __init__(self, number: int, folder: Path, switch: int):
        """`switch`: the process that holds the switch."""
        self.address = f"{_NETWORK}.{number}"
        self.home = folder / f"machine{number}"
        self._port, self._switch = f"port{number}", switch
        temporary = self.home / "tmp"
        temporary.mkdir(parents=True)
        # Names of sockets have at most 107 characters, hence /mnt; Ray shares memory in /dev/shm.
        setup = (
            f"mount --bind {temporary} /mnt && mount -t tmpfs tmpfs /dev/shm"
            " && ip link set lo up && echo ready && exec sleep infinity"
        )
        self._process, said = _started([*_within(switch), *_NEW, "sh", "-c", setup])
        assert said == "ready"
        self._init = _only_child(self._process.pid)
        self._plug_in()

    def _plug_in(self) -> None:
        port = self._port
        self._at_switch(
            f"ip link add {port} type veth peer name eth0 netns {self._init}"
            f" && ip link set {port} master switch up"
        )
        self.run(
            "sh",
            "-c",
            f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up"
            f" && ip route add default via {_NETWORK}.254",
        )

    def _at_switch(self, command: str) -> None:
        subprocess.run([*_within(self._switch), "sh", "-c", command], check=True)

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs something on this machine."""
        return [*_within(self._init, "--mount", "--pid", f"--wd={self.home}"), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """What a user there has in the environment."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return {
            **ours,
            "HOME": str(self.home),
            "TMPDIR": "/mnt",
            "RAY_TMPDIR": "/mnt",
            "PATH": f"{Path(sys.executable).parent}:{ours['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
        }

    def run(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises CalledProcessError, whose notes say what it printed."""
        try:
            return subprocess.run(
                self.command(*arguments),
                env=self.environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=timeout,
            )
        except subprocess.CalledProcessError as error:
            error.add_note(f"{error.stdout}\n{error.stderr}")
            raise

    def start(self, *arguments: str, output: Path) -> subprocess.Popen[str]:
        """Start a command; what it prints goes into a file."""
        with output.open("w") as file:
            return subprocess.Popen(
                self.command(*arguments),
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def cut_off(self) -> None:
        """Its packets are dropped from now on, both ways; nothing on it ends."""
        self._at_switch(f"ip link set {self._port} nomaster")

    def join_again(self) -> None:
        """Its packets arrive again."""
        self._at_switch(f"ip link set {self._port} master switch")

    def lose(self) -> None:
        """All its processes end at once, as without electricity."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._process.wait()


class Machines:
    """Machines at one switch; the first one is the head of a cluster."""

    def __init__(self, folder: Path):
        """Skips the test where the kernel does not allow it."""
        self._folder = folder
        if shutil.which("ip") is None or shutil.which("unshare") is None:
            pytest.skip("no machines: needs the commands ip and unshare")
        setup = (
            "ip link add switch type bridge && ip link set switch up && ip link set lo up"
            f" && ip address add {_NETWORK}.254/24 dev switch && echo ready && exec sleep infinity"
        )
        own = ["--user", "--map-root-user", "--net", "--mount", "--kill-child", "--fork"]
        self._switch, said = _started(["unshare", *own, "sh", "-c", setup])
        if said != "ready":
            pytest.skip(f"no machines: {said}")
        self._pid = _only_child(self._switch.pid)
        self._machines: list[Machine] = []

    def add(self) -> Machine:
        """Another machine."""
        machine = Machine(len(self._machines) + 1, self._folder, self._pid)
        token = machine.home / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text("t" * 32)
        self._machines.append(machine)
        return machine

    def close(self) -> None:
        """End everything on them."""
        for machine in self._machines:
            machine.lose()
        if self._switch.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
        self._switch.wait()


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """A switch to which machines can be added; they end with the context."""
    made = Machines(folder)
    try:
        yield made
    finally:
        made.close()


def start_head(machine: Machine) -> None:
    """Start a cluster's head."""
    _start(machine, "head_start_ray_commands")


def start_node(machine: Machine) -> None:
    """Start a node of the cluster of the first machine."""
    _start(machine, "worker_start_ray_commands")


def _start(machine: Machine, kind: str) -> None:
    """As pipeline/cluster/README.md says; the machine is new, so there is nothing to stop."""
    text = (ROOT / "pipeline" / "cluster" / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if "type: local" in b)
    commands: Sequence[str] = yaml.safe_load(block)[kind]
    for command in commands:
        if command != "ray stop":
            machine.run("sh", "-c", f"RAY_HEAD_IP={_HEAD}; {command}")


def _started(command: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """Start a process that stays; with the first line that it prints."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        return process, output.readline().strip()


def _within(pid: int, *more: str) -> list[str]:
    """The beginning of a command that runs beside a process."""
    return ["nsenter", "--target", str(pid), "--user", "--preserve-credentials", "--net", *more]


def _only_child(pid: int) -> int:
    """The process that a process has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: children.read_text().split())
    (child,) = children.read_text().split()
    return int(child)
