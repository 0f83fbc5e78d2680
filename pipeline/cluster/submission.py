"""Submits any `maml` command as a job of a Ray cluster, through the head's jobs API.

    here                                          head                           every node
    ----                                          ----                           ----------
    files that git tracks ──── zip ─────────────▶ working directory ───────────▶ working directory
    MLFLOW_TRACKING_URI, MAML_DATA_ROOT, --env ─▶ environment ─────────────────▶ environment
    maml ARGUMENTS ─────────────────────────────▶ the driver, python -m pipeline.cli ARGUMENTS
    log lines, exit code ◀─────────────────────── ...

`job_package` says which files travel. Data does not: nodes read it from `data.root`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import re
import shlex
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.cluster.job_package import JobError
from pipeline.config.loading import RUNS
from tasks.credentials import redacted, refusal
from tasks.data_root import DATA_ROOT, absolute_root
from tasks.errors import INTERRUPTED, ReportedError, first_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
JOB_RUNS = "~/maml-runs"
"""The folder on the head for a job's runs. Not the job's working directory: Ray deletes that when
the job ends."""

_ANSWER = 10.0  # seconds within which a head answers
_STOP = 60  # seconds that a job has to write a checkpoint before it is killed
_PATIENCE = 60.0  # seconds without the head until following ends
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class HeadLost(ReportedError):
    """The head went away while a job was followed."""

    exit_code = 1


@dataclass(frozen=True)
class ClusterJob:
    """A job, as the head knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    started: float | None
    """Seconds since the epoch."""
    ended: float | None
    message: str
    driver_exit_code: int | None

    @property
    def exit_code(self) -> int | None:
        """The exit code of the job's command; None while it runs."""
        if self.status not in _ENDED:
            return None
        if self.status == "STOPPED":
            return INTERRUPTED  # as the command itself ends then; Ray does not keep its code
        if self.driver_exit_code is None:
            return 0 if self.status == "SUCCEEDED" else 1
        code = self.driver_exit_code
        return code if code >= 0 else 128 - code  # killed by a signal, as a shell counts


class Head:
    """The jobs API of a cluster's head."""

    def __init__(self, address: str):
        """Raises JobError where nobody answers, or wants a token that is not here."""
        if "://" not in address:
            address = f"http://{address}"
        if refused := refusal("--address", address):
            raise JobError(refused)
        if not address.startswith(("http://", "https://")) or not _has_port(address):
            raise JobError(f"--address: must be the dashboard's, http://HEAD:8265, got {address}")
        self.address = address.rstrip("/")
        headers: dict[str, str] = {}
        status, self._answered, body = _version(self.address, headers)
        if status in (401, 403):
            token, source = _token(self.address)
            headers = {"Authorization": f"Bearer {token}"}
            status, self._answered, body = _version(self.address, headers)
            if status in (401, 403):
                raise JobError(
                    f"the head at {self.address} refuses the token in {source}: put the head's "
                    "there (it prints it with: ray get-auth-token)"
                )
        try:
            if status != 200:
                raise ValueError
            self._ray = str(json.loads(body)["ray_version"])
        except (ValueError, KeyError, TypeError):
            raise JobError(
                f"{self.address} answers (HTTP {status}), but is not the dashboard of a Ray head; "
                "that usually is http://HEAD:8265"
            ) from None
        self._headers = headers

    @cached_property
    def _client(self) -> Any:
        return _client(self.address, self._headers)

    def check_versions(self) -> None:
        """Raise JobError unless the head has this machine's version of Ray, and of Python up to the
        minor number."""
        import ray

        # The head's web server names its Python; a proxy in between may hide it.
        found = re.search(r"Python/(\d+\.\d+)", self._answered.get("Server", ""))
        here = ".".join(platform.python_version_tuple()[:2])
        for what, there, mine in (
            ("Ray", self._ray, ray.__version__),
            ("Python", found[1] if found else here, here),
        ):
            if there != mine:
                raise JobError(
                    f"the head at {self.address} runs {what} {there}, this machine {what} {mine}: "
                    "a job needs the same on both"
                )

    def submit(
        self, arguments: Sequence[str], package: Path, name: str, environment: Mapping[str, str]
    ) -> ClusterJob:
        """Run `maml ARGUMENTS` as the job `name` in the packed folder. Raises JobError."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise JobError(f"--name: use letters, digits, '.', '-' and '_', got {name!r}")
        if any(job.id == name for job in self.jobs()):
            raise JobError(f"--name: there is a job {name} on {self.address}; choose another name")
        self._ask(
            self._client.submit_job,
            entrypoint=f"python -m pipeline.cli {shlex.join(arguments)}",
            submission_id=name,
            runtime_env={"working_dir": str(package), "env_vars": dict(environment)},
        )
        return self.job(name)

    def jobs(self) -> list[ClusterJob]:
        """The jobs that were submitted to this cluster, newest first."""
        found = [_job(each) for each in self._ask(self._client.list_jobs) if each.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, name: str) -> ClusterJob:
        """The job of this name. Raises JobError if there is none."""
        return _job(self._ask(self._client.get_job_info, name))

    def logs(self, name: str) -> str:
        """All that a job has written so far. Raises JobError."""
        return str(self._ask(self._client.get_job_logs, name))

    def follow(self, name: str, write: Callable[[str], None]) -> ClusterJob:
        """Hand a job's output to `write` as it comes, from its beginning; returns the job once it
        has ended.

        Raises JobError, BrokenPipeError where `write` does, and HeadLost if the head does not
        answer for a minute.
        """
        self.job(name)
        shown = 0
        reader_gone = False

        async def tail() -> None:
            nonlocal shown, reader_gone
            position = 0  # a new connection begins at the beginning
            async for text in self._client.tail_job_logs(name):
                fresh = text[max(0, shown - position) :]
                position += len(text)
                if fresh:
                    try:
                        write(fresh)
                    except BrokenPipeError:  # not a failure of the connection
                        reader_gone = True
                        return
                    shown = max(shown, position)

        lost_since: float | None = None
        while True:
            with contextlib.suppress(*_failures()):
                asyncio.run(tail())
            if reader_gone:
                raise BrokenPipeError
            try:
                job = self.job(name)
            except JobError as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _PATIENCE:
                    raise HeadLost(f"{error}; the job may go on without being followed") from error
            else:
                lost_since = None
                if job.exit_code is not None:
                    return job
            time.sleep(1.0)

    def stop(self, name: str) -> ClusterJob:
        """Ask a job to end, as Ctrl-C does, and wait until it has. Raises JobError."""
        self._ask(self._client.stop_job, name)
        deadline = time.monotonic() + _STOP + 15
        while (job := self.job(name)).exit_code is None:
            if time.monotonic() > deadline:
                raise JobError(f"job {name} has not ended yet; look again with: maml jobs")
            time.sleep(0.5)
        return job

    def _ask(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of Ray's client. Raises JobError for all that the client raises."""
        try:
            return request(*arguments, **options)
        except _failures() as error:
            text = first_line(error)
            if "status code 404" in text and arguments:
                raise JobError(
                    f"there is no job {arguments[0]} on {self.address}; `maml jobs` lists them"
                ) from error
            raise JobError(f"the head at {self.address}: {text}") from error


def default_address() -> str:
    """The dashboard's address in Ray's own environment variables, else port 8265 of this machine: a
    head here, or a tunnel to one."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        address = os.environ.get(variable, "")
        if address.startswith(("http://", "https://")):
            return address
    return DEFAULT_ADDRESS


def default_name(arguments: Sequence[str]) -> str:
    """A job's name, from its first words and the time: 'train-sinusoid-20260131-120000'."""
    words = "-".join(word for word in arguments[:2] if not word.startswith("-"))
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("._-") or "maml"
    return f"{words}-{time.strftime('%Y%m%d-%H%M%S')}"


def job_environment(chosen: Mapping[str, str]) -> dict[str, str]:
    """A job's environment variables: those of this machine that matter to it, then `chosen`."""
    passed = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP), RUNS: JOB_RUNS}
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        passed["MLFLOW_TRACKING_URI"] = uri
    if root := os.environ.get(DATA_ROOT):
        passed[DATA_ROOT] = absolute_root(root)
    return {**passed, **chosen}


def check_command(arguments: Sequence[str]) -> None:
    """Raise JobError for a command that cannot be a job: none, or one with credentials, which the
    cluster would show to everybody."""
    if not arguments:
        raise JobError("give a command to run: maml submit -- train sinusoid")
    for argument in arguments:
        if refused := refusal(argument.partition("=")[0], argument):
            raise JobError(f"{refused}; pass variables on with --env NAME")


def what_to_know(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> list[str]:
    """Hints to print before a training is submitted: where its data, its MLflow record and its
    results will be. Empty where nothing of that is unusual."""
    if arguments[0] not in ("train", "search"):
        return []
    given = {argument.partition("=")[0] for argument in arguments if "=" in argument}
    lines = []
    uri = redacted(environment.get("MLFLOW_TRACKING_URI", ""))
    if "tracking.uri" not in given and not uri:
        lines.append(
            f"MLFLOW_TRACKING_URI is not set: unless the cluster sets it, the MLflow record goes "
            f"to {environment[RUNS]}/mlflow.db on the head"
        )
    elif uri and not uri.startswith(("http://", "https://", "databricks")):
        lines.append(f"MLFLOW_TRACKING_URI is {uri}: on the head that must be the same database")
    elif uri and re.match(r"https?://(localhost|127\.|\[::1\])", uri):
        lines.append(f"MLFLOW_TRACKING_URI is {uri}: the job looks for that server on the head")
    if (folder / "data").is_dir() and "data.root" not in given and DATA_ROOT not in environment:
        lines.append(
            f"data stays here: nodes read image stores from data.root=PATH_OR_URI (or {DATA_ROOT})"
        )
    if not given & {"run_dir", "checkpoint.uri"}:
        lines.append(
            f"the run's folder is in {environment[RUNS]} on the head, and ends with the cluster; "
            "checkpoint.uri=s3://BUCKET/FOLDER keeps checkpoints elsewhere"
        )
    return lines


def _has_port(address: str) -> bool:
    """Whether an address has a host, and its port, if any, is a number that a port can have."""
    try:
        parts = urllib.parse.urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like others: the token must not travel on to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _version(address: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the head's answer. Raises JobError if there is none."""
    request = urllib.request.Request(f"{address}/api/version", headers=headers)
    try:
        with _opener.open(request, timeout=_ANSWER) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), b""
    except (OSError, ValueError) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        raise JobError(
            f"no Ray head answers at {address} ({reason}): is it running, and is its dashboard "
            "reachable from here (ray dashboard cluster.yaml makes a tunnel)?"
        ) from None


def _token(address: str) -> tuple[str, str]:
    """This machine's token, and the name of the place where it was found; Ray looks in the same
    places. Raises JobError where there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise JobError(
            f"the head at {address} wants a token, but RAY_AUTH_MODE=disabled here: "
            "set RAY_AUTH_MODE=token"
        )
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if token := path.read_text().strip():
            return token, str(path)
    raise JobError(
        f"the head at {address} wants a token, and there is none here: put the head's (it prints "
        f"it with: ray get-auth-token) into {path} or into RAY_AUTH_TOKEN"
    )


def _client(address: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they speak at a level of their own
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # Ray lets its environment variables override the address that it is given.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address, headers=headers)
    except _failures() as error:
        raise JobError(f"the head at {address}: {error}") from error
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _failures() -> tuple[type[Exception], ...]:
    """What Ray's client raises: its own errors, and those of the libraries under it."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    return (
        RuntimeError,
        ConnectionError,
        AuthenticationError,
        aiohttp.ClientError,
        requests.RequestException,
    )


def _job(details: Any) -> ClusterJob:
    return ClusterJob(
        id=details.submission_id,
        status=details.status.value,
        command=details.entrypoint,
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        message=details.message or "",
        driver_exit_code=details.driver_exit_code,
    )
