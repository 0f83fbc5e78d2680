"""Characters drawn by a program: classification tasks that need no download.

A class is a character of an invented script: a few pen strokes, each a quadratic Bezier curve
between points of a coarse grid, often starting on the stroke before it. A drawing of the character
moves every control point a little, shears, turns and scales the whole, and has its own pen width.

The number of the class and the number of the drawing determine every pixel. Only operations that
IEEE arithmetic rounds correctly are used (no sines, no logarithms, no matrix products), so that
every machine draws the same pixels.

Shapes: C classes, V = 20 drawings of each, S strokes, P points along a stroke.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tasks.base import at_least
from tasks.few_shot import FewShot
from tasks.image_store import (
    ClassImages,
    ImageStore,
    Progress,
    UInt8,
    no_progress,
    store_exists,
    write_store,
)
from tasks.random import UInt64, bits, stream_keys, uniform
from tasks.store_cache import writable_root

Floats = npt.NDArray[np.float64]

NUM_CLASSES = 1200
_SIZE, _DRAWINGS, _STROKES, _POINTS = 28, 20, 5, 32
_BATCH = 32  # classes whose strokes are computed at once
_PIXELS = np.arange(_SIZE, dtype=np.float32)[:, None]

# How far a drawing strays from a control point (in units of the grid), the width of a character and
# the range of the pen's radius (in pixels).
_TREMBLE, _EXTENT, _PEN_RADIUS = 0.16, 19.0, (0.6, 1.1)

# Random streams of a class, then of a drawing. Another version would draw another script.
_VERSION = 1
_ORIGIN, _JOIN, _END, _BEND, _COUNT, _DRAWING = range(6)
_HAND, _AFFINE, _SHIFT, _PEN = range(4)


@dataclass(frozen=True, kw_only=True)
class Glyphs(FewShot):
    """Drawn characters as few-shot classes; ink is 1.

    The store is drawn at first use, once for all processes: under `data_root`, or on the node
    itself if that is a URI. Of every 20 classes in a row, 13 are for training, 2 for validation and
    5 for test, whatever `num_classes` is.
    """

    num_classes: int = NUM_CLASSES

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_classes", self.num_classes, 20)

    def store_name(self) -> str:
        return store_name(self.num_classes)

    def prepare_command(self) -> str:
        return _prepare_command(self.num_classes)

    def store_root(self) -> str:
        return str(writable_root(self.data_root))

    def open_store(self) -> ImageStore:
        if not store_exists(self.store_root(), self.store_name()):
            prepare_glyphs(Path(self.store_root()), num_classes=self.num_classes, replace=False)
        return super().open_store()


def prepare_glyphs(
    data_root: Path,
    *,
    num_classes: int = NUM_CLASSES,
    replace: bool = True,
    on_progress: Progress = no_progress,
) -> ImageStore:
    """Draw the store `glyphs` (`glyphs-N` for another number of classes than 1200).

    With `replace=False` a store that exists is kept. Raises StoreError.
    """

    def classes() -> Iterator[ClassImages]:
        for first in range(0, num_classes, _BATCH):
            on_progress("drawing characters", first, num_classes)
            numbers = np.arange(first, min(first + _BATCH, num_classes))
            for number, images in zip(numbers.tolist(), draw(numbers), strict=True):
                yield ClassImages(f"glyph-{number:05}", _split(number), images)
        on_progress("drawing characters", num_classes, num_classes)

    return write_store(
        data_root,
        store_name(num_classes),
        classes(),
        source="drawn by tasks.glyphs",
        command=_prepare_command(num_classes),
        replace=replace,
    )


def draw(numbers: npt.NDArray[np.int64]) -> UInt8:
    """All drawings of the classes with these numbers, uint8 [C, 20, 28, 28, 1], ink 255."""
    classes = stream_keys(numbers.astype(np.uint64), _VERSION)
    drawings = bits(classes, _DRAWING, _DRAWINGS)
    strokes = _by_hand(_characters(classes), drawings)
    # Two to five strokes. Missing ones repeat the first stroke, so that arrays have one shape.
    counts = 2 + (uniform(classes, _COUNT, 1) > np.array([0.3, 0.7, 0.9])).sum(axis=1)
    present = (np.arange(_STROKES) < counts[:, None])[:, None, :, None, None]
    strokes = np.where(present, strokes, strokes[:, :, :1])
    points = _curves(_placed(strokes, drawings))
    radii = uniform(drawings, _PEN, 1, *_PEN_RADIUS)
    return np.stack(
        [
            _ink(where[:, : count * _POINTS], radius)
            for where, count, radius in zip(points, counts, radii, strict=True)
        ]
    )


def store_name(num_classes: int) -> str:
    """The name of the store with so many characters."""
    return "glyphs" if num_classes == NUM_CLASSES else f"glyphs-{num_classes}"


def _prepare_command(num_classes: int) -> str:
    classes = "" if num_classes == NUM_CLASSES else f" --classes {num_classes}"
    return f"maml data prepare glyphs{classes}"


def _split(number: int) -> str:
    """The split of a class."""
    place = number % 20
    return "train" if place < 13 else "validation" if place < 15 else "test"


def _characters(keys: UInt64) -> Floats:
    """Control points of five strokes for every class, [C, S, 3, 2], near the square [-1, 1]²."""
    num_classes = len(keys)
    origins = _grid_points(uniform(keys, _ORIGIN, 2 * _STROKES).reshape(num_classes, _STROKES, 2))
    ends = _grid_points(uniform(keys, _END, 6 * _STROKES).reshape(num_classes, _STROKES, 3, 2))
    joins = uniform(keys, _JOIN, _STROKES)[..., None]
    side, depth = np.split(uniform(keys, _BEND, 2 * _STROKES)[..., None], 2, axis=1)
    # Half of the strokes are straight, the others arcs to either side.
    bend = np.where(side < 0.5, 0.0, np.where(side < 0.75, 1.0, -1.0)) * (0.5 + depth)
    strokes = np.empty((num_classes, _STROKES, 3, 2))
    for s in range(_STROKES):
        start, score = origins[:, s], np.zeros((num_classes, 3))
        if s:
            # A stroke starts at the end (35 %) or the middle (25 %) of the stroke before, or
            # anywhere. Its end is chosen of three, preferring those away from that stroke's line.
            a, b, c = (strokes[:, s - 1, i] for i in range(3))
            join = joins[:, s]
            start = np.where(join < 0.35, c, np.where(join < 0.6, (a + 2 * b + c) / 4, start))
            (x, y), (u, v) = np.moveaxis(ends[:, s] - a[:, None], -1, 0), (c - a).T[..., None]
            score = np.abs(x * v - y * u)
        offset = ends[:, s] - start[:, None]
        score = score + 0.25 * (offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1])
        end = np.take_along_axis(ends[:, s], score.argmax(1)[:, None, None], axis=1)[:, 0]
        across = (end - start)[:, ::-1] * np.array([-0.5, 0.5])
        strokes[:, s] = np.stack([start, (start + end) / 2 + bend[:, s] * across, end], axis=1)
    return strokes


def _grid_points(unit: Floats) -> Floats:
    """Turn uniform numbers [..., 2] into points of a grid on [-1, 1]², 3 across and 4 down."""
    cells = np.floor(unit * np.array([3.0, 4.0]))
    points: Floats = cells * np.array([0.8, 2 / 3]) - np.array([0.8, 1.0])
    return points


def _by_hand(strokes: Floats, keys: UInt64) -> Floats:
    """Add the tremble of each drawing: strokes [C, S, 3, 2], keys [C, V] -> [C, V, S, 3, 2]."""
    shape = (*keys.shape, 2, _STROKES, 3, 2)
    noise = uniform(keys, _HAND, 2 * _STROKES * 6, -_TREMBLE, _TREMBLE).reshape(shape)
    # The sum of two uniform numbers resembles a normal one and needs no logarithm.
    return strokes[:, None] + noise[:, :, 0] + noise[:, :, 1]


def _placed(strokes: Floats, keys: UInt64) -> Floats:
    """Strokes in pixels, [C, V, S, 3, 2]: fitted into the image, then sheared and shifted."""
    across = _curves(strokes)
    low, high = across.min(axis=2), across.max(axis=2)  # [C, V, 2]
    size = (high - low).max(axis=-1)[..., None]
    centred = (strokes - ((low + high) / 2)[:, :, None, None]) / size[:, :, None, None]
    # About the identity: x' = p·x + q·y, y' = r·x + s·y.
    p, q, r, s = np.moveaxis(uniform(keys, _AFFINE, 4, -0.25, 0.25), -1, 0)[..., None, None]
    x, y = centred[..., 0], centred[..., 1]
    turned = np.stack([x + p * x + q * y, y + r * x + s * y], axis=-1)
    shift = uniform(keys, _SHIFT, 2, -2.0, 2.0)[:, :, None, None]
    return turned * _EXTENT + (_SIZE - 1) / 2 + shift


def _curves(strokes: Floats) -> Floats:
    """Points along quadratic Bezier curves: [..., S, 3, 2] -> [..., S·P, 2]."""
    t = (np.arange(_POINTS) / (_POINTS - 1))[:, None]
    a, b, c = (strokes[..., i, None, :] for i in range(3))
    points: Floats = (1 - t) * (1 - t) * a + 2 * t * (1 - t) * b + t * t * c
    return points.reshape(*points.shape[:-3], -1, 2)


def _ink(points: Floats, radius: Floats) -> UInt8:
    """Images [V, 28, 28, 1] that a pen of this radius [V, 1] draws at the points [V, n, 2]."""
    # The axis of the drawings is last, because numpy is fastest along a long last axis.
    x, y = points.astype(np.float32).transpose(2, 1, 0)[:, :, None] - _PIXELS  # [n, 28, V] each
    x, y = x * x, y * y
    nearest = np.full((_SIZE, _SIZE, len(points)), np.inf, dtype=np.float32)
    there = np.empty_like(nearest)
    for across, down in zip(x, y, strict=True):
        np.add(down[:, None], across, out=there)
        np.minimum(nearest, there, out=nearest)
    # A pixel's darkness is the share that the pen covers, taking its rim for a straight line.
    cover = np.clip(radius[:, 0].astype(np.float32) + 0.5 - np.sqrt(nearest), 0.0, 1.0)
    images: UInt8 = (cover * 255.0 + 0.5).astype(np.uint8)
    return np.moveaxis(images, -1, 0)[..., None]
