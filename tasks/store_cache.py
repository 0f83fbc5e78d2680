"""Finds image stores: in a folder that every node sees, or at a URI from which each node copies.

    /mnt/stores          a folder: its stores are opened in place, without copying or network
    s3://BUCKET/stores   any URI that pyarrow.fs knows: copied to the node's cache at first use

    CACHE/HASH/NAME/     such a copy. HASH is that of the manifest at the URI, so that a rebuilt
                         store is copied again. Copies may be deleted at any time.

One process of a node copies, the others wait for it. A copy is compared with the content hash of
its manifest before it is put in place, and by every process that opens it; a damaged one is copied
again.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.data_root import is_uri
from tasks.errors import first_line
from tasks.image_store import IMAGES, MANIFEST, ImageStore, StoreError, only_builder

log = logging.getLogger(__name__)

CACHE = "MAML_STORE_CACHE"
"""Environment variable: folder of the copies, by default ~/.cache/maml/stores."""


def writable_root(root: str) -> Path:
    """The folder for a store that is made at first use: `root`, or one of this node for a URI."""
    return _cache() / "made-here" if is_uri(root) else Path(root)


def local_root(root: str, name: str, command: str) -> Path:
    """The folder in which the store `name` of `root` can be opened; copies it there if necessary.

    Raises StoreError for a URI that cannot be read or holds no intact store of this name, and for a
    cache that cannot be written. The message names `command`, which builds the store.
    """
    if not is_uri(root):
        return Path(root)
    source = _Source(root, name, command)
    manifest = source.manifest()
    digest = hashlib.sha256(manifest).hexdigest()[:32]
    folder = _cache() / digest
    if _intact(folder, name, manifest):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_builder(folder / name):
            if not _intact(folder, name, manifest):
                _fetch(source, manifest, folder, name)
    except OSError as error:
        raise StoreError(
            f"cannot copy the image store {name} from {root} to {folder}: {error}\n"
            f"{CACHE} names another folder for copies"
        ) from error
    return folder


class _Source:
    """A store at a URI. Its methods raise StoreError, which says what to do."""

    def __init__(self, root: str, name: str, command: str):
        import pyarrow.fs

        self.root, self.name = root, name
        self._build = f"build it with: {command}\nand copy its folder to {root}"
        try:
            self._fs, path = pyarrow.fs.FileSystem.from_uri(root)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"data.root: {root} cannot be read: {first_line(error)}\n"
                "use a folder, or a URI such as file:///..., s3://BUCKET/..., gs://BUCKET/..."
            ) from error
        self._folder = f"{path.rstrip('/')}/{name}"

    def manifest(self) -> bytes:
        """The content of the manifest."""
        with self._reading(), self._fs.open_input_file(f"{self._folder}/{MANIFEST}") as file:
            return bytes(file.read())

    def copy_images(self, target: Path) -> None:
        """Copy the images to a file."""
        # Only reading is wrapped, so that an error of writing is not blamed on the source.
        with self._reading():
            stream = self._fs.open_input_stream(f"{self._folder}/{IMAGES}")
        with stream, target.open("wb") as file:
            while True:
                with self._reading():
                    block: Any = stream.read(1 << 23)
                if not block:
                    return
                file.write(block)

    def damaged(self, error: StoreError) -> StoreError:
        """The error for a copy that is damaged although it was just made."""
        return StoreError(
            f"the image store {self.name} at {self.root} is damaged: {first_line(error)}\n"
            f"{self._build}"
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of reading into StoreErrors."""
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no image store {self.name} at {self.root}\n{self._build}"
            ) from error
        except (OSError, ValueError) as error:
            raise StoreError(
                f"the image store {self.name} at {self.root} cannot be read: {first_line(error)}"
            ) from error


def _cache() -> Path:
    """The folder of this node's copies."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maml" / "stores"


def _intact(folder: Path, name: str, manifest: bytes) -> bool:
    """Whether there is a copy that matches the manifest byte for byte."""
    try:
        if (folder / name / MANIFEST).read_bytes() != manifest:
            return False
        ImageStore.open(folder, name, verify=True)
    except (OSError, StoreError):
        return False
    return True


def _fetch(source: _Source, manifest: bytes, folder: Path, name: str) -> None:
    """Copy a store, check it, then put it in place. Raises StoreError and OSError."""
    log.info("copying the image store %s from %s to %s", name, source.root, folder)
    scratch = folder / f".{name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    new = scratch / name
    new.mkdir(parents=True)
    try:
        source.copy_images(new / IMAGES)
        (new / MANIFEST).write_bytes(manifest)
        try:
            ImageStore.open(scratch, name, verify=True)
        except StoreError as error:
            raise source.damaged(error) from error
        if (folder / name).exists():
            (folder / name).replace(scratch / "old")  # processes that mapped it keep it
        new.replace(folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
