"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

ExperimentName = Annotated[
    str, typer.Argument(help="name of a shipped experiment, or a YAML file", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="settings to change, such as inner.lr=0.1 cluster.workers=4", show_default=False
    ),
]
StoreUri = Annotated[
    str | None,
    typer.Option(help="tracking store; by default MLFLOW_TRACKING_URI, else runs/mlflow.db"),
]
