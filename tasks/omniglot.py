"""Omniglot (Lake et al. 2015): 1623 handwritten characters of 50 alphabets, 20 drawings each."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from tasks.base import at_least
from tasks.download import fetch
from tasks.few_shot import FewShot
from tasks.image_files import ImageFiles, decode, image_files
from tasks.image_store import (
    ClassImages,
    ImageClass,
    ImageStore,
    Progress,
    StoreError,
    fixed_order,
    no_progress,
    with_progress,
    write_store,
)

_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_DRAWINGS = 20
_Drawing = tuple[ImageFiles, PurePosixPath]
# The two archives: their characters, and the MD5 of the official files.
_ARCHIVES = {
    "images_background": (964, "68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation": (659, "6b91aef0f799c5bb55b94e3f2daec811"),
}


@dataclass(frozen=True, kw_only=True)
class Omniglot(FewShot):
    """Characters as few-shot classes; ink is 1, paper 0.

    `split` names a fixed division of the characters:
      vinyals    1028 / 172 / 423, Vinyals et al. 2016: all test alphabets but one are new;
      paper      1100 / 100 / 423, shuffled over all alphabets as in Finn et al. 2017. Their shuffle
                 cannot be reproduced; this one is by a hash of the characters' names.
    Test characters of one are training characters of the other: never compare across the two.
    """

    queries: int = 1  # as many as shots, by the paper's protocol
    rotations: Literal["none", "per-task", "classes"] = "per-task"
    image_size: int = 28
    split: Literal["vinyals", "paper"] = "vinyals"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("image_size", self.image_size, 1)

    def store_name(self) -> str:
        return store_name(self.image_size)

    def prepare_command(self) -> str:
        return _prepare_command(self.image_size)

    def split_of(self, image_class: ImageClass) -> str:
        if self.split == "paper":
            return _paper_split()[image_class.name]
        return image_class.split

    def protocol(self) -> dict[str, object]:
        return {**super().protocol(), "split": self.split}


def prepare_omniglot(
    source: Path | None,
    data_root: Path,
    *,
    image_size: int = 28,
    on_progress: Progress = no_progress,
) -> ImageStore:
    """Build the store `omniglot` (`omniglot-SIZE` for other sizes than 28).

    `source` is a folder with the official archives images_background.zip and images_evaluation.zip,
    zipped or unpacked. Their content is checked rather than a checksum, so archives that were
    packed again are accepted. Without a source the archives are downloaded to DATA_ROOT/downloads.

    The 105x105 drawings are inverted (ink 255) and resized with a Lanczos filter. (The original
    code asks for that filter too, but Pillow resizes 1-bit images without one.)
    Raises StoreError, and ValueError for an `image_size` below 1.
    """
    at_least("image_size", image_size, 1)
    if source is None:
        source = Path(data_root).expanduser() / "downloads" / "omniglot"
        for name, (_, md5) in _ARCHIVES.items():
            fetch(f"{_URL}/{name}.zip", source / f"{name}.zip", md5, on_progress=on_progress)
    with ExitStack() as opened:
        drawings: dict[str, list[_Drawing]] = {}
        for name, (characters, _) in _ARCHIVES.items():
            archive = _archive(source, name)
            drawings |= _drawings(archive, opened.enter_context(image_files(archive)), characters)
        splits = _vinyals_split()
        if missing := sorted(splits.keys() - drawings.keys()):
            raise StoreError(f"{source} is not Omniglot: it has no character {missing[0]}")

        def classes() -> Iterator[ClassImages]:
            for name in with_progress(sorted(drawings), "reading characters", on_progress):
                images = [
                    decode(files.read(path), str(path), image_size, channels=1)
                    for files, path in drawings[name]
                ]
                yield ClassImages(name, splits[name], 255 - np.stack(images))

        return write_store(
            data_root,
            store_name(image_size),
            classes(),
            source="Omniglot, github.com/brendenlake/omniglot (MIT)",
            command=_prepare_command(image_size),
        )


def store_name(image_size: int) -> str:
    """The name of the store with images of this size."""
    return "omniglot" if image_size == 28 else f"omniglot-{image_size}"


def _prepare_command(image_size: int) -> str:
    size = "" if image_size == 28 else f" --size {image_size}"
    return f"maml data prepare omniglot{size} [--source DIR]"


def _archive(source: Path, name: str) -> Path:
    """The archive NAME.zip, or the folder NAME. Raises StoreError."""
    for candidate in (source / f"{name}.zip", source / name):
        if candidate.exists():
            return candidate
    raise StoreError(f"{source} has no {name}.zip: --source is the folder of the two archives")


def _drawings(source: Path, files: ImageFiles, characters: int) -> dict[str, list[_Drawing]]:
    """The drawings of every character of an archive. Raises StoreError if some are missing."""
    found: dict[str, list[_Drawing]] = {}
    for path in files.paths:
        found.setdefault("/".join(path.parent.parts[-2:]), []).append((files, path))
    counts = Counter(map(len, found.values()))
    if counts != {_DRAWINGS: characters}:
        held = ", ".join(f"{n} characters of {each} drawings" for each, n in counts.items())
        raise StoreError(
            f"{source} should hold {characters} characters of {_DRAWINGS} drawings, it holds "
            f"{held or 'no images'}\nget it again from {_URL}"
        )
    return found


@cache
def _vinyals_split() -> dict[str, str]:
    """The split of every character in Vinyals et al. 2016, by name, ALPHABET/characterNN."""
    table = json.loads(Path(__file__).with_name("omniglot_splits.json").read_text())
    return {
        f"{alphabet}/character{number:02}": split
        for split in ("train", "validation", "test")
        for alphabet, (first, last) in table[split].items()
        for number in range(first, last + 1)
    }


@cache
def _paper_split() -> dict[str, str]:
    """The split of every character in the manner of Finn et al. 2017, by name."""
    names = fixed_order(_vinyals_split())
    sizes = {"train": 1100, "validation": 100, "test": 423}
    splits = [split for split, size in sizes.items() for _ in range(size)]
    return dict(zip(names, splits, strict=True))
