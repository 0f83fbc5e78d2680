"""Few-shot tasks from a user's own images, one folder per class."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path, PurePosixPath

import numpy as np

from tasks.base import SPLITS, at_least
from tasks.few_shot import FewShot
from tasks.image_files import ImageFiles, decode, image_files, is_grey
from tasks.image_store import (
    ClassImages,
    ImageStore,
    Progress,
    StoreError,
    UInt8,
    fixed_order,
    no_progress,
    store_folder,
    with_progress,
    write_store,
)

_SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(FewShot):
    """Few-shot tasks over a store that `maml data prepare images --name STORE` has built."""

    store: str

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            store_folder(self.data_root, self.store)
        except StoreError as error:
            raise ValueError(f"store: {error}") from None

    def store_name(self) -> str:
        return self.store

    def prepare_command(self) -> str:
        return _prepare_command(self.store)


def prepare_images(
    source: Path,
    data_root: Path,
    name: str,
    *,
    image_size: int | None = None,
    split: str | None = None,
    grey: bool | None = None,
    on_progress: Progress = no_progress,
) -> ImageStore:
    """Build the store `name` from a folder, zip or tar archive with one folder per class.

    A class is named by its folder's path below the folder that all images have in common. Images
    are resized to `image_size` x `image_size` pixels (proportions are not kept, as is usual with
    miniImageNet); without it they must all have the same size. They become grey if `grey` is true,
    or if it is None and none of them has colour.

    `split` is one of
      "64/16/20"          numbers of train, validation and test classes, adding up to all of them;
      "0.64/0.16/0.2"     fractions of the classes, adding up to 1;
      a file              JSON {"train": [CLASS, ...], "validation": [...], "test": [...]}, or lines
                          CLASS,SPLIT; classes that it does not name are left out;
      None                for a source that has the layout train/CLASS, val/CLASS, test/CLASS.
    Numbers and fractions divide the classes in the order of a hash of their names, so the split is
    the same for everyone, whatever the seed of a run.

    Raises StoreError, and ValueError for an `image_size` below 1.
    """
    if image_size is not None:
        at_least("image_size", image_size, 1)
    with image_files(Path(source)) as files:
        folders, given = _classes(source, files.paths)
        names = sorted(folders)
        splits = _assign(split, names) if split is not None else _from_folders(source, given)
        names = [each for each in names if each in splits]
        if grey is None:
            grey = all(
                is_grey(files.read(path), str(path)) for each in names for path in folders[each]
            )
        read = _equal_images(files, image_size, channels=1 if grey else 3)
        classes = (
            ClassImages(each, splits[each], np.stack([read(path) for path in folders[each]]))
            for each in with_progress(names, "reading classes", on_progress)
        )
        return write_store(
            data_root,
            name,
            classes,
            source=Path(source).name,
            command=_prepare_command(name),
        )


def _equal_images(
    files: ImageFiles, image_size: int | None, channels: int
) -> Callable[[PurePosixPath], UInt8]:
    """A function that decodes an image; it raises StoreError if the first one had another size."""
    first: list[tuple[PurePosixPath, UInt8]] = []

    def read(path: PurePosixPath) -> UInt8:
        image = decode(files.read(path), str(path), image_size, channels)
        if not first:
            first.append((path, image))
        first_path, first_image = first[0]
        if image.shape != first_image.shape:
            raise StoreError(
                f"{path} is {_pixels(image)}, {first_path} is {_pixels(first_image)}: "
                "give --size to make them equal"
            )
        return image

    return read


def _prepare_command(name: str) -> str:
    return f"maml data prepare images --source PATH --name {name}"


def _pixels(image: UInt8) -> str:
    return f"{image.shape[1]}x{image.shape[0]} pixels"


def _classes(
    source: Path, paths: list[PurePosixPath]
) -> tuple[dict[str, list[PurePosixPath]], dict[str, set[str]]]:
    """The images of every class, and the splits in whose folders the class is, if there are any."""
    if not paths:
        raise StoreError(f"{source} holds no images")
    top = commonpath([str(path.parent) for path in paths])
    below = {path: path.parent.relative_to(top).parts for path in paths}
    if () in below.values():
        stray = next(path for path, parts in below.items() if not parts)
        raise StoreError(
            f"{source}: {stray} is in no class folder; there must be one folder per class, and "
            "at least two"
        )
    layout = all(len(parts) > 1 and parts[0].lower() in _SPLIT_NAMES for parts in below.values())
    folders: dict[str, list[PurePosixPath]] = {}
    splits: dict[str, set[str]] = {}
    for path, parts in below.items():
        name = "/".join(parts[1:] if layout else parts)
        folders.setdefault(name, []).append(path)
        if layout:
            splits.setdefault(name, set()).add(_SPLIT_NAMES[parts[0].lower()])
    return folders, splits


def _from_folders(source: Path, found: dict[str, set[str]]) -> dict[str, str]:
    """The split of every class, by the folders that it is in. Raises StoreError."""
    how = "counts (64/16/20), fractions (0.64/0.16/0.2) or a file"
    if not found:
        raise StoreError(f"{source} has no train/val/test folders: give --split as {how}")
    for name, splits in found.items():
        if len(splits) > 1:
            raise StoreError(
                f"class {name} is in {' and '.join(sorted(splits))}, but splits must have "
                f"different classes: give --split as {how}"
            )
    return {name: split for name, (split,) in found.items()}


def _assign(split: str, names: list[str]) -> dict[str, str]:
    """The split of every class, by the value of the option --split. Raises StoreError."""
    parts = split.split("/")
    if len(parts) != len(SPLITS) or not all(re.fullmatch(r"\d*\.?\d+", part) for part in parts):
        return _read_split(Path(split), names)
    numbers = [float(part) for part in parts]
    if "." in split:
        if abs(sum(numbers) - 1) > 1e-6:
            raise StoreError(
                f"split {split}: the fractions add up to {sum(numbers):g} instead of 1"
            )
        bounds = [round(sum(numbers[:end]) * len(names)) for end in range(len(SPLITS) + 1)]
    else:
        bounds = [int(sum(numbers[:end])) for end in range(len(SPLITS) + 1)]
        if bounds[-1] != len(names):
            raise StoreError(
                f"split {split}: adds up to {bounds[-1]}, but there are {len(names)} classes"
            )
    ordered = fixed_order(names)
    return {
        name: each
        for each, first, end in zip(SPLITS, bounds, bounds[1:], strict=False)
        for name in ordered[first:end]
    }


def _read_split(path: Path, names: list[str]) -> dict[str, str]:
    """The split of every class that a file names. Raises StoreError."""
    try:
        text = path.read_text()
        if path.suffix.lower() == ".json":
            pairs = [(name, key) for key, listed in json.loads(text).items() for name in listed]
        else:
            rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
            pairs = [(name, key) for name, key in rows if (name, key) != ("class", "split")]
    except OSError as error:
        raise StoreError(
            f"split {path}: neither three numbers for train/validation/test, as in 64/16/20 or "
            f"0.64/0.16/0.2, nor a file that can be read ({error.strerror})"
        ) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise StoreError(
            f"split file {path}: neither JSON {{split: [class, ...]}} nor lines 'class,split' "
            f"({error})"
        ) from error
    splits: dict[str, str] = {}
    for name, key in pairs:
        if name not in names:
            raise StoreError(f"split file {path}: there is no class {name!r} ({names[0]!r} is one)")
        if key not in _SPLIT_NAMES:
            raise StoreError(f"split file {path}: {key!r} is not one of {', '.join(SPLITS)}")
        if splits.setdefault(name, _SPLIT_NAMES[key]) != _SPLIT_NAMES[key]:
            raise StoreError(f"split file {path}: class {name!r} is in two splits")
    if not splits:
        raise StoreError(f"split file {path}: it names no class")
    return splits
