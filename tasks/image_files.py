"""Lists, reads and decodes image files in a folder, a zip or a tar archive.

Nothing is extracted to disk, so the name of a file in an archive cannot choose where it would go.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from tasks.errors import first_line
from tasks.image_store import StoreError, UInt8

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_GREY_MODES = ("1", "L", "LA")
# What the archive modules raise on damaged files; zipfile raises RuntimeError for encrypted ones.
_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)


class ImageFiles(NamedTuple):
    """The sorted paths of files within the source, and the function that reads one."""

    paths: list[PurePosixPath]
    read: Callable[[PurePosixPath], bytes]


@contextlib.contextmanager
def image_files(source: Path) -> Iterator[ImageFiles]:
    """Open a folder or archive and list its images; hidden files are left out.

    Raises StoreError for a source that does not exist or is damaged, and so does `read`.
    """
    if not source.exists():
        raise StoreError(f"{source} does not exist")
    if source.is_dir():
        kind = _folder
    elif not source.is_file():  # reading a pipe or a device may take for ever
        raise StoreError(f"{source} is neither a folder nor a file")
    else:
        kind = _zip if source.suffix.lower() == ".zip" or zipfile.is_zipfile(source) else _tar
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(kind(source))
        except _DAMAGED as error:
            raise StoreError(f"{source} is damaged, or no zip or tar archive: {error}") from error

        def read(path: PurePosixPath) -> bytes:
            try:
                return files.read(path)
            except _DAMAGED as error:
                raise StoreError(f"{source} is damaged at {path}: {error}; get it again") from error

        yield files._replace(read=read)


def decode(data: bytes, name: str, size: int | None, channels: int) -> UInt8:
    """Decode an image to uint8 [H, W, C], resized (Lanczos) to `size` x `size` unless it is None.

    Transparent parts become white. Raises StoreError naming the file if it is not an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel: convert it first")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            # Before resizing, because Pillow resizes 1-bit and palette images without a filter.
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(image).reshape(image.height, image.width, channels)
    except Exception as error:  # Pillow raises nearly anything on broken bytes
        raise StoreError(f"{name} is not a readable image: {first_line(error)}") from error


def is_grey(data: bytes, name: str) -> bool:
    """Whether an image is grey, by its header. Raises StoreError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as file:
            return file.mode in _GREY_MODES
    except Exception as error:  # Pillow raises nearly anything on broken bytes
        raise StoreError(f"{name} is not a readable image: {error}") from error


def _wanted(names: Iterator[str]) -> list[PurePosixPath]:
    """The names of images, sorted; without hidden files and macOS's own."""
    paths = (PurePosixPath(name) for name in names)
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    )


@contextlib.contextmanager
def _folder(source: Path) -> Iterator[ImageFiles]:
    names = (
        os.path.relpath(os.path.join(folder, name), source)
        for folder, _, names in os.walk(source)
        for name in names
        if os.path.isfile(os.path.join(folder, name))  # and no pipe
    )
    yield ImageFiles(_wanted(names), lambda path: (source / path).read_bytes())


@contextlib.contextmanager
def _zip(source: Path) -> Iterator[ImageFiles]:
    with zipfile.ZipFile(source) as archive:
        members = {PurePosixPath(name): name for name in archive.namelist()}
        yield ImageFiles(
            _wanted(iter(archive.namelist())), lambda path: archive.read(members[path])
        )


@contextlib.contextmanager
def _tar(source: Path) -> Iterator[ImageFiles]:
    with _seekable(source) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        members = {PurePosixPath(each.name): each for each in archive if each.isfile()}
        # tarfile accepts an archive that was cut off within a header; a whole one ends in zeros.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of data")

        def read(path: PurePosixPath) -> bytes:
            content = archive.extractfile(members[path])
            return content.read() if content else b""

        yield ImageFiles(_wanted(str(path) for path in members), read)


@contextlib.contextmanager
def _seekable(source: Path) -> Iterator[io.BufferedIOBase]:
    """The tar file, decompressed first where needed: its members are read out of order."""
    with source.open("rb") as file:
        magic = file.read(6)
        openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
        for start, opener in openers:
            if magic.startswith(start):
                with tempfile.TemporaryFile() as plain, opener(source) as packed:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                    plain.seek(0)
                    yield plain
                return
        file.seek(0)
        yield file
