"""N-way K-shot classification: draws tasks from the classes of an image store.

Shapes: B tasks, N ways, K shots, Q queries per class, images [C, H, W] with pixels in [0, 1].
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tasks.base import SPLITS, Classification, Examples, TaskBatch, as_tensor, at_least
from tasks.data_root import is_uri
from tasks.image_store import ImageClass, ImageStore, UInt8
from tasks.random import UInt64, bits, integers, task_keys, uniform
from tasks.store_cache import local_root

Int64 = npt.NDArray[np.int64]

_CLASSES, _TURNS, _IMAGES = range(3)  # random streams


class _Rows(NamedTuple):
    """The images of one split: class c has the rows [firsts[c], firsts[c] + counts[c])."""

    images: UInt8
    firsts: Int64
    counts: Int64


@dataclass(frozen=True, kw_only=True)
class FewShot(Classification):
    """A task is N different classes in random order, with K + Q different images of each.

    A class's label is its place in that order: drawn anew for every task, and the same in support
    and query set. `rotations`, by multiples of 90 degrees, apply to every split:
      none       images as they are;
      per-task   each class of a task is turned by its own random angle (Santoro et al. 2016, Finn
                 et al. 2017); all angles count as one class, which occurs once in a task;
      classes    each class becomes four classes, one per angle, and several of them may occur in
                 one task (Vinyals et al. 2016).

    Raises ValueError for settings that no store could satisfy; `check` compares with the store.
    """

    data_root: str = "data"
    ways: int = 5
    shots: int = 1
    queries: int = 15
    rotations: Literal["none", "per-task", "classes"] = "none"

    def __post_init__(self) -> None:
        at_least("ways", self.ways, 2)
        at_least("shots", self.shots, 1)
        at_least("queries", self.queries, 1)

    @abstractmethod
    def store_name(self) -> str:
        """The name of the image store under `data_root`."""

    @abstractmethod
    def prepare_command(self) -> str:
        """The command that builds the store, for messages."""

    def store_root(self) -> str:
        """The folder or URI of the image store."""
        return self.data_root

    def split_of(self, image_class: ImageClass) -> str:
        """The split that a class belongs to."""
        return image_class.split

    def open_store(self) -> ImageStore:
        """The store; a process opens it once. Raises StoreError."""
        return _store(self.store_root(), self.store_name(), self.prepare_command())

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]  # depends on the store
        height, width, channels = self.open_store().image_shape
        return (channels, height, width)

    @property
    def output_size(self) -> int:  # type: ignore[override]  # depends on a setting
        return self.ways

    def check(self, split: str) -> None:
        """Raise unless the store is intact and has enough classes and images for this split.

        Raises StoreError without a usable store, and a ValueError that begins with the setting's
        name where the split has too few classes, or a class too few images.
        """
        _rows(self, split)
        _verify(self.store_root(), self.store_name(), self.prepare_command())

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        """x float32 [B, N·n, C, H, W] and y int64 [B, N·n]; n is K for support and Q for query.

        Example j of a set belongs to the class with label j mod N. The support set does not depend
        on `queries`.
        """
        keys = task_keys(seed, split, indices)
        rows = _rows(self, split)
        classes, turns = self._draw_classes(keys, len(rows.firsts))
        picks = _different(
            bits(keys, _IMAGES, self.ways), rows.counts[classes], self.shots + self.queries
        )
        where = np.moveaxis(rows.firsts[classes][..., None] + picks, 1, 2)  # [B, K + Q, N]
        images = rows.images.take(where, axis=0)
        if turns is not None:
            _turn(images.swapaxes(1, 2), turns)
        return TaskBatch(
            support=self._examples(images[:, : self.shots]),
            query=self._examples(images[:, self.shots :]),
        )

    @property
    def pooled_size(self) -> int:
        """The number of training classes; four times as many with `rotations: classes`."""
        classes = sum(self.split_of(each) == "train" for each in self.open_store().classes)
        return classes * (4 if self.rotations == "classes" else 1)

    def pooled(self, seed: int, indices: npt.NDArray[np.int64]) -> Examples:
        """Images of all training classes, drawn at random: x float32 [n, C, H, W], y int64 [n].

        With `rotations: per-task` each is turned at random and keeps its label.
        """
        rows = _rows(self, "train")
        keys = task_keys(seed, "train", indices)
        classes = integers(keys, _CLASSES, 1, len(rows.firsts))[:, 0]
        which = (uniform(keys, _IMAGES, 1)[:, 0] * rows.counts[classes]).astype(np.int64)
        images = rows.images.take(rows.firsts[classes] + which, axis=0)
        labels = classes
        if self.rotations != "none":
            turns = integers(keys, _TURNS, 1, 4)[:, 0]
            _turn(images, turns)
            if self.rotations == "classes":
                labels = 4 * classes + turns
        x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32)
        return Examples(x.contiguous().div_(255.0), as_tensor(labels))

    def protocol(self) -> dict[str, Any]:
        store = self.open_store()
        splits = [self.split_of(each) for each in store.classes]
        return {
            "dataset": store.name,
            "content_hash": store.content_hash,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "rotations": self.rotations,
            "classes": {split: splits.count(split) for split in SPLITS},
        }

    def _draw_classes(self, keys: UInt64, available: int) -> tuple[Int64, Int64 | None]:
        """The classes of every task and their quarter turns, both [B, N]; None: no turns."""
        angles = 4 if self.rotations == "classes" else 1
        drawn = _different(keys, np.full(len(keys), available * angles), self.ways, _CLASSES)
        if self.rotations == "classes":
            return drawn // 4, drawn % 4
        if self.rotations == "per-task":
            return drawn, integers(keys, _TURNS, self.ways, 4)
        return drawn, None

    def _examples(self, images: UInt8) -> Examples:
        """Inputs and labels from images [B, n, N, H, W, C]."""
        num_tasks, count, ways, *shape = images.shape
        flat = torch.from_numpy(images.reshape(num_tasks, count * ways, *shape))
        x = flat.permute(0, 1, 4, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        labels = np.tile(np.arange(ways), (num_tasks, count))
        return Examples(x.div_(255.0), as_tensor(labels))


def _turn(images: UInt8, turns: Int64) -> None:
    """Turn images [*S, ..., H, W, C] in place by the quarter turns [*S]."""
    for turn in (1, 2, 3):
        which = turns == turn
        images[which] = np.rot90(images[which], turn, axes=(-3, -2))


def _different(keys: UInt64, populations: Int64, count: int, stream: int = 0) -> Int64:
    """`count` different integers of [0, population) in random order: [...] -> [..., count].

    Each draw is a rank among the values that the earlier draws left, which is then turned into the
    value. Unlike `random.choose`, the work does not depend on the population, and every entry may
    have a population of its own.
    """
    ranks = uniform(keys, stream, count) * (populations[..., None] - np.arange(count))
    drawn = ranks.astype(np.int64)
    for i in range(1, count):
        # The value of rank r is r + s, where s earlier values lie below it: those whose own rank
        # among the values left, p_(k) - k in ascending order, is at most r.
        taken = np.sort(drawn[..., :i], axis=-1) - np.arange(i)
        drawn[..., i] += (taken <= drawn[..., i, None]).sum(axis=-1)
    return drawn


@lru_cache(maxsize=16)
def _store(root: str, name: str, command: str) -> ImageStore:
    """Open a store, once per process; copy it first if its root is a URI."""
    return ImageStore.open(local_root(root, name, command), name, command=command)


@lru_cache(maxsize=16)
def _verify(root: str, name: str, command: str) -> None:
    """Check every byte of a store, once per process. Raises StoreError."""
    if not is_uri(root):  # `local_root` has checked a copy
        ImageStore.open(root, name, command=command, verify=True)


@lru_cache(maxsize=64)
def _rows(task: FewShot, split: str) -> _Rows:
    """The classes of a split. Raises ValueError if they do not suffice for the task's settings."""
    store = task.open_store()
    height, width, _ = store.image_shape
    if task.rotations != "none" and height != width:
        raise ValueError(
            f"rotations: images of {height}x{width} pixels cannot be turned by 90 degrees"
        )
    classes = [each for each in store.classes if task.split_of(each) == split]
    available = len(classes) * (4 if task.rotations == "classes" else 1)
    if task.ways > available:
        raise ValueError(
            f"ways: {task.ways} ways need as many classes, the {split} split of "
            f"{store.name} has {available}"
        )
    smallest = min(classes, key=lambda each: each.count)
    if task.shots + task.queries > smallest.count:
        raise ValueError(
            f"shots: {task.shots} shots and {task.queries} queries need "
            f"{task.shots + task.queries} images of a class, {smallest.name} in the {split} split "
            f"of {store.name} has {smallest.count}"
        )
    return _Rows(
        images=store.images,
        firsts=np.array([each.first for each in classes]),
        counts=np.array([each.count for each in classes]),
    )
