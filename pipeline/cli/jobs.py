"""`maml submit` and `maml jobs`: commands as jobs of a Ray cluster."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.clear_errors import ClearTyper
from pipeline.cli.exit_codes import reporting_errors
from tasks.errors import INTERRUPTED

if TYPE_CHECKING:
    from pipeline.cluster.job_package import Selection
    from pipeline.cluster.submission import ClusterJob, Head

jobs_app = ClearTyper(
    invoke_without_command=True, help="List the jobs of a Ray cluster; their logs; stop one."
)

Address = Annotated[
    str | None,
    typer.Option(
        help="the head's dashboard, http://HEAD:8265; by default RAY_API_SERVER_ADDRESS, "
        "else this machine's (or a tunnel's)",
        show_default=False,
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="as `maml jobs` lists it")]


@reporting_errors
def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="any maml command after --, such as: -- train omniglot-5w1s"
        ),
    ],
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="show its output, end with its exit code")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="the job's ID; by default made from the command")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="environment variable of the job; without a value its value here, not shown",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the files that would travel; submit nothing")
    ] = False,
) -> None:
    """Run a maml command as a job of a Ray cluster.

    The current folder travels with it, at most 100 MiB packed: what git tracks, new *.py and
    *.yaml, nothing whose name begins with a dot. Data does not: nodes read it from data.root, a
    path that all see or a URI.

    MLFLOW_TRACKING_URI and MAML_DATA_ROOT are passed on.
    """
    from pipeline.cli.console import err, out
    from pipeline.cluster.job_package import files_to_ship
    from pipeline.cluster.submission import check_command, job_environment, what_to_know

    if arguments[0] == "maml":
        arguments = arguments[1:]
    check_command(arguments)
    environment = job_environment(_parsed(env or []))
    selection = files_to_ship(Path.cwd())
    if dry_run:
        _list(selection, environment)
        return
    head = _head(address)
    head.check_versions()
    for line in (*what_to_know(arguments, Path.cwd(), environment), f"ships {selection.summary()}"):
        err.print(line, markup=False, soft_wrap=True)
    job = _submitted(head, arguments, selection, name, environment)
    out.print(f"job     {job.id}", markup=False, soft_wrap=True)
    if follow:
        _follow(head, job.id, address)
    out.print(f"output  {_command('logs', job.id, address)} --follow", markup=False, soft_wrap=True)
    out.print(f"stop    {_command('stop', job.id, address)}", markup=False, soft_wrap=True)


def _submitted(
    head: Head,
    arguments: Sequence[str],
    selection: Selection,
    name: str | None,
    environment: Mapping[str, str],
) -> ClusterJob:
    """Submit the files with a command, which learns from its environment which code it is."""
    from pipeline.cluster.job_package import hash_of, packed
    from pipeline.cluster.submission import default_name
    from pipeline.config import json_text
    from pipeline.runs.source import PACKAGE, SOURCE, source_tags

    with packed(selection) as package:
        tags = {**source_tags(), PACKAGE: hash_of(package)}
        known = {**environment, SOURCE: json_text.write(tags, indent=None)}
        return head.submit(arguments, package, name or default_name(arguments), known)


@jobs_app.callback()
@reporting_errors
def jobs(context: typer.Context, address: Address = None) -> None:
    """List the jobs of a Ray cluster, newest first."""
    if context.invoked_subcommand is not None:
        return
    from pipeline.cli.console import duration, out

    head = _head(address)
    found = head.jobs()
    if not found:
        out.print(f"no jobs on {head.address}")
        return
    width = max(len(job.id) for job in found)  # IDs are typed again: they are never cut
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else ""
        took = duration((job.ended or time.time()) - job.started) if job.started else ""
        command = job.command.replace("python -m pipeline.cli", "maml", 1)
        line = f"{job.id:{width}}  {job.status.lower():9}  {began:16}  {took:>8}  {command}"
        out.print(line, markup=False, soft_wrap=True)


@jobs_app.command("logs")
@reporting_errors
def jobs_logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", help="go on until the job ends; end with its exit code")
    ] = False,
    address: Address = None,
) -> None:
    """Show what a job has written."""
    head = _head(address)
    if follow:
        _follow(head, job, address)
    _write(head.logs(job))


@jobs_app.command("stop")
@reporting_errors
def jobs_stop(job: JobId, address: Address = None) -> None:
    """Stop a job as Ctrl-C would: a training writes a checkpoint."""
    from pipeline.cli.console import out

    head = _head(address)
    before = head.job(job)
    after = head.stop(job) if before.exit_code is None else before
    already = "" if before.exit_code is None else "had already ended: "
    out.print(f"{job} {already}{after.status.lower()}", markup=False, soft_wrap=True)


def _head(address: str | None) -> Head:
    """The head at an address, by default the one that the environment names."""
    from pipeline.cluster.submission import Head, default_address

    return Head(address or default_address())


def _follow(head: Head, job: str, address: str | None) -> None:
    """Show a job's output until it ends, then end this command with the job's exit code."""
    from pipeline.cli.console import err

    try:
        ended = head.follow(job, _write)
    except KeyboardInterrupt:
        err.print(
            f"{job} goes on without being followed\n"
            f"output  {_command('logs', job, address)} --follow\n"
            f"stop    {_command('stop', job, address)}",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    err.print(_ending(ended), markup=False, soft_wrap=True)
    raise typer.Exit(ended.exit_code or 0)


def _ending(job: ClusterJob) -> str:
    """Say how a job ended; with Ray's message only if the job has no output that says why."""
    if job.status == "STOPPED":
        return f"{job.id} was stopped"
    if job.driver_exit_code is None and job.status == "FAILED":
        return f"{job.id} failed before its command ended: {job.message}"
    return f"{job.id} ended with exit code {job.exit_code}"


def _command(verb: str, job: str, address: str | None) -> str:
    """The command that shows or stops a job, as a person types it."""
    return f"maml jobs {verb} {job}" + (f" --address {address}" if address else "")


def _list(selection: Selection, environment: Mapping[str, str]) -> None:
    """Print what would travel with a job: each file and its bytes, the names of its variables."""
    for name, size in sorted(selection.sizes.items()):
        print(f"{size:>11,}  {name}")
    print(f"variables: {', '.join(sorted(environment))}")
    print(f"would ship {selection.summary()}; nothing was submitted")


def _write(text: str) -> None:
    """Write output of a job as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _parsed(pairs: list[str]) -> dict[str, str]:
    """The variables of `--env` as a mapping; of a NAME alone the value here. Raises ValueError."""
    found = {}
    for pair in pairs:
        name, given, value = pair.partition("=")
        if not name:
            raise ValueError("--env: must look like NAME or NAME=value")
        if not given and name not in os.environ:
            raise ValueError(f"--env: {name} is not set here, so it cannot be passed on")
        found[name] = value if given else os.environ[name]
    return found
