"""`maml search`: try settings with Ray Tune."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.exit_codes import reporting_errors
from pipeline.cli.next_commands import typed, ui_command
from pipeline.cli.resumable import Kind, carry_out, new_or_resumed


@reporting_errors
def search(
    experiment: Annotated[
        str | None,
        typer.Argument(
            help="a shipped experiment or a YAML file with a search section; not with --resume "
            "SEARCH_DIR",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="settings to change, such as search.samples=4 search.scheduler=none "
            "'search.space.inner.lr={uniform: [0.1, 0.5]}'",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="SEARCH_DIR|auto",
            help="continue the search in this folder: finished trials are kept; auto: the newest "
            "unfinished one of EXPERIMENT with these settings (or that in run_dir), or begin one",
        ),
    ] = None,
) -> None:
    """Search for the best settings: many short trainings with Ray Tune, ranked by validation.

    The `search:` section of the experiment names the settings and their ranges
    (`maml config show sinusoid-search`). Ends with a table, an answer in words, and best.yaml.
    """
    from pipeline.cli.console import out
    from pipeline.cli.search_console import SearchConsole, search_table
    from pipeline.search.run import load_search, run_search, search_to_continue
    from pipeline.training.endings import TrainingFailed

    kind = Kind(load_search, search_to_continue)
    watcher = SearchConsole()
    with new_or_resumed(kind, experiment, overrides or [], resume) as request:
        result = carry_out(
            run_search,
            request,
            watcher=watcher,
            command="maml search",
            on_stop="stopping and saving the search (again to stop at once)",
        )
    folder = request.folder
    watcher.stop()
    # Wider than a narrow terminal if it must be: no number is cut.
    out.print(search_table(result), width=max(out.width, 120), crop=False)
    for line in result.words:
        watcher.say(line)
    watcher.say(f"search folder  {folder}")
    if result.best is None:
        raise TrainingFailed("no trial has a result; the table says why each one failed")
    watcher.say(f"train in full  maml train {typed(folder / 'best.yaml')}")
    if request.experiment.tracking.enabled:
        watcher.say(f"MLflow         {ui_command(request.experiment, folder)}")
