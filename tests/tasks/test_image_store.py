"""The image store: what is written is what is read, and nothing else passes for a store."""

import json
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks.image_store import ClassImages, ImageStore, StoreError, write_store

COMMAND = "maml data prepare something"
SPLITS = ("train", "train", "validation", "test")


def classes(value: int = 0, count: int = 3) -> Iterator[ClassImages]:
    rng = np.random.default_rng(value)
    for number, split in enumerate(SPLITS):
        images = rng.integers(0, 256, (count + number, 4, 5, 3), dtype=np.uint8)
        yield ClassImages(f"class {number}", split, images)


def write(root: Path, value: int = 0, **options: bool) -> ImageStore:
    return write_store(root, "things", classes(value), source="a test", command=COMMAND, **options)


def open_store(root: Path, **options: bool) -> ImageStore:
    return ImageStore.open(root, "things", command=COMMAND, **options)


def assert_holds(store: ImageStore, value: int) -> None:
    written = list(classes(value))
    assert [(each.name, each.split) for each in store.classes] == [each[:2] for each in written]
    for each, (_, _, images) in zip(store.classes, written, strict=True):
        np.testing.assert_array_equal(
            store.images[each.first : each.first + each.count], images, strict=True
        )


def test_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder")
    store = open_store(tmp_path / "new" / "folder", verify=True)
    assert_holds(store, 0)
    assert store.image_shape == (4, 5, 3)
    assert [each.name for each in store.split("train")] == ["class 0", "class 1"]
    assert store.summary()["classes"] == {"train": 2, "validation": 1, "test": 1}
    assert json.loads(json.dumps(store.summary())) == store.summary()


def test_images_are_a_read_only_view_of_the_mapped_file(tmp_path: Path) -> None:
    store = write(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        store.images[0, 0, 0, 0] = 1
    assert str(tmp_path / "things" / "images.arrow") in Path("/proc/self/maps").read_text()


def test_content_hash_follows_content_alone(tmp_path: Path) -> None:
    first, again, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", 1)
    assert first.content_hash == again.content_hash != other.content_hash


def test_missing_store_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"does not exist\nbuild it with: {COMMAND}"):
        open_store(tmp_path)


def test_store_without_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "things" / "manifest.json").unlink()
    with pytest.raises(StoreError, match=rf"incomplete[\s\S]*{COMMAND}"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["images.arrow", "manifest.json"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    write(tmp_path)
    path = tmp_path / "things" / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(StoreError, match=rf"things is damaged: .*\nbuild it again.*{COMMAND}"):
        open_store(tmp_path)


def test_missing_images_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "things" / "images.arrow").unlink()
    with pytest.raises(StoreError, match="damaged"):
        open_store(tmp_path)


def test_changed_pixel_is_found_by_verification(tmp_path: Path) -> None:
    images = write(tmp_path).images
    path = tmp_path / "things" / "images.arrow"
    data = bytearray(path.read_bytes())
    place = bytes(data).index(images[5].tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    open_store(tmp_path)
    with pytest.raises(StoreError, match="does not match the hash"):
        open_store(tmp_path, verify=True)


def test_no_damage_to_the_arrow_file_gets_past_verification(tmp_path: Path) -> None:
    """Structure or pixels: every flipped byte is either harmless padding or a StoreError."""
    expected = write(tmp_path).images.copy()
    path = tmp_path / "things" / "images.arrow"
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            np.testing.assert_array_equal(open_store(tmp_path, verify=True).images, expected)
        except StoreError:
            refused += 1
    assert refused > expected.size / 7 * 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format is 99"),
        ({"num_images": 7}, "class table"),
        ({"image_shape": [5, 4, 3]}, "shape of images"),
        ({"classes": []}, "class table"),
        ({"classes": None}, "damaged"),
        ({"file_size": 1}, "instead of 1"),
    ],
)
def test_wrong_manifest_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path)
    path = tmp_path / "things" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path)


def test_class_moved_to_another_split_is_found_by_verification(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "things" / "manifest.json"
    path.write_text(path.read_text().replace('"test"', '"train"'))
    with pytest.raises(StoreError, match="does not match the hash"):
        open_store(tmp_path, verify=True)


def test_root_that_is_a_file_is_an_error_naming_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.touch()
    with pytest.raises(StoreError, match=f"cannot write the image store {root}/things"):
        write(root)
    with pytest.raises(StoreError, match="does not exist"):
        open_store(root)


@pytest.mark.parametrize("room", [300, 1200])  # while gathering pixels, while writing Arrow
def test_full_disk_is_an_error_and_leaves_the_store_as_it_was(tmp_path: Path, room: int) -> None:
    """A limit on the size of files fails the write as a full disk would: in the middle of it."""
    write(tmp_path, value=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(StoreError, match="cannot write the image store") as raised:
            write(tmp_path, value=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "things") in str(raised.value)
    assert_holds(open_store(tmp_path, verify=True), 1)
    assert not (tmp_path / ".things.partial").exists()


def test_failing_source_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    def failing() -> Iterator[ClassImages]:
        yield from list(classes(2))[:2]
        raise StoreError("the third class is unreadable")

    write(tmp_path, value=1)
    with pytest.raises(StoreError, match="third class"):
        write_store(tmp_path, "things", failing(), source="", command=COMMAND)
    assert_holds(open_store(tmp_path, verify=True), 1)
    assert not (tmp_path / ".things.partial").exists()


def test_readers_of_a_replaced_store_keep_what_they_mapped(tmp_path: Path) -> None:
    old = write(tmp_path, value=1)
    write(tmp_path, value=2)
    assert_holds(old, 1)
    assert_holds(open_store(tmp_path), 2)


def test_existing_store_can_be_kept(tmp_path: Path) -> None:
    write(tmp_path, value=1)
    assert_holds(write(tmp_path, value=2, replace=False), 1)


def test_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "archive.zip").write_text("precious")
    with pytest.raises(StoreError, match="holds something else"):
        write(tmp_path)
    assert (tmp_path / "things" / "archive.zip").read_text() == "precious"


@pytest.mark.parametrize("name", ["", "../things", "a/b", ".hidden", "a b"])
def test_names_that_are_no_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name an image store"):
        ImageStore.open(tmp_path, name)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 5, 3), np.float32), np.zeros((2, 5, 4, 3), np.uint8), np.zeros((2, 9), "u1")],
)
def test_images_of_another_kind_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    wrong = [next(classes()), ClassImages("wrong", "test", images)]
    with pytest.raises(ValueError, match="class wrong"):
        write_store(tmp_path, "things", wrong, source="", command=COMMAND)


BUILDER = """
    import sys, time, os
    import numpy as np
    from tasks.image_store import ClassImages, write_store
    root, death = sys.argv[1:]
    def classes():
        with open(os.path.join(root, "builders"), "a") as file:
            file.write("one\\n")
        for split in ("train", "validation", "test"):
            time.sleep(0.2)
            yield ClassImages(split, split, np.full((2, 3, 3, 1), 7, np.uint8))
            if death == "dies":
                os._exit(9)
    store = write_store(root, "things", classes(), source="", command="", replace=False)
    assert (store.images == 7).all() and len(store.classes) == 3
"""


def builder(root: Path, death: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(BUILDER), str(root), death])


def test_concurrent_builders_build_once_and_a_killed_one_is_no_obstacle(tmp_path: Path) -> None:
    assert builder(tmp_path, "dies").wait() == 9
    assert (tmp_path / ".things.partial").exists()
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path)
    (tmp_path / "builders").unlink()
    assert [each.wait() for each in [builder(tmp_path, "lives") for _ in range(2)]] == [0, 0]
    assert (tmp_path / "builders").read_text() == "one\n"
    assert not (tmp_path / ".things.partial").exists()


def test_only_the_store_needs_pyarrow_and_only_preparation_needs_pillow() -> None:
    script = """
        import sys, numpy as np
        sys.modules.update({"pyarrow": None, "PIL": None})
        import tasks.download, tasks.glyphs, tasks.image_files, tasks.image_folder, tasks.omniglot
        from tasks.sinusoid import Sinusoid
        Sinusoid().sample(0, "train", np.arange(3))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
