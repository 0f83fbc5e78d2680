"""`maml ui` and `maml resend`: MLflow's pages, and records that MLflow has not received."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import StoreUri
from pipeline.cli.exit_codes import reporting_errors


@reporting_errors
def ui(
    uri: StoreUri = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow's pages on the runs of this folder."""
    from pipeline.cli.console import out
    from pipeline.runs.mlflow_ui import serve
    from pipeline.runs.reading import default_store

    def say(address: str) -> None:
        out.print(f"MLflow: {address} (Ctrl-C ends it)", markup=False, soft_wrap=True)

    serve(default_store(uri), host=host, port=port, on_up=say)


@reporting_errors
def resend(
    file: Annotated[
        Path, typer.Argument(help="unsent-tracking.jsonl of a run", show_default=False)
    ],
) -> None:
    """Send MLflow what a run could not, because the server was away."""
    from pipeline.cli.console import out
    from pipeline.runs.mlflow_store import TrackingError
    from pipeline.runs.tracker import resend as send

    if not file.is_file():
        raise ValueError(f"{file} is not a file; a run names it when MLflow could not be reached")
    if not send(file):
        raise TrackingError(f"MLflow still cannot be reached; {file} is kept")
    out.print("sent")
