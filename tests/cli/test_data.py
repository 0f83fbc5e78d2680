"""What `maml data prepare` says: where the store is, what became of one before it, what is next."""

from __future__ import annotations

from pathlib import Path

from tests.commands import maml
from tests.drawn_data import draw_photos


def prepared(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The last two lines that a preparation prints."""
    done = maml("data", "prepare", *arguments, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


def test_images(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos.zip", classes=10, images=2)
    given = ("images", "--source", "photos.zip", "--name", "photos")
    place = f"store        {tmp_path / 'data' / 'photos'}"
    then = "next         maml train image-folder task.store=photos"
    assert prepared(tmp_path, *given, "--split", "6/2/2") == [place, then]
    again = prepared(tmp_path, *given, "--split", "0.6/0.2/0.2")
    assert again == [f"{place} (unchanged: the same images and classes)", then]
    other = prepared(tmp_path, *given, "--split", "5/2/3")
    assert other == [f"{place} (replaced: it held other images or classes)", then]
    (tmp_path / "data" / "photos" / "images.arrow").write_bytes(b"")
    assert "(replaced: " in prepared(tmp_path, *given, "--split", "5/2/3")[0], "a damaged one"


def test_another_root_is_named_where_it_is_not_the_usual_one(tmp_path: Path) -> None:
    given = ("glyphs", "--classes", "20", "--root", "my stores")
    place = f"store        {tmp_path / 'my stores' / 'glyphs-20'}"
    then = "next         maml train glyphs task.num_classes=20"
    assert prepared(tmp_path, *given) == [place, f"{then} 'data.root=my stores'"]
    usual = prepared(tmp_path, *given, MAML_DATA_ROOT="my stores")
    assert usual == [f"{place} (unchanged: the same images and classes)", then]
