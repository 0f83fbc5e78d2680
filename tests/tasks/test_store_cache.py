"""Image stores by URI: fetched once per node, verified, fetched again when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import ConfigError, from_dict
from pipeline.config.settings import Data
from tasks.data_root import DATA_ROOT, absolute_root
from tasks.glyphs import Glyphs
from tasks.image_folder import ImageFolder
from tasks.image_store import StoreError
from tasks.store_cache import CACHE, local_root
from tests.commands import maml
from tests.helpers import write_tiny
from tests.places import ROOT

OPEN = """
import logging, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from tasks.image_folder import ImageFolder
Path(sys.argv[2]).touch()
while not Path("go").exists():
    time.sleep(0.001)
print(ImageFolder(data_root=sys.argv[1], store="tiny", ways=2, queries=1).open_store().content_hash)
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind the URI, with a store in it, and a cache of our own."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    write_tiny(tmp_path / "shared", seed=0)
    return tmp_path / "shared"


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/tiny/images.arrow"))


def opened(root: Path, **options: int) -> ImageFolder:
    """A task over the store at the folder's URI; new settings, so that nothing is remembered."""
    return ImageFolder(data_root=root.as_uri(), store="tiny", ways=2, **options)


def fetch(root: Path) -> Path:
    return local_root(root.as_uri(), "tiny", "make it")


def test_a_path_is_opened_where_it_is(shared: Path, tmp_path: Path) -> None:
    assert local_root(str(shared), "tiny", "make it") == shared
    assert not (tmp_path / "cache").exists()


def test_tasks_are_those_of_the_store_itself(shared: Path, tmp_path: Path) -> None:
    there = ImageFolder(data_root=str(shared), store="tiny", ways=2, queries=2)
    here = opened(shared, queries=2)
    for split in ("train", "validation", "test"):
        here.check(split)
    batches = [task.sample(0, "train", np.arange(5)) for task in (there, here)]
    assert batches[0].query.x.equal(batches[1].query.x)
    assert there.protocol() == here.protocol()
    assert len(copies(tmp_path / "cache")) == 1


def test_processes_at_once_fetch_it_once(shared: Path, tmp_path: Path) -> None:
    """Four of a node, let go together: one copies, all read the same."""
    write_tiny(shared, seed=1, size=400)  # 9 MB: long enough to be in each other's way
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, shared.as_uri(), f"ready-{number}"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in range(4)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert sum(output.count("copying the image store tiny") for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert len(copies(tmp_path / "cache")) == 1


@pytest.mark.parametrize("damage", ["pixels", "shorter", "manifest", "gone"])
def test_a_damaged_copy_is_fetched_again(damage: str, shared: Path, tmp_path: Path) -> None:
    fetch(shared)
    (copy,) = copies(tmp_path / "cache")
    good = copy.read_bytes()
    if damage == "pixels":
        copy.write_bytes(good[: len(good) // 2] + b"\x00\xff" + good[len(good) // 2 + 2 :])
    elif damage == "shorter":
        copy.write_bytes(good[:-1])
    elif damage == "manifest":
        (copy.parent / "manifest.json").write_text("{}")
    else:
        copy.unlink()
    fetch(shared)
    assert copy.read_bytes() == good


def test_an_intact_copy_is_kept(shared: Path, tmp_path: Path) -> None:
    fetch(shared)
    (copy,) = copies(tmp_path / "cache")
    before = copy.stat().st_ino
    fetch(shared)
    assert copy.stat().st_ino == before


def test_a_store_that_was_built_anew_is_another_copy(shared: Path, tmp_path: Path) -> None:
    first = fetch(shared)
    fresh = write_tiny(shared, seed=2)
    second = fetch(shared)
    assert first != second
    assert len(copies(tmp_path / "cache")) == 2
    task = ImageFolder(data_root=str(second), store="tiny", ways=2)
    assert task.open_store().content_hash == fresh


def test_damage_at_the_source_is_named_and_leaves_nothing(shared: Path, tmp_path: Path) -> None:
    images = shared / "tiny" / "images.arrow"
    content = bytearray(images.read_bytes())
    content[len(content) // 2] ^= 255
    images.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged") as caught:
        fetch(shared)
    assert shared.as_uri() in str(caught.value)
    assert copies(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("file:///nowhere/at/all", "there is no image store tiny at file:///nowhere/at/all"),
        ("gopher://somewhere/else", "use a folder, or a URI such as"),
        ("s3://", "cannot be read"),
    ],
)
def test_a_uri_without_the_store_is_one_clear_error(root: str, expected: str, shared: Path) -> None:
    with pytest.raises(StoreError, match=expected) as caught:
        local_root(root, "tiny", "make it")
    assert root in str(caught.value)


def test_a_cache_that_cannot_be_written_names_the_way_out(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(StoreError, match=CACHE):
        fetch(shared)


def test_glyphs_are_drawn_on_the_node_itself(shared: Path, tmp_path: Path) -> None:
    task = Glyphs(data_root=shared.as_uri(), num_classes=40, ways=2, queries=1)
    assert task.sample(0, "train", np.arange(2)).query.y.shape == (2, 2)
    assert [path.name for path in shared.iterdir() if path.is_dir()] == ["tiny"]
    assert list((tmp_path / "cache").glob("*/glyphs-40"))


def test_the_environment_gives_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One place decides; the configuration comes first."""
    monkeypatch.delenv(DATA_ROOT, raising=False)
    assert Data().root == "data"
    monkeypatch.setenv(DATA_ROOT, "s3://bucket/stores")
    assert Data().root == "s3://bucket/stores"
    assert Data(root="mine").root == "mine"
    assert absolute_root("s3://bucket/stores") == "s3://bucket/stores"
    monkeypatch.chdir(tmp_path)
    assert absolute_root("mine") == str(tmp_path / "mine")


def test_an_empty_root_is_refused(quick: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"data\.root"):
        from_dict({**quick, "data": {"root": ""}})


def test_stores_are_not_built_at_a_uri(tmp_path: Path) -> None:
    done = maml("data", "prepare", "glyphs", cwd=tmp_path, **{DATA_ROOT: "s3://bucket/stores"})
    assert done.returncode == 2
    assert "copy that to the URI" in done.stderr
    assert list(tmp_path.iterdir()) == []
