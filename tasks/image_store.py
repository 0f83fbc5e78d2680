"""Stores labelled images on disk, memory-mapped: all processes of a node share the same pages.

    DATA_ROOT/NAME/images.arrow    one record batch with one column `image`, a fixed-shape tensor of
                                   uint8 [H, W, C] per row (an Arrow IPC file, uncompressed)
    DATA_ROOT/NAME/manifest.json   classes, splits, shape, size and content hash

The rows of a class are contiguous, so a class is (first row, count) and needs no label column. A
store is written in a folder beside its place, which is then renamed: a store is complete or absent.

Shapes: n images of H x W pixels and C channels (1 grey, 3 colour).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.base import SPLITS
from tasks.errors import ReportedError

UInt8 = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]
"""`on_progress(what, done, total)`; `total` is 0 where it is unknown."""

_FORMAT = 1
IMAGES, MANIFEST = "images.arrow", "manifest.json"


class StoreError(ReportedError):
    """Data is missing, damaged or cannot be written; the message says what to do."""


@dataclass(frozen=True)
class ImageClass:
    """A class: rows [first, first + count) of the store."""

    name: str
    split: str
    first: int
    count: int


class ClassImages(NamedTuple):
    """A class to be written: images [count, H, W, C]."""

    name: str
    split: str
    images: UInt8


def no_progress(what: str, done: int, total: int) -> None:
    """A Progress that does nothing."""


def with_progress(names: Sequence[str], what: str, on_progress: Progress) -> Iterator[str]:
    """Yield the names one by one, and report how many are done."""
    for done, name in enumerate(names):
        on_progress(what, done, len(names))
        yield name
    on_progress(what, len(names), len(names))


@dataclass(frozen=True)
class ImageStore:
    """An opened store. `images` [n, H, W, C] is a read-only view of the mapped file."""

    name: str
    source: str
    content_hash: str
    """SHA-256 of the pixels and the class table; equal wherever the data set is equal."""
    images: UInt8
    classes: tuple[ImageClass, ...]

    @classmethod
    def open(
        cls,
        root: Path | str,
        name: str,
        *,
        command: str = "maml data prepare",
        verify: bool = False,
    ) -> "ImageStore":
        """Map the store DATA_ROOT/`name`.

        Checks size and structure, which is quick; `verify` compares every byte with the content
        hash. Raises StoreError for a store that is missing, incomplete or damaged; its message
        names `command`, which builds the store.
        """
        folder = store_folder(root, name)
        try:
            if not store_exists(root, name):
                state = "is incomplete (no manifest)" if folder.exists() else "does not exist"
                raise StoreError(f"the image store {folder} {state}\nbuild it with: {command}")
            store = _open(folder)
            if verify and _hash(store.images, store.classes) != store.content_hash:
                raise ValueError("its content does not match the hash in its manifest")
            return store
        except StoreError:
            raise
        except Exception as error:  # a damaged file makes json, numpy and pyarrow raise anything
            detail = f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("ValueError: ")
            raise StoreError(
                f"the image store {folder} is damaged: {detail}\nbuild it again with: {command}"
            ) from error

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def split(self, split: str) -> tuple[ImageClass, ...]:
        """The classes of a split, in the store's order."""
        return tuple(each for each in self.classes if each.split == split)

    def summary(self) -> dict[str, Any]:
        """A description for people, as plain values."""
        return {
            "name": self.name,
            "source": self.source,
            "images": len(self.images),
            "image_shape": list(self.image_shape),
            "classes": {split: len(self.split(split)) for split in SPLITS},
            "content_hash": self.content_hash,
        }


def store_folder(root: Path | str, name: str) -> Path:
    """The folder of the store with this name. Raises StoreError for an impossible name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise StoreError(f"{name!r} cannot name an image store: use letters, digits, '-' and '_'")
    return Path(root).expanduser().absolute() / name


def store_exists(root: Path | str, name: str) -> bool:
    """Whether there is a complete store of this name."""
    return (store_folder(root, name) / MANIFEST).is_file()


def fixed_order(names: Iterable[str]) -> list[str]:
    """The names sorted by their SHA-256: shuffled, in the same order everywhere."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def write_store(
    root: Path | str,
    name: str,
    classes: Iterable[ClassImages],
    *,
    source: str,
    command: str,
    replace: bool = True,
) -> ImageStore:
    """Write a store, class by class as `classes` yields them; open and verify it.

    One process at a time builds a store, others wait; one that dies leaves nothing that looks like
    a store. With `replace=False` an existing store is kept and `classes` is not read. Raises
    StoreError if the folder cannot be written or holds anything but a store, and what `classes`
    raises.
    """
    folder = store_folder(root, name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_builder(folder):
            if replace or not store_exists(root, name):
                _refuse_foreign(folder)
                _build(folder, classes, source)
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"cannot write the image store {folder}: {reason}") from error
    return ImageStore.open(root, name, command=command, verify=True)


def _open(folder: Path) -> ImageStore:
    """Map a store. Raises ValueError, KeyError and errors of pyarrow for a damaged one."""
    import pyarrow as pa

    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != _FORMAT:
        raise ValueError(f"its format is {manifest['format']}, this version reads {_FORMAT}")
    path = folder / IMAGES
    size = path.stat().st_size
    if size != manifest["file_size"]:
        raise ValueError(f"{IMAGES} has {size} bytes instead of {manifest['file_size']}")
    count, shape = manifest["num_images"], tuple(manifest["image_shape"])
    classes = tuple(ImageClass(**each) for each in manifest["classes"])
    starts = np.cumsum([0, *(each.count for each in classes)]).tolist()
    if [*(each.first for each in classes), count] != starts or {
        each.split for each in classes
    } - set(SPLITS):
        raise ValueError("the class table of its manifest is inconsistent")
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    column = batch.column("image")
    if len(column) != count or tuple(column.type.shape) != shape:
        raise ValueError(f"{IMAGES} and the manifest disagree about the number or shape of images")
    # The buffer keeps the mapping alive; the array keeps the buffer.
    pixels = np.frombuffer(
        column.storage.values.buffers()[1], np.uint8, count * int(np.prod(shape))
    )
    return ImageStore(
        name=manifest["name"],
        source=manifest["source"],
        content_hash=manifest["content_hash"],
        images=pixels.reshape(count, *shape),
        classes=classes,
    )


def _build(folder: Path, classes: Iterable[ClassImages], source: str) -> None:
    """Write the files of a store beside `folder`, then rename their folder to it."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of a builder that was killed
    new, pixels = scratch / "new", scratch / "pixels"
    new.mkdir(parents=True)
    try:
        # To be mapped as one array, the column must be one buffer. So the rows go to a scratch file
        # first and are written from its mapping: memory holds one class, the disk all rows twice.
        table, shape = _gather(pixels, classes)
        count = sum(each.count for each in table)
        images = np.memmap(pixels, np.uint8, mode="r", shape=(count, *shape))
        _write_arrow(new / IMAGES, images)
        manifest = {
            "format": _FORMAT,
            "name": folder.name,
            "source": source,
            "image_shape": shape,
            "num_images": count,
            "file_size": (new / IMAGES).stat().st_size,
            "content_hash": _hash(images, table),
            "classes": [vars(each) for each in table],
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in new.iterdir():
            _sync(path)
        if folder.exists():
            folder.replace(scratch / "old")  # processes that mapped it keep it
        new.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _gather(
    path: Path, classes: Iterable[ClassImages]
) -> tuple[list[ImageClass], tuple[int, int, int]]:
    """Write the pixels of all classes to a file; return the class table and (H, W, C)."""
    table: list[ImageClass] = []
    shape: tuple[int, ...] = ()
    first = 0
    with path.open("wb") as file:
        for name, split, images in classes:
            shape = shape or images.shape[1:]
            if images.dtype != np.uint8 or images.shape[1:] != shape or len(shape) != 3:
                raise ValueError(
                    f"class {name}: {images.dtype} {images.shape} instead of uint8 [n, *{shape}]"
                )
            file.write(np.ascontiguousarray(images).data)
            table.append(ImageClass(name, split, first, len(images)))
            first += len(images)
    if not first:
        raise ValueError("a store needs at least one image")
    height, width, channels = shape
    return table, (height, width, channels)


def _write_arrow(path: Path, images: npt.NDArray[np.uint8]) -> None:
    """Write images [n, H, W, C] as one Arrow record batch."""
    import pyarrow as pa

    shape = images.shape[1:]
    values = pa.Array.from_buffers(pa.uint8(), images.size, [None, pa.py_buffer(images)])
    rows = pa.FixedSizeListArray.from_arrays(values, int(np.prod(shape)))
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), rows)
    batch = pa.record_batch([column], names=["image"])
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def _hash(images: UInt8, classes: Iterable[ImageClass]) -> str:
    """The content hash of a store."""
    digest = hashlib.sha256(images.reshape(-1).data)
    digest.update(json.dumps([images.shape, [vars(each) for each in classes]]).encode())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a crash after the rename loses nothing."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _refuse_foreign(folder: Path) -> None:
    """Raise StoreError if the folder holds anything but a store."""
    if not folder.exists():
        return
    if not folder.is_dir() or {each.name for each in folder.iterdir()} - {IMAGES, MANIFEST}:
        raise StoreError(
            f"{folder} is the place of the image store, but holds something else\n"
            "move it away, or choose another data root"
        )


@contextlib.contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold the lock for writing the store in `folder`; other processes wait."""
    import fcntl

    # The kernel frees the lock when its holder dies, so there are no stale locks.
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
