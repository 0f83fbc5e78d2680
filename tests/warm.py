"""A process that has imported everything already, and forks for each command.

Starting Python and importing torch, Ray and MLflow takes eight seconds, which is most of what a
short command takes. A forked child has its own process, folder, environment and output, as if it
had been started by itself; tests about signals and about starting up start their own all the same.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.places import ROOT

# What commands import, the last three late: for an optimiser, for figures, for the tracking store.
MODULES = (
    "ray",
    "ray.tune",
    "pipeline.cli.exit_codes",
    "pipeline.cli.console",
    "pipeline.cluster.submission",
    "pipeline.search.run",
    "pipeline.training.loop",
    "torch._dynamo",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_store",
)


class Warm:
    """The process, and the way to run commands in its children."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._child: int | None = None
        """Process id of the command under way."""

    def run(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `maml` with these arguments; raises subprocess.TimeoutExpired.

        Whoever interrupts it, such as a test's own time-out, ends the process too: a later command
        would take the answers to this one for its own.
        """
        try:
            return self._ran(arguments, cwd, env, timeout)
        except subprocess.TimeoutExpired:
            raise
        except BaseException:
            self.close()
            _warm.remove(self)
            raise

    def _ran(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "arguments": list(arguments),
                "cwd": str(cwd),
                "env": dict(env),
                "out": f"{folder}/out",
                "err": f"{folder}/err",
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            self._child = self._answer()
            killer = threading.Timer(timeout, os.kill, (self._child, signal.SIGKILL))
            killer.start()
            try:
                code = self._answer()
            finally:
                killer.cancel()
            self._child = None
            out, err = (Path(request[name]).read_text() for name in ("out", "err"))
        if code == -signal.SIGKILL:
            raise subprocess.TimeoutExpired(["maml", *arguments], timeout, out, err)
        return subprocess.CompletedProcess(["maml", *arguments], code, out, err)

    def close(self) -> None:
        """End the process, and the command that it runs."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the warm process has died")
        return int(line)


_warm: list[Warm] = []


def warm() -> Warm:
    """The one of this test process."""
    if not _warm:
        _warm.append(Warm())
    return _warm[0]


@atexit.register
def _close() -> None:
    for process in _warm:
        process.close()


def _child(request: dict[str, Any]) -> int:
    """Become the command; returns its exit code."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["maml", *request["arguments"]]
    from pipeline.cli.main import main

    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    from pipeline.runs.mlflow_sender import client_class

    client_class()  # sets what MLflow must be told before it is imported
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _child(json.loads(line))
                atexit._run_exitfuncs()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
