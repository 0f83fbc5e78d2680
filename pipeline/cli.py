"""The `maml` command: parses arguments, calls the library, turns errors into one clear message.

Exit codes: 0 done; 1 the run failed; 2 the input was wrong, nothing was started; 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape

app = typer.Typer(
    name="maml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Distributed model-agnostic meta-learning: train, meta-test, prepare data, browse runs.",
    epilog="--debug anywhere shows the traceback of an error.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at experiments and their settings.")
data_app = typer.Typer(no_args_is_help=True, help="Prepare image stores.")
prepare_app = typer.Typer(no_args_is_help=True, help="Build an image store.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
data_app.add_typer(prepare_app, name="prepare")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="settings to change, such as inner.lr=0.1 cluster.workers=4", show_default=False
    ),
]
RunDir = Annotated[Path, typer.Argument(help="folder of a run", show_default=False)]
Root = Annotated[Path, typer.Option("--root", help="folder of the image stores (data.root)")]
_DATA = Path("data")

_debug = False


def _reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command with a message and an exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            # The reader of our output has gone (`maml ... | head`): nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if _debug:
                raise
            _fail(*_described(error))

    return run


def _described(error: Exception) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    from pipeline.checkpoint import CheckpointError
    from pipeline.experiments import ConfigError
    from pipeline.mlflow_sender import TrackingError
    from pipeline.session import RunFolderError
    from pipeline.training import Interrupted, TrainingFailed
    from pipeline.workers import WorkersLost
    from tasks.image_store import StoreError

    if isinstance(error, Interrupted):
        return str(error), 130
    if isinstance(
        error,
        ConfigError | RunFolderError | CheckpointError | TrackingError | StoreError | ValueError,
    ):
        return str(error), 2
    if isinstance(error, TrainingFailed | WorkersLost):
        return str(error), 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _fail(message: str, code: int) -> None:
    from pipeline.console import err

    style = "yellow" if code == 130 else "bold red"
    err.print(
        f"[{style}]{'stopped' if code == 130 else 'error'}:[/] {escape(message)}", soft_wrap=True
    )
    raise typer.Exit(code)


@app.command()
@_reporting_errors
def train(
    experiment: Annotated[
        str, typer.Argument(help="name of a shipped experiment, or a YAML file", show_default=False)
    ],
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="continue the run in this folder from its last checkpoint"),
    ] = None,
) -> None:
    """Meta-train an experiment, then meta-test it.

    `maml config list` shows the shipped experiments, `maml config show NAME` all their settings.
    """
    from pipeline.console import ConsoleWatcher, curves_table, out
    from pipeline.experiments import load, load_to_resume, new_run_dir
    from pipeline.training import train as meta_train

    if resume is not None:
        run_dir = resume.expanduser().absolute()
        loaded = load_to_resume(run_dir, experiment, overrides or [])
    else:
        loaded = load(experiment, overrides or [])
        run_dir = new_run_dir(loaded)
    watcher = ConsoleWatcher()
    stop = _StopRequest(watcher)
    try:
        curves = meta_train(
            loaded,
            run_dir,
            resume=resume is not None,
            watcher=watcher,
            should_stop=lambda: stop.requested,
        )
    except (Exception, KeyboardInterrupt):
        watcher.stop()
        if (run_dir / "config.yaml").exists():
            out.print(f"to continue: maml train {experiment} --resume {run_dir}", soft_wrap=True)
        raise
    out.print(curves_table(loaded.build_task(), curves))
    out.print(f"run folder   {run_dir}", soft_wrap=True)
    out.print(f"meta-test    maml evaluate {_short(run_dir)}", soft_wrap=True)
    if loaded.tracking.enabled:
        out.print(f"MLflow       {_ui_command(loaded, run_dir)}", soft_wrap=True)


@app.command()
@_reporting_errors
def evaluate(
    run_dir: RunDir,
    tasks: Annotated[int | None, typer.Option(min=2, help="number of tasks")] = None,
    steps: Annotated[
        str | None, typer.Option(help="gradient steps to report, such as 0,1,3,10")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, protocol included")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="change a setting, such as --set task.queries=15"),
    ] = None,
) -> None:
    """Meta-test a finished run on tasks that it was not trained on."""
    from pipeline.console import curves_table, err, out
    from pipeline.evaluation import evaluate_run
    from pipeline.experiments import load_run
    from tasks.base import SPLITS

    if split not in SPLITS:
        raise ValueError(f"--split: must be one of {', '.join(SPLITS)}, got {split!r}")
    loaded = load_run(run_dir, overrides or [])
    if not as_json:
        err.print(f"meta-test of {run_dir} ...", soft_wrap=True)
    curves = evaluate_run(loaded, run_dir, split=split, num_tasks=tasks, steps=_parsed_steps(steps))
    if as_json:
        print(json.dumps([curve.to_json() for curve in curves], indent=1))
    else:
        out.print(curves_table(loaded.build_task(), curves))


@app.command()
@_reporting_errors
def ui(
    uri: Annotated[
        str | None,
        typer.Option(help="tracking store; by default MLFLOW_TRACKING_URI, else runs/mlflow.db"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow's pages on the runs of this folder."""
    from pipeline.mlflow_ui import serve
    from pipeline.tracking import resolve_uri

    serve(resolve_uri(uri, Path("runs").absolute() / "any"), host=host, port=port)


@config_app.command("list")
@_reporting_errors
def config_list() -> None:
    """The shipped experiments."""
    from rich.table import Table

    from pipeline.console import out
    from pipeline.experiments import experiments

    table = Table.grid(padding=(0, 2))
    for name, description in experiments().items():
        table.add_row(f"[bold]{name}[/]", description)
    out.print(table)


@config_app.command("show")
@_reporting_errors
def config_show(
    experiment: Annotated[
        str, typer.Argument(help="name of a shipped experiment, or a YAML file", show_default=False)
    ],
    overrides: Overrides = None,
) -> None:
    """Print an experiment with every default filled in."""
    from pipeline.experiments import load

    print(load(experiment, overrides or []).to_yaml(), end="")


@config_app.command("schema")
@_reporting_errors
def config_schema() -> None:
    """Print the JSON schema of experiments."""
    from pipeline.experiments import json_schema

    print(json.dumps(json_schema(), indent=1))


@prepare_app.command("omniglot")
@_reporting_errors
def prepare_omniglot(
    source: Annotated[
        Path | None,
        typer.Option(
            help="folder with images_background.zip and images_evaluation.zip; "
            "without it they are downloaded"
        ),
    ] = None,
    root: Root = _DATA,
    size: Annotated[int, typer.Option(min=8, help="images become size x size")] = 28,
) -> None:
    """Omniglot: 1623 handwritten characters x 20 drawings."""
    from tasks.omniglot import prepare_omniglot as prepare

    _prepare(lambda progress: prepare(source, root, image_size=size, on_progress=progress))


@prepare_app.command("images")
@_reporting_errors
def prepare_images(
    source: Annotated[
        Path, typer.Option(help="zip or tar archive, or a folder: one folder of images per class")
    ],
    name: Annotated[str, typer.Option(help="name of the store, for task.store")],
    root: Root = _DATA,
    size: Annotated[int | None, typer.Option(min=8, help="resize to size x size")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="train/validation/test classes: counts 64/16/20, fractions 0.64/0.16/0.2, or a "
            "JSON or CSV file; not needed where the source has train, val and test folders"
        ),
    ] = None,
    grey: Annotated[
        bool | None,
        typer.Option("--grey/--colour", help="by default as the images are", show_default=False),
    ] = None,
) -> None:
    """Your own images."""
    from tasks.image_folder import prepare_images as prepare

    _prepare(
        lambda progress: prepare(
            source, root, name, image_size=size, split=split, grey=grey, on_progress=progress
        )
    )


@prepare_app.command("glyphs")
@_reporting_errors
def prepare_glyphs(
    root: Root = _DATA,
    classes: Annotated[int, typer.Option(min=10, help="number of characters")] = 1200,
) -> None:
    """Drawn characters of an invented script (also made by themselves at first use)."""
    from tasks.glyphs import prepare_glyphs as prepare

    _prepare(lambda progress: prepare(root, num_classes=classes, on_progress=progress))


def _prepare(build: Callable[[Callable[[str, int, int], None]], Any]) -> None:
    """Run a preparation with a progress bar and say what was made."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from pipeline.console import out

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), TaskProgressColumn())
    with Progress(*columns, console=out, disable=not out.is_terminal) as bars:
        shown: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
                if bars.disable:
                    out.print(f"{what} ...")
            bars.update(shown[what], completed=done, total=total)

        store = build(progress)
    out.print(store.summary(), soft_wrap=True)


class _StopRequest:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint, the second ends at once."""

    def __init__(self, watcher: Any):
        self.requested = False
        self._watcher = watcher
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._watcher.training:
            raise KeyboardInterrupt
        self.requested = True
        self._watcher.notice("stopping after this iteration (again to stop at once)")


def _parsed_steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        steps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--steps: must look like 0,1,3,10, got {text!r}") from None
    if steps[0] < 0:
        raise ValueError(f"--steps: must not be negative, got {text!r}")
    return steps


def _short(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _ui_command(experiment: Any, run_dir: Path) -> str:
    from pipeline.tracking import resolve_uri

    uri = resolve_uri(experiment.tracking.uri, run_dir)
    default = resolve_uri(None, Path("runs").absolute() / "any")
    return "maml ui" if uri == default else f"maml ui --uri {uri}"


def main() -> None:
    """Entry point of the console script."""
    global _debug
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        _debug = True
    else:
        # A library's deprecation is no news for somebody who trains.
        warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.DEBUG if _debug else logging.WARNING, format="%(message)s")
    for chatty in ("ray", "torch", "matplotlib", "mlflow", "alembic", "urllib3", "PIL", "filelock"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    app()


if __name__ == "__main__":
    main()
