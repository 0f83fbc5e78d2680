"""Images of one folder per class, however they are packed: read right, or refused by name."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.image_folder import ImageFolder, prepare_images
from tasks.image_store import ImageStore, StoreError, fixed_order
from tests.helpers import zipped
from tests.places import REAL_DATA

real_grocery = pytest.mark.skipif(
    not (REAL_DATA / "grocery").is_dir(),
    reason=f"no grocery archive in {REAL_DATA} (MAML_TEST_DATA)",
)


def encoded(pixels: Any, mode: str | None = None, kind: str = "PNG") -> bytes:
    """An image file; `pixels` is an array or a colour for an image of 6x6 pixels."""
    image = (
        Image.fromarray(pixels)
        if isinstance(pixels, np.ndarray)
        else Image.new(mode or "RGB", (6, 6), pixels)
    )
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def tarred(path: Path, files: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def unpacked(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def colourful(prefix: str = "") -> dict[str, bytes]:
    """Four classes, each of two images of its own colour."""
    return {
        f"{prefix}{name}/{number}.{kind}": encoded(colour, kind=kind.upper())
        for name, colour in COLOURS.items()
        for number, kind in enumerate(("png", "bmp"))
    }


def as_zip(folder: Path, files: dict[str, bytes]) -> Path:
    return zipped(folder / "source.zip", files)


def as_tar(folder: Path, files: dict[str, bytes]) -> Path:
    return tarred(folder / "source.tar", files, "w")


def as_tar_gz(folder: Path, files: dict[str, bytes]) -> Path:
    return tarred(folder / "source.tar.gz", files, "w:gz")


def as_tar_xz(folder: Path, files: dict[str, bytes]) -> Path:
    return tarred(folder / "source.txz", files, "w:xz")


def as_folder(folder: Path, files: dict[str, bytes]) -> Path:
    return unpacked(folder / "source", files)


@pytest.mark.parametrize("pack", [as_zip, as_tar, as_tar_gz, as_tar_xz, as_folder])
@pytest.mark.parametrize("prefix", ["", "top/below/"])
def test_every_kind_of_source_gives_the_same_store(pack: Any, prefix: str, tmp_path: Path) -> None:
    noise = {
        f"{prefix}red/notes.txt": b"no image",
        f"{prefix}red/.hidden.png": b"no image",
        "__MACOSX/red/._0.png": b"no image",
        ".cache/0.png": b"no image",
    }
    source = pack(tmp_path, colourful(prefix) | noise)
    store = prepare_images(source, tmp_path / "data", "colours", split="2/1/1")
    assert store.image_shape == (6, 6, 3)
    assert [(each.name, each.count) for each in store.classes] == [
        (name, 2) for name in sorted(COLOURS)
    ]
    for each in store.classes:
        pixels = store.images[each.first : each.first + each.count].reshape(-1, 3)
        assert (pixels == COLOURS[each.name]).all()
    assert [len(store.split(split)) for split in ("train", "validation", "test")] == [2, 1, 1]
    task = ImageFolder(data_root=str(tmp_path / "data"), store="colours", ways=2, queries=1)
    assert task.sample(0, "train", np.arange(3)).support.x.shape == (3, 2, 3, 6, 6)


def prepare(folder: Path, files: dict[str, bytes], **options: Any) -> ImageStore:
    return prepare_images(as_zip(folder, files), folder / "data", "store", **options)


def test_split_by_numbers_is_fixed_by_the_names(tmp_path: Path) -> None:
    store = prepare(tmp_path, colourful(), split="1/2/1")
    cut = dict(
        zip(fixed_order(COLOURS), ["train", "validation", "validation", "test"], strict=True)
    )
    assert {each.name: each.split for each in store.classes} == cut
    # The order itself is for ever: a changed one would move test classes into training.
    assert fixed_order(COLOURS) == ["white", "blue", "red", "green"]


@pytest.mark.parametrize(
    ("split", "sizes"),
    [("0.5/0.25/0.25", [2, 1, 1]), ("0.64/0.16/0.2", [3, 0, 1]), (".5/.0/.5", [2, 0, 2])],
)
def test_split_by_fractions(tmp_path: Path, split: str, sizes: list[int]) -> None:
    store = prepare(tmp_path, colourful(), split=split)
    assert [len(store.split(each)) for each in ("train", "validation", "test")] == sizes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.json", json.dumps({"train": ["red", "blue"], "val": [], "test": ["white"]})),
        ("split.csv", "class,split\nred,train\nblue, train\n\nwhite,test\n"),
        ("split.txt", "white,test\nred,train\nblue,train\n"),
    ],
)
def test_split_by_file_leaves_out_what_it_does_not_name(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    store = prepare(tmp_path, colourful(), split=str(tmp_path / name))
    assert {each.name: each.split for each in store.classes} == {
        "red": "train",
        "blue": "train",
        "white": "test",
    }


def test_split_by_the_source_s_own_folders(tmp_path: Path) -> None:
    folders = {"red": "train", "green": "train", "blue": "Val", "white": "test"}
    files = {
        f"top/{folders[path.split('/')[0]]}/{path}": data for path, data in colourful().items()
    }
    store = prepare(tmp_path, files)
    assert {each.name: each.split for each in store.classes} == {
        name: split.lower().replace("val", "validation") for name, split in folders.items()
    }
    assert len(prepare(tmp_path, files, split="1/1/2").split("test")) == 2


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, "no train/val/test folders: give --split"),
        ("64/16/20", "adds up to 100, but there are 4 classes"),
        ("0.5/0.5/0.5", "fractions add up to 1.5 instead of 1"),
        ("2/2", "split 2/2: neither three numbers .* as in 64/16/20 or 0.64/0.16/0.2, nor a file"),
        ({"train": ["red", "pink"]}, "there is no class 'pink'"),
        ({"training": ["red"]}, "'training' is not one of train, validation, test"),
        ({"train": ["red"], "test": ["red"]}, "class 'red' is in two splits"),
        ({"train": []}, "it names no class"),
        (["red"], "neither JSON"),
        ("red;train", "neither JSON"),
    ],
)
def test_wrong_split_is_refused(tmp_path: Path, split: object, message: str) -> None:
    if isinstance(split, dict | list) or (isinstance(split, str) and ";" in split):
        path = tmp_path / ("split.csv" if isinstance(split, str) else "split.json")
        path.write_text(split if isinstance(split, str) else json.dumps(split))
        split = str(path)
    with pytest.raises(StoreError, match=message):
        prepare(tmp_path, colourful(), split=split)
    assert not (tmp_path / "data" / "store").exists()


def test_class_in_two_split_folders_is_refused(tmp_path: Path) -> None:
    files = colourful("train/") | colourful("test/")
    with pytest.raises(StoreError, match=r"class .* is in test and train"):
        prepare(tmp_path, files)
    assert prepare(tmp_path, files, split="2/1/1").classes[0].count == 4


def test_unequal_sizes_need_a_size(tmp_path: Path) -> None:
    files = colourful() | {"red/tall.png": encoded(np.full((9, 5, 3), 255, np.uint8))}
    with pytest.raises(StoreError, match=r"red/tall.png is 5x9 pixels, .* 6x6 pixels: give --size"):
        prepare(tmp_path, files, split="2/1/1")
    assert prepare(tmp_path, files, split="2/1/1", image_size=4).image_shape == (4, 4, 3)
    with pytest.raises(ValueError, match="image_size: must be at least 1, got 0"):
        prepare(tmp_path, files, split="2/1/1", image_size=0)


def test_grey_images_stay_grey_unless_one_has_colour(tmp_path: Path) -> None:
    grey = {f"{name}/0.png": encoded(100 + len(name), "L") for name in ("a", "bb", "ccc")}
    store = prepare(tmp_path, grey, split="1/1/1")
    assert store.image_shape == (6, 6, 1)
    assert store.images[:, 0, 0, 0].tolist() == [101, 102, 103]
    assert prepare(tmp_path, grey, split="1/1/1", grey=False).image_shape == (6, 6, 3)
    mixed = grey | {"ccc/1.png": encoded((255, 0, 0))}
    assert prepare(tmp_path, mixed, split="1/1/1").image_shape == (6, 6, 3)
    store = prepare(tmp_path, mixed, split="1/1/1", grey=True)
    assert store.images[-1, 0, 0].tolist() == [76]  # Rec. 601 luma of red


def test_transparent_parts_become_white_and_rotated_photos_upright(tmp_path: Path) -> None:
    clear = np.zeros((6, 6, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    photo = np.zeros((6, 6, 3), np.uint8)
    photo[0] = 255  # lit above; orientation 6 turns it clockwise, so it is lit on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG", exif=exif)
    files = {"a/clear.png": encoded(clear), "b/photo.png": file.getvalue()}
    images = prepare(tmp_path, files, split="1/1/0").images
    assert images[0, 0, 0].tolist() == [10, 20, 30]
    assert (images[0, 1:] == 255).all()
    assert images[1, :, :, 0].mean(axis=0).tolist() == [0, 0, 0, 0, 0, 255]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"red/0.png": b"not a png"}, "red/0.png is not a readable image"),
        ({"red/0.png": encoded("red")[:-40]}, "red/0.png is not a readable image"),
        ({"red/0.png": encoded(np.full((6, 6), 9, np.uint16))}, "red/0.png .* more than 8 bits"),
        ({"stray.png": encoded("red")}, "stray.png is in no class folder"),
    ],
)
def test_wrong_images_are_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        prepare(tmp_path, colourful() | files, split="2/1/1")
    assert not (tmp_path / "data" / "store").exists()


@pytest.mark.parametrize("files", [{}, {"a/notes.txt": b""}, {"../../outside/0.png": b"evil"}])
def test_source_without_images_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(StoreError, match="holds no images"):
        prepare(tmp_path, files, split="2/1/1")
    assert {each.name for each in tmp_path.rglob("*")} <= {"source.zip"}


@pytest.mark.parametrize("pack", [as_zip, as_tar, as_tar_gz, as_tar_xz])
@pytest.mark.parametrize("kept", [0.02, 0.6])
def test_truncated_archive_is_refused(tmp_path: Path, pack: Any, kept: float) -> None:
    path = pack(tmp_path, colourful())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(StoreError, match=r"source\.[a-z.]+ is damaged, or no zip or tar archive"):
        prepare_images(path, tmp_path / "data", "store", split="2/1/1")


def test_archive_damaged_inside_is_refused(tmp_path: Path) -> None:
    path = as_zip(tmp_path, colourful())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("green/1.bmp").header_offset + 60
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"source.zip is damaged at green/1.bmp: Bad CRC-32"):
        prepare_images(path, tmp_path / "data", "store", split="2/1/1")


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing.zip does not exist"):
        prepare_images(tmp_path / "nothing.zip", tmp_path, "store", split="2/1/1")


@real_grocery
def test_photos_of_groceries(tmp_path: Path) -> None:
    store = prepare_images(
        REAL_DATA / "grocery" / "grocery_32.zip", tmp_path, "grocery", split="0.64/0.16/0.2"
    )
    assert len(store.classes) == 81
    assert store.images.shape == (5421, 32, 32, 3)
    task = ImageFolder(data_root=str(tmp_path), store="grocery", rotations="per-task")
    assert task.sample(0, "test", np.arange(4)).query.x.shape == (4, 75, 3, 32, 32)
    with zipfile.ZipFile(REAL_DATA / "grocery" / "grocery_32.zip") as archive:
        kiwi = Image.open(io.BytesIO(archive.read("grocery/Kiwi/0002.png")))
        first = next(each.first for each in store.classes if each.name == "Kiwi")
        np.testing.assert_array_equal(store.images[first + 1], np.asarray(kiwi))
