"""Omniglot: from the archives to tasks, or a refusal that says what is wrong with them."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import omniglot
from tasks.image_store import StoreError
from tasks.omniglot import Omniglot, prepare_omniglot
from tests.helpers import zipped
from tests.places import REAL_DATA

real_omniglot = pytest.mark.skipif(
    not (REAL_DATA / "omniglot").is_dir(),
    reason=f"no Omniglot archives in {REAL_DATA} (MAML_TEST_DATA)",
)


def drawing(shade: int) -> bytes:
    """A 105x105 1-bit drawing: black ink in the top rows, the more the greater `shade`."""
    paper = np.full((105, 105), 255, np.uint8)
    paper[: 10 * shade] = 0
    file = io.BytesIO()
    Image.fromarray(paper).convert("1").save(file, "PNG")
    return file.getvalue()


def characters(names: list[str], drawings: int = 20) -> dict[str, bytes]:
    return {
        f"{name}/{number:02}.png": drawing(shade + 1)
        for shade, name in enumerate(names)
        for number in range(drawings)
    }


BACKGROUND = ["A/character01", "A/character02"]
EVALUATION = ["B/character01"]


@pytest.fixture
def small_omniglot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Omniglot as it would be with three characters, and its archives."""
    archives = {}
    for name, held in (("images_background", BACKGROUND), ("images_evaluation", EVALUATION)):
        files = {f"{name}/{path}": data for path, data in characters(held).items()}
        path = zipped(tmp_path / "archives" / f"{name}.zip", files)
        archives[name] = (len(held), hashlib.md5(path.read_bytes()).hexdigest())
    splits = dict(zip([*BACKGROUND, *EVALUATION], ["train", "test", "validation"], strict=True))
    monkeypatch.setattr(omniglot, "_ARCHIVES", archives)
    monkeypatch.setattr(omniglot, "_vinyals_split", lambda: splits)
    return tmp_path / "archives"


@pytest.mark.parametrize(("size", "name"), [(28, "omniglot"), (14, "omniglot-14")])
def test_omniglot_from_archives(small_omniglot: Path, tmp_path: Path, size: int, name: str) -> None:
    store = prepare_omniglot(small_omniglot, tmp_path / "data", image_size=size)
    assert store.name == name
    assert store.images.shape == (60, size, size, 1)
    assert [(each.name, each.split, each.count) for each in store.classes] == [
        ("A/character01", "train", 20),
        ("A/character02", "test", 20),
        ("B/character01", "validation", 20),
    ]
    # Ink is 255, at the top, and the edge is smooth.
    first = store.images[0, :, 0, 0].tolist()
    assert first[0] > 240
    assert first[-1] == 0
    assert any(0 < value < 255 for value in first)
    task = Omniglot(data_root=str(tmp_path / "data"), image_size=size)
    assert task.input_shape == (1, size, size)


def test_omniglot_from_unpacked_archives(small_omniglot: Path, tmp_path: Path) -> None:
    for archive in small_omniglot.iterdir():
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(tmp_path / "unpacked")
    zips = prepare_omniglot(small_omniglot, tmp_path / "a")
    folders = prepare_omniglot(tmp_path / "unpacked", tmp_path / "b")
    assert zips.content_hash == folders.content_hash


def test_omniglot_from_the_web(
    small_omniglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(omniglot, "_URL", small_omniglot.as_uri())
    seen: list[str] = []
    store = prepare_omniglot(
        None, tmp_path / "data", on_progress=lambda *each: seen.append(each[0])
    )
    assert len(store.classes) == 3
    assert set(seen) == {"images_background.zip", "images_evaluation.zip", "reading characters"}
    small_omniglot.rename(tmp_path / "gone")
    prepare_omniglot(None, tmp_path / "data", image_size=14)  # the downloads were kept


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (characters(BACKGROUND[:1]), "2 characters of 20 drawings, it holds 1 characters of 20"),
        (characters(BACKGROUND, 19), "2 characters of 20 drawings, it holds 2 characters of 19"),
        (characters([*BACKGROUND, "A/character03"]), "it holds 3 characters"),
        ({}, "it holds no images"),
        (characters(["A/character01", "X/character01"]), "it has no character A/character02"),
        (characters(BACKGROUND) | {"A/character01/03.png": b"?"}, "03.png is not a readable image"),
    ],
)
def test_omniglot_with_other_content_is_refused(
    small_omniglot: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    zipped(small_omniglot / "images_background.zip", files)
    with pytest.raises(StoreError, match=message):
        prepare_omniglot(small_omniglot, tmp_path / "data")
    assert not (tmp_path / "data" / "omniglot").exists()


def test_omniglot_without_one_archive_is_refused(small_omniglot: Path, tmp_path: Path) -> None:
    (small_omniglot / "images_evaluation.zip").unlink()
    with pytest.raises(StoreError, match=r"has no images_evaluation.zip"):
        prepare_omniglot(small_omniglot, tmp_path / "data")


def test_omniglot_with_a_truncated_archive_is_refused(small_omniglot: Path, tmp_path: Path) -> None:
    path = small_omniglot / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"images_evaluation.zip is damaged"):
        prepare_omniglot(small_omniglot, tmp_path / "data")


def test_omniglot_splits_have_the_published_sizes() -> None:
    vinyals, paper = omniglot._vinyals_split(), omniglot._paper_split()
    for split, sizes in ((vinyals, (1028, 172, 423)), (paper, (1100, 100, 423))):
        names = [[n for n in split if split[n] == each] for each in ("train", "validation", "test")]
        assert tuple(map(len, names)) == sizes
    assert paper.keys() == vinyals.keys()
    # Fixed for ever, like the published one.
    tests = sorted(name for name, split in paper.items() if split == "test")
    assert hashlib.md5("\n".join(tests).encode()).hexdigest() == "cbb186c25e1f882825fde6c69903d3cd"


@real_omniglot
def test_vinyals_split_is_that_of_the_lists() -> None:
    for file, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        lines = (REAL_DATA / "omniglot" / "splits" / f"vinyals_{file}.txt").read_text().split()
        listed = {line.rpartition("/")[0] for line in lines}
        assert {n for n, each in omniglot._vinyals_split().items() if each == split} == listed


@real_omniglot
def test_all_of_omniglot(tmp_path: Path) -> None:
    store = prepare_omniglot(REAL_DATA / "omniglot", tmp_path)
    assert store.images.shape == (32460, 28, 28, 1)
    assert store.summary()["classes"] == {"train": 1028, "validation": 172, "test": 423}
    assert 0.05 < store.images.mean() / 255 < 0.15  # ink is bright, and rare
    for split in ("vinyals", "paper"):
        task = Omniglot(data_root=str(tmp_path), ways=20, split=split)
        sizes = task.protocol()["classes"]
        assert (
            sizes
            == {
                "vinyals": {"train": 1028, "validation": 172, "test": 423},
                "paper": {"train": 1100, "validation": 100, "test": 423},
            }[split]
        )
        assert task.sample(0, "validation", np.arange(2)).support.x.shape == (2, 20, 1, 28, 28)
