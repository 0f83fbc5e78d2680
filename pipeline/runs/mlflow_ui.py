"""Starts MLflow's own pages on a tracking store, with one server process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from pipeline.runs.mlflow_store import TrackingError, sqlite_file

_STARTUP = 60.0  # seconds within which the server answers


def serve(
    uri: str,
    host: str = "127.0.0.1",
    port: int = 5000,
    on_up: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the store at `uri` until Ctrl-C (or SIGTERM); `on_up` gets the pages' address.

    Raises TrackingError if there is no such store, the port is taken, or the server stops.
    """
    # The server is in a group of its own: nobody but this process would end it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = start_server(uri, host, port)
    try:
        wait_until_up(server, host, port)
        on_up(address_of_pages(host, port))
        code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        stop_server(server)
    raise TrackingError(f"the MLflow server stopped by itself with exit code {code}; see above")


def start_server(uri: str, host: str, port: int) -> subprocess.Popen[bytes]:
    """Start the server's process. Raises TrackingError if it could not work."""
    if uri.startswith(("http://", "https://")):
        raise TrackingError(f"{uri} is an MLflow server already: open it in a browser")
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise TrackingError(
            f"there is no tracking store at {database}: train something first (maml train), or "
            "name another store"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TrackingError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); "
                "choose another with --port"
            ) from None
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", host, "--port", str(port)]
    # One worker and no job runner: a third of the start-up time and a quarter of the memory.
    command += ["--workers", "1"]
    # Its lines of log would bury the address of the pages.
    command += ["--uvicorn-opts", "--log-level warning"]
    if database is not None:
        command += ["--artifacts-destination", (database.parent / "mlartifacts").as_uri()]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
        # Not an argument, which all users of the machine could read.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    # In a group of its own, so that Ctrl-C reaches this process alone, which then ends the group.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def wait_until_up(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Wait until the server answers. Raises TrackingError if it does not."""
    deadline = time.monotonic() + _STARTUP
    address = f"http://{_reachable(host)}:{port}/health"
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TrackingError(f"the MLflow server did not start on {host}:{port}; see above")


def address_of_pages(host: str, port: int) -> str:
    """The list of runs of the experiment that was used last.

    Without the query MLflow opens on its tools for language models.
    """
    server = f"http://{_reachable(host)}:{port}"
    question = urllib.request.Request(
        f"{server}/api/2.0/mlflow/experiments/search",
        json.dumps({"max_results": 2, "order_by": ["last_update_time DESC"]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(question, timeout=20) as answer:
        found = json.load(answer).get("experiments", [])
    # MLflow's own experiment, which nobody asked for, has the id 0.
    ids = [experiment["experiment_id"] for experiment in found]
    used = next((experiment_id for experiment_id in ids if experiment_id != "0"), None)
    path = f"experiments/{used}" if used else "experiments"
    return f"{server}/#/{path}?workflowType=machine_learning"


def _reachable(host: str) -> str:
    """The address at which a server that listens on `host` is reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
