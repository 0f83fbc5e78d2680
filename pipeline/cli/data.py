"""`maml data prepare ...`: build image stores."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.exit_codes import reporting_errors
from tasks.data_root import DATA_ROOT

if TYPE_CHECKING:
    from tasks.image_store import ImageStore

data_app = typer.Typer(no_args_is_help=True, help="Prepare image stores.")
prepare_app = typer.Typer(no_args_is_help=True, help="Build an image store.")
data_app.add_typer(prepare_app, name="prepare")


def _folder(root: Path) -> Path:
    """The folder to build a store in. Raises ValueError for a URI."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(root)):  # a Path has one slash of '://' left
        raise ValueError(
            f"--root: stores are built in a folder, not at {root}; build it with --root FOLDER and "
            "copy that to the URI"
        )
    return root


Root = Annotated[
    Path,
    typer.Option("--root", envvar=DATA_ROOT, help="folder of the image stores (data.root)"),
]
_DATA = Path("data")


@prepare_app.command("omniglot")
@reporting_errors
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

    _prepare(lambda progress: prepare(source, _folder(root), image_size=size, on_progress=progress))


@prepare_app.command("images")
@reporting_errors
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
            source,
            _folder(root),
            name,
            image_size=size,
            split=split,
            grey=grey,
            on_progress=progress,
        )
    )


@prepare_app.command("glyphs")
@reporting_errors
def prepare_glyphs(
    root: Root = _DATA,
    classes: Annotated[int, typer.Option(min=10, help="number of characters")] = 1200,
) -> None:
    """Drawn characters of an invented script (also made by themselves at first use)."""
    from tasks.glyphs import prepare_glyphs as prepare

    _prepare(lambda progress: prepare(_folder(root), num_classes=classes, on_progress=progress))


def _prepare(build: Callable[[Callable[[str, int, int], None]], ImageStore]) -> None:
    """Run a preparation with a progress bar and say what was made."""
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

    from pipeline.cli.console import out

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), TaskProgressColumn())
    with Progress(*columns, console=out, disable=not out.is_terminal) as bars:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
                if bars.disable:
                    out.print(f"{what} ...")
            bars.update(shown[what], completed=done, total=total)

        store = build(progress)
    for name, value in store.summary().items():
        text = ", ".join(f"{n} {of}" for of, n in value.items()) if name == "classes" else value
        out.print(f"{name.replace('_', ' '):<13}{text}", markup=False, soft_wrap=True)
