"""`maml config ...`: shipped experiments, algorithms and settings."""

from __future__ import annotations

from pipeline.cli.arguments import ExperimentName, Overrides
from pipeline.cli.clear_errors import ClearTyper
from pipeline.cli.exit_codes import reporting_errors
from pipeline.config import json_text

config_app = ClearTyper(no_args_is_help=True, help="Look at experiments and their settings.")


@config_app.command("list")
@reporting_errors
def config_list() -> None:
    """List the shipped experiments."""
    from rich.table import Table

    from pipeline.cli.console import out
    from pipeline.config.loading import experiments

    table = Table.grid(padding=(0, 2))
    for name, description in experiments().items():
        table.add_row(f"[bold]{name}[/]", description)
    out.print(table)


@config_app.command("algorithms")
@reporting_errors
def config_algorithms() -> None:
    """List the MAML family: what `algorithm:` may be, and what each one sets."""
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.console import out
    from pipeline.config.algorithms import PRESETS

    table = Table.grid(padding=(0, 2))
    for name, preset in PRESETS.items():
        settings = "\n".join(f"{path}={value}" for path, value in preset.settings.items())
        said = f"{preset.description}\n[dim]{escape(settings)}[/]".rstrip()
        table.add_row(f"[bold]{name}[/]", said)
    out.print(table)


@config_app.command("show")
@reporting_errors
def config_show(
    experiment: ExperimentName,
    overrides: Overrides = None,
) -> None:
    """Print an experiment with every default filled in."""
    from pipeline.config.loading import load

    print(load(experiment, overrides or []).to_yaml(), end="")


@config_app.command("schema")
@reporting_errors
def config_schema() -> None:
    """Print the JSON schema of experiments."""
    from pipeline.config.loading import json_schema

    print(json_text.write(json_schema()))
