"""Few-shot tasks over image stores: pure, disjoint, agreeing, and unbiased.

Most tests draw from a store whose images say what they are: one lit pixel in the top left corner
holds the class, its neighbour the drawing, so that class, drawing and quarter turn of every image
of a task can be read off its pixels.
"""

import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.base import SPLITS, Examples, TaskBatch
from tasks.few_shot import FewShot, _different
from tasks.image_folder import ImageFolder
from tasks.image_store import ClassImages, StoreError, write_store
from tasks.omniglot import Omniglot
from tasks.random import task_keys

SPLIT_OF = ["train"] * 9 + ["validation"] * 5 + ["test"] * 6
SMALLEST = 6  # images of the smallest class


def images_of(number: int, channels: int) -> np.ndarray:
    """Class `number`, [6 to 8 drawings, 5, 5, channels]."""
    images = np.zeros((SMALLEST + number % 3, 5, 5, channels), np.uint8)
    images[:, 0, 0, 0] = number + 1
    images[:, 0, 1, -1] = 100 + np.arange(len(images))
    return images


def write(root: Path, name: str, channels: int = 1) -> None:
    coded = (
        ClassImages(f"class {number}", split, images_of(number, channels))
        for number, split in enumerate(SPLIT_OF)
    )
    write_store(root, name, coded, source="a test", command="")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder, "grey")
    write(folder, "colour", channels=3)
    return folder


class Decoded(NamedTuple):
    """What the images of one set of one task are, [n] each."""

    classes: np.ndarray
    drawings: np.ndarray
    turns: np.ndarray
    labels: np.ndarray


def decode(examples: Examples, task: int) -> Decoded:
    assert examples.x.dtype == torch.float32
    assert examples.y.dtype == torch.int64
    pixels = np.rint(examples.x[task].numpy() * 255).astype(int)
    # A corner never leaves the corners: clockwise from the top left, turns by 90° counter-clockwise
    # take it to the bottom left, bottom right, top right.
    corners = np.stack(
        [pixels[:, 0, 0, 0], pixels[:, 0, -1, 0], pixels[:, 0, -1, -1], pixels[:, 0, 0, -1]]
    )
    neighbours = np.stack(
        [pixels[:, -1, 0, 1], pixels[:, -1, -2, 0], pixels[:, -1, -1, -2], pixels[:, -1, 1, -1]]
    )
    turns = (neighbours >= 100).argmax(0)
    pick = (turns, np.arange(len(turns)))
    return Decoded(corners[pick] - 1, neighbours[pick] - 100, turns, examples.y[task].numpy())


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, object]:
    shots = draw(st.integers(1, SMALLEST - 1))
    return {
        "store": draw(st.sampled_from(["grey", "colour"])),
        "ways": draw(st.integers(2, 5)),
        "shots": shots,
        "queries": draw(st.integers(1, SMALLEST - shots)),
        "rotations": draw(st.sampled_from(["none", "per-task", "classes"])),
    }


seeds = st.integers(0, 2**63 - 1)
indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=6)
splits = st.sampled_from(SPLITS)


def distribution(root: Path, options: dict[str, object]) -> ImageFolder:
    return ImageFolder(data_root=str(root), **options)


def equal(a: TaskBatch, b: TaskBatch) -> bool:
    return all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def rows(batch: TaskBatch, which: list[int]) -> TaskBatch:
    return TaskBatch(*(Examples(each.x[which], each.y[which]) for each in batch))


@settings(max_examples=60, deadline=None)
@given(tasks(), seeds, splits, indices, st.randoms())
def test_a_task_depends_on_its_index_alone(root, options, seed, split, wanted, random) -> None:
    """Not on its neighbours, on their order or number, nor on global random state."""
    task = distribution(root, options)
    torch.manual_seed(random.randrange(2**32))
    np.random.seed(random.randrange(2**32))
    batch = task.sample(seed, split, np.array(wanted))
    order = list(range(len(wanted)))
    random.shuffle(order)
    shuffled = task.sample(seed, split, np.array(wanted)[order])
    assert equal(shuffled, rows(batch, order))
    alone = task.sample(seed, split, np.array(wanted[-1:]))
    assert equal(alone, rows(batch, [len(wanted) - 1]))


@settings(max_examples=100, deadline=None)
@given(tasks(), seeds, splits, indices)
def test_a_task_is_what_it_should_be(root, options, seed, split, wanted) -> None:
    task = distribution(root, options)
    ways, shots, queries = task.ways, task.shots, task.queries
    batch = task.sample(seed, split, np.array(wanted))
    channels, height, width = task.input_shape
    assert batch.support.x.shape == (len(wanted), ways * shots, channels, height, width)
    assert batch.query.x.shape == (len(wanted), ways * queries, channels, height, width)
    for i in range(len(wanted)):
        support, query = decode(batch.support, i), decode(batch.query, i)
        both = Decoded(*(np.concatenate(each) for each in zip(support, query, strict=True)))
        # The right number of examples for every label, 0 to N - 1.
        assert Counter(support.labels.tolist()) == dict.fromkeys(range(ways), shots)
        assert Counter(query.labels.tolist()) == dict.fromkeys(range(ways), queries)
        # A label means one class at one angle, in support and query set alike, and no two the same.
        meanings = {label: set() for label in range(ways)}
        for label, number, turn in zip(both.labels, both.classes, both.turns, strict=True):
            meanings[label].add((number, turn))
        assert all(len(each) == 1 for each in meanings.values())
        pairs = [each for (each,) in meanings.values()]
        assert len(set(pairs)) == ways
        if options["rotations"] != "classes":
            assert len({number for number, _ in pairs}) == ways
        if options["rotations"] == "none":
            assert {turn for _, turn in pairs} == {0}
        # Classes of this split, and no image twice under one label.
        assert {SPLIT_OF[number] for number, _ in pairs} == {split}
        assert len(set(zip(both.labels, both.drawings, strict=True))) == ways * (shots + queries)


@settings(max_examples=30, deadline=None)
@given(tasks(), seeds, splits, st.integers(0, 2**40))
def test_support_set_does_not_depend_on_the_number_of_queries(
    root, options, seed, split, index
) -> None:
    fewer = distribution(root, options | {"queries": 1}).sample(seed, split, np.array([index]))
    more = distribution(root, options).sample(seed, split, np.array([index]))
    assert torch.equal(fewer.support.x, more.support.x)


@pytest.mark.parametrize("rotations", ["none", "per-task", "classes"])
def test_tasks_cover_their_split_evenly(root: Path, rotations: str) -> None:
    """Every class of the split under every label, at every angle, with every drawing, equally often
    (within 6 standard deviations), whatever the seed; classes of other splits never."""
    task = distribution(root, {"store": "grey", "ways": 3, "queries": 1, "rotations": rotations})
    for split in SPLITS:
        number_of_classes = SPLIT_OF.count(split)
        seen: Counter[tuple[int, int, int]] = Counter()
        drawings: Counter[tuple[int, int]] = Counter()
        for seed in (1, 2):
            batch = task.sample(seed, split, np.arange(2000))
            x = batch.query.x.reshape(1, -1, *task.input_shape)
            found = decode(Examples(x, batch.query.y.reshape(1, -1)), 0)
            seen.update(zip(*(each.tolist() for each in found[::2]), found.labels, strict=True))
            drawings.update(zip(found.classes.tolist(), found.drawings.tolist(), strict=True))
        angles = 1 if rotations == "none" else 4
        assert len(seen) == number_of_classes * angles * 3
        expected = 2 * 2000 / (number_of_classes * angles)
        assert max(abs(n - expected) for n in seen.values()) < 6 * expected**0.5
        for number in {number for number, _ in drawings}:
            counts = [n for (c, _), n in drawings.items() if c == number]
            assert len(counts) == SMALLEST + number % 3
            mean = sum(counts) / len(counts)
            assert max(abs(n - mean) for n in counts) < 6 * mean**0.5


def test_rotated_classes_may_meet_themselves_only_where_they_count_as_others(root: Path) -> None:
    def meetings(rotations: str) -> int:
        task = distribution(root, {"store": "grey", "rotations": rotations, "queries": 1})
        batch = task.sample(0, "train", np.arange(300))
        return sum(len(set(decode(batch.support, i).classes.tolist())) < 5 for i in range(300))

    assert meetings("per-task") == meetings("none") == 0
    assert meetings("classes") > 50


def test_splits_and_seeds_give_different_tasks(root: Path) -> None:
    task = distribution(root, {"store": "grey", "queries": 1})
    first = task.sample(0, "train", np.arange(20))
    assert not torch.equal(first.support.x, task.sample(1, "train", np.arange(20)).support.x)
    assert not torch.equal(first.support.x[1:], first.support.x[:-1])


def test_pixels_are_those_of_the_store(root: Path) -> None:
    """Channels first, 255 becoming 1."""
    task = distribution(root, {"store": "colour", "ways": 2, "queries": 1})
    x = task.sample(3, "test", np.arange(1)).support.x[0]
    found = decode(task.sample(3, "test", np.arange(1)).support, 0)
    for image, number, drawing in zip(x, found.classes, found.drawings, strict=True):
        stored = images_of(int(number), 3)[drawing].astype(np.float32) / 255
        np.testing.assert_array_equal(image.numpy(), stored.transpose(2, 0, 1))


def test_another_process_draws_the_same_tasks(root: Path) -> None:
    """Settings are all that travels: the pickle is small, and elsewhere draws the same."""
    task = distribution(root, {"store": "colour", "rotations": "per-task", "queries": 2})
    task.sample(0, "train", np.arange(1))
    sent = pickle.dumps(task)
    assert len(sent) < 1000
    script = """
import hashlib, pickle, sys, numpy as np
batch = pickle.loads(bytes.fromhex(sys.argv[1])).sample(7, "train", np.array([5, 2**40]))
print(hashlib.sha256(b"".join(each.numpy().tobytes() for s in batch for each in s)).hexdigest())
"""
    elsewhere = subprocess.run(
        [sys.executable, "-c", script, sent.hex()], check=True, capture_output=True, text=True
    ).stdout.strip()
    batch = task.sample(7, "train", np.array([5, 2**40]))
    here = hashlib.sha256(b"".join(each.numpy().tobytes() for s in batch for each in s)).hexdigest()
    assert elsewhere == here


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_draws_are_different_and_in_range(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    populations = np.array(
        data.draw(st.lists(st.integers(count, 12), min_size=1, max_size=5)), dtype=np.int64
    )
    drawn = _different(
        task_keys(data.draw(seeds), "train", np.arange(len(populations))), populations, count
    )
    for values, population in zip(drawn, populations, strict=True):
        assert len(set(values.tolist())) == count
        assert 0 <= values.min() <= values.max() < population


def test_draws_are_uniform_over_ordered_selections() -> None:
    """All 60 ordered selections of 3 out of 5 equally often (within 5 standard deviations)."""
    keys = task_keys(0, "train", np.arange(30_000))
    counts = Counter(map(tuple, _different(keys, np.full(30_000, 5), 3).tolist()))
    assert len(counts) == 60
    assert max(abs(count - 500) for count in counts.values()) < 5 * 500**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways: must be at least 2, got 1"),
        ({"shots": 0}, "shots: must be at least 1, got 0"),
        ({"queries": 0}, "queries: must be at least 1, got 0"),
        ({"store": "../grey"}, "store: '../grey' cannot name"),
    ],
)
def test_impossible_settings_are_refused_at_construction(root, options, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        distribution(root, {"store": "grey", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 6}, "ways: 6 ways need as many classes, the validation split of grey has 5"),
        ({"ways": 21, "rotations": "classes"}, "ways: 21 ways .* has 20"),
        ({"shots": 4, "queries": 3}, "shots: 4 shots and 3 queries need 7 images .* has 6"),
    ],
)
def test_too_small_a_store_is_refused_at_first_use(root, options, message) -> None:
    task = distribution(root, {"store": "grey", "queries": 1, **options})
    for use in (task.check, lambda split: task.sample(0, split, np.arange(1))):
        with pytest.raises(ValueError, match=f"^{message}"):
            use("validation")


def test_oblong_images_cannot_be_rotated(tmp_path: Path) -> None:
    each = [ClassImages(str(n), "train", np.zeros((3, 4, 6, 1), np.uint8)) for n in range(4)]
    write_store(tmp_path, "oblong", each, source="", command="")
    options = {"store": "oblong", "ways": 2, "queries": 1}
    assert distribution(tmp_path, options).input_shape == (1, 4, 6)
    distribution(tmp_path, options).check("train")
    with pytest.raises(ValueError, match=r"^rotations: images of 4x6 pixels"):
        distribution(tmp_path, options | {"rotations": "per-task"}).check("train")


@pytest.mark.parametrize(
    ("task", "command"),
    [
        (ImageFolder(store="mine"), "maml data prepare images --source PATH --name mine"),
        (Omniglot(), "maml data prepare omniglot"),
        (Omniglot(image_size=84), "maml data prepare omniglot --size 84"),
    ],
)
def test_missing_store_names_the_command(tmp_path: Path, task: FewShot, command: str) -> None:
    task = type(task)(**{**vars(task), "data_root": str(tmp_path)})
    for use in (task.protocol, lambda: task.input_shape, lambda: task.check("train")):
        with pytest.raises(StoreError, match=f"does not exist\nbuild it with: {command}"):
            use()


def test_a_changed_pixel_is_refused_before_training(tmp_path: Path) -> None:
    write(tmp_path, "grey")
    path = tmp_path / "grey" / "images.arrow"
    data = bytearray(path.read_bytes())
    data[bytes(data).index(images_of(5, 1).tobytes())] ^= 1
    path.write_bytes(data)
    task = distribution(tmp_path, {"store": "grey", "queries": 1})
    with pytest.raises(StoreError, match="hash in its manifest\nbuild it again with: maml data"):
        task.check("train")


def test_protocol_says_what_a_number_means(root: Path) -> None:
    task = distribution(root, {"store": "grey", "shots": 2, "queries": 3, "rotations": "classes"})
    protocol = json.loads(json.dumps(task.protocol()))
    assert protocol.pop("content_hash") == task.open_store().content_hash
    assert protocol == {
        "dataset": "grey",
        "ways": 5,
        "shots": 2,
        "queries": 3,
        "rotations": "classes",
        "classes": {"train": 9, "validation": 5, "test": 6},
    }
    assert task.output_size == 5


def test_accuracy_is_what_checkpoints_are_chosen_by() -> None:
    prediction = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    metrics = Omniglot().metrics(prediction, torch.tensor([0, 1, 1]))
    assert metrics[Omniglot.primary_metric].item() == pytest.approx(2 / 3)
