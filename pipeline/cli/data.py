"""`maml data prepare ...`: build image stores."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.clear_errors import ClearTyper
from pipeline.cli.exit_codes import reporting_errors
from tasks.data_root import DATA_ROOT, absolute_root, default_root

if TYPE_CHECKING:
    from tasks.image_store import ImageStore

data_app = ClearTyper(no_args_is_help=True, help="Prepare image stores.")
prepare_app = ClearTyper(no_args_is_help=True, help="Build an image store.")
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
_LARGEST = 4096  # pixels


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
    size: Annotated[int, typer.Option(min=8, max=_LARGEST, help="images become size x size")] = 28,
) -> None:
    """Omniglot: 1623 handwritten characters x 20 drawings."""
    from tasks.omniglot import prepare_omniglot as prepare
    from tasks.omniglot import store_name

    _prepare(
        root,
        store_name(size),
        lambda progress: prepare(source, _folder(root), image_size=size, on_progress=progress),
        ["omniglot-5w1s-short", *([f"task.image_size={size}"] if size != 28 else [])],
    )


@prepare_app.command("images")
@reporting_errors
def prepare_images(
    source: Annotated[
        Path, typer.Option(help="zip or tar archive, or a folder: one folder of images per class")
    ],
    name: Annotated[str, typer.Option(help="name of the store, for task.store")],
    root: Root = _DATA,
    size: Annotated[
        int | None, typer.Option(min=8, max=_LARGEST, help="resize to size x size")
    ] = None,
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
        root,
        name,
        lambda progress: prepare(
            source,
            _folder(root),
            name,
            image_size=size,
            split=split,
            grey=grey,
            on_progress=progress,
        ),
        ["image-folder", f"task.store={name}"],
    )


@prepare_app.command("glyphs")
@reporting_errors
def prepare_glyphs(
    root: Root = _DATA,
    classes: Annotated[
        int, typer.Option(min=10, max=1_000_000, help="number of characters")
    ] = 1200,
) -> None:
    """Drawn characters of an invented script (also made by themselves at first use)."""
    from tasks.glyphs import NUM_CLASSES, store_name
    from tasks.glyphs import prepare_glyphs as prepare

    _prepare(
        root,
        store_name(classes),
        lambda progress: prepare(_folder(root), num_classes=classes, on_progress=progress),
        ["glyphs", *([f"task.num_classes={classes}"] if classes != NUM_CLASSES else [])],
    )


def _prepare(
    root: Path,
    name: str,
    build: Callable[[Callable[[str, int, int], None]], ImageStore],
    trained_by: list[str],
) -> None:
    """Run a preparation with a progress bar; say what was made, where, and what comes next.

    `trained_by` are the arguments of `maml train` for the store where it lies in the usual root.
    """
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

    from pipeline.cli.console import out
    from tasks.image_store import store_folder

    before = _content_hash(root, name)
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
    for key, value in store.summary().items():
        text = ", ".join(f"{n} {of}" for of, n in value.items()) if key == "classes" else value
        _say(key.replace("_", " "), text)
    _say("store", f"{store_folder(root, store.name)}{_what_became(before, store.content_hash)}")
    usual = absolute_root(str(root)) == absolute_root(default_root())
    there = [] if usual else [f"data.root={root}"]
    _say("next", shlex.join(["maml", "train", *trained_by, *there]))


def _say(name: str, text: object) -> None:
    from pipeline.cli.console import out

    out.print(f"{name:<13}{text}", markup=False, soft_wrap=True)


def _content_hash(root: Path, name: str) -> str | None:
    """What the store of this name holds: None if there is none, '' if it is damaged."""
    from tasks.image_store import ImageStore, StoreError, store_exists

    try:
        return ImageStore.open(root, name).content_hash if store_exists(root, name) else None
    except StoreError:
        return ""


def _what_became(before: str | None, now: str) -> str:
    """What became of the store that was there, in words for the end of a line."""
    if before is None:
        return ""
    if before == now:
        return " (unchanged: the same images and classes)"
    return " (replaced: it held other images or classes)"
