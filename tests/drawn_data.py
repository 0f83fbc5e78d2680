"""Image archives drawn here: as large as the real ones in classes, and tiny in pixels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tasks import omniglot


def draw_omniglot(folder: Path) -> None:
    """The two archives of Omniglot, with all its characters, 20 equal drawings of 7x7 of each."""
    names = sorted(omniglot._vinyals_split())
    for archive, (characters, _) in omniglot._ARCHIVES.items():
        held, names = names[:characters], names[characters:]
        with zipfile.ZipFile(folder / f"{archive}.zip", "w") as packed:
            for name in held:
                drawing = _png(_pattern(name, 7) > 0.5)
                for number in range(omniglot._DRAWINGS):
                    packed.writestr(f"{archive}/{name}/{number:02}.png", drawing)
    assert not names


def draw_photos(path: Path, classes: int = 40, images: int = 8) -> None:
    """An archive of colour images of 12x12, one folder per class."""
    with zipfile.ZipFile(path, "w") as packed:
        for number in range(classes):
            colours = _pattern(f"class {number}", 12, 12, 3)
            for image in range(images):
                noisy = 0.8 * colours + 0.2 * _pattern(f"{number} {image}", 12, 12, 3)
                packed.writestr(
                    f"class{number:02}/{image}.png", _png((255 * noisy).astype(np.uint8))
                )


def _pattern(name: str, *shape: int) -> np.ndarray:
    """Numbers from 0 to 1 that belong to a name."""
    return np.random.default_rng(list(name.encode())).random(shape if len(shape) > 1 else 2 * shape)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
