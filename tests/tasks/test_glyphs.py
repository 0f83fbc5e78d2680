"""Drawn characters: what they look like never changes, and they are neither easy nor hopeless."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.glyphs import Glyphs, draw, prepare_glyphs


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Glyphs:
    return Glyphs(data_root=str(tmp_path_factory.mktemp("glyphs")), num_classes=120, queries=5)


def test_glyphs_are_drawn_at_first_use(glyphs: Glyphs) -> None:
    batch = glyphs.sample(0, "train", np.arange(4))
    assert batch.support.x.shape == (4, 5, *glyphs.input_shape) == (4, 5, 1, 28, 28)
    assert glyphs.protocol()["classes"] == {"train": 78, "validation": 12, "test": 30}


def test_glyph_depends_on_its_number_alone() -> None:
    np.testing.assert_array_equal(draw(np.arange(40))[[7, 33]], draw(np.array([7, 33])))


def test_glyphs_never_change() -> None:
    """Published numbers were measured on these pixels; another script needs another store name."""
    pixels = draw(np.arange(50))
    assert pixels.shape == (50, 20, 28, 28, 1)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest == "02da68b103c872decfd36cc8d0db7234766ffceb251e6561b620c7bebd7cbc88"


def test_number_of_glyphs_moves_no_class_to_another_split(tmp_path: Path) -> None:
    fewer = prepare_glyphs(tmp_path, num_classes=20)
    more = prepare_glyphs(tmp_path, num_classes=50)
    assert fewer.classes == more.classes[:20]
    np.testing.assert_array_equal(fewer.images, more.images[: len(fewer.images)])
    assert (fewer.name, more.name) == ("glyphs-20", "glyphs-50")


def test_glyphs_are_recognisable_but_not_by_comparing_pixels(glyphs: Glyphs) -> None:
    """Nearest neighbours in pixel space do far better than chance (20 %), far worse than perfect;
    of Omniglot they recognise 45 %. More shots help, so drawings of a class have much in common."""

    def accuracy(shots: int) -> float:
        task = Glyphs(
            data_root=glyphs.data_root, num_classes=glyphs.num_classes, shots=shots, queries=5
        )
        batch = task.sample(0, "test", np.arange(200))
        nearest = torch.cdist(batch.query.x.flatten(2), batch.support.x.flatten(2)).argmin(-1)
        return (batch.support.y.gather(1, nearest) == batch.query.y).double().mean().item()

    assert 0.4 < accuracy(1) < 0.6
    assert 0.65 < accuracy(5) < 0.8


def test_glyphs_are_drawn_in_the_middle_of_paper(glyphs: Glyphs) -> None:
    images = glyphs.open_store().images
    ink = (images > 127).mean(axis=(1, 2, 3))
    assert 0.02 < ink.min() < ink.max() < 0.5
    assert images[:, 12:16, 12:16].mean() > 5 * images[:, :3].mean()
    assert glyphs.sample(0, "train", np.arange(9)).query.x.max() == 1.0


def test_glyphs_need_enough_classes_for_every_split() -> None:
    with pytest.raises(ValueError, match=r"^num_classes: must be at least 20, got 19"):
        Glyphs(num_classes=19)
