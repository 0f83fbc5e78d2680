"""Checkpoints: bit for bit, whole or not at all, and the best one never lost."""

import json
import logging
import math
import os
import re
from pathlib import Path

import pyarrow.fs
import pytest
import torch

from pipeline.runs.checkpoint import (
    CheckpointError,
    CheckpointStore,
    TrainingState,
    load_theta,
    save_theta,
)
from pipeline.runs.files import WriteError, write_atomically


def state(iteration: int, **changes: object) -> TrainingState:
    tensors = {"theta.weight": torch.full((3, 2), float(iteration))}
    return TrainingState(**{"iteration": iteration, "tensors": tensors, **changes})


def saved(folder: Path, *iterations: int, best: int = -1, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(folder, keep=keep)
    for iteration in iterations:
        store.save(state(iteration), best=iteration == best)
    return store


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(12, generator=generator)
    tensors = {
        "theta.views.a": flat[:6].view(2, 3),
        "theta.views.b": flat[6:].view(3, 2).T,
        "theta.double": torch.randn(5, generator=generator, dtype=torch.float64),
        "theta.special": torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-45]),
        "theta.requires_grad": torch.ones(2, requires_grad=True),
        "theta.empty": torch.zeros(0, 4),
        "optimizer.weight.step": torch.tensor(2**53 + 1, dtype=torch.int64),
    }
    original = TrainingState(
        iteration=7,
        tensors=tensors,
        scheduler={"last_epoch": 7, "_last_lr": [0.1 + 0.2]},
        best={"iteration": 5, "value": 1 / 3},
        bad_updates=1,
        config={"inner": {"lr": 1e-2, "steps": 1}, "name": "α"},
        mlflow_run_id="abc",
        extra={"nothing": None},
    )
    store = CheckpointStore(tmp_path, keep=1)
    store.save(original, best=False)
    loaded = store.latest()
    assert loaded is not None
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert loaded.tensors[name].shape == tensor.shape
        assert bits(loaded.tensors[name]) == bits(tensor.detach()), name
    for field in ("iteration", "scheduler", "best", "bad_updates", "config", "mlflow_run_id"):
        assert getattr(loaded, field) == getattr(original, field)
    assert loaded.extra == original.extra


def test_an_empty_store_has_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "not-there", keep=2)
    assert store.latest() is None
    assert store.best() is None
    assert store.list() == ()
    assert not (tmp_path / "not-there").exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    kept = []
    for iteration in range(1, 7):
        store.save(state(iteration), best=iteration in (1, 3))
        kept.append([(info.iteration, info.best) for info in store.list()])
    assert kept == [
        [(1, True)],
        [(1, True), (2, False)],
        [(2, False), (3, True)],
        [(3, True), (4, False)],
        [(3, True), (4, False), (5, False)],
        [(3, True), (5, False), (6, False)],
    ]
    best, latest = store.best(), store.latest()
    assert best is not None
    assert best.iteration == 3
    assert torch.equal(best.tensors["theta.weight"], torch.full((3, 2), 3.0))
    assert latest is not None
    assert latest.iteration == 6
    assert len(list(tmp_path.iterdir())) == 6


def test_only_own_leftovers_are_removed(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "iteration-00000002-0123abcd.safetensors").write_bytes(b"half a save")
    (tmp_path / "iteration-00000002.json.0123abcd.tmp").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "theta.safetensors").write_bytes(b"mine")
    latest = store.latest()
    assert latest is not None
    assert latest.iteration == 1
    store.save(state(3), best=False)
    assert {path.name for path in tmp_path.iterdir() if "iteration" not in path.name} == {
        "notes.txt",
        "theta.safetensors",
    }
    assert not list(tmp_path.glob("iteration-00000002*"))
    assert [info.iteration for info in store.list()] == [1, 3]


class DyingFileSystem(pyarrow.fs.FileSystemHandler):
    """A local file system whose machine loses its power at the nth write, move or removal."""

    def __init__(self, steps_to_live: int):
        self.fs = pyarrow.fs.LocalFileSystem()
        self.steps_to_live = steps_to_live

    def step(self) -> None:
        self.steps_to_live -= 1
        if self.steps_to_live < 0:
            raise KeyboardInterrupt

    def create_dir(self, path: str, recursive: bool) -> None:
        self.fs.create_dir(path, recursive=recursive)

    def open_output_stream(self, path: str, metadata: object) -> pyarrow.NativeFile:
        try:
            self.step()
        except KeyboardInterrupt:
            Path(path).write_bytes(b"tr")  # truncated
            raise
        return self.fs.open_output_stream(path)

    def move(self, source: str, destination: str) -> None:
        self.step()
        self.fs.move(source, destination)

    def delete_file(self, path: str) -> None:
        self.step()
        self.fs.delete_file(path)

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        return self.fs.open_input_file(path)

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> list[object]:
        return self.fs.get_file_info(selector)

    def unused(self, *args: object) -> None:
        raise NotImplementedError

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__
    get_type_name = get_file_info = delete_dir = delete_dir_contents = unused
    delete_root_dir_contents = copy_file = open_input_stream = open_append_stream = unused
    normalize_path = unused


def test_a_crash_at_any_moment_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    completed = 0
    for steps in range(12):
        folder = tmp_path / str(steps)
        store = saved(folder, 1, 2, best=1, keep=1)
        dying = DyingFileSystem(steps)
        store._fs = pyarrow.fs.PyFileSystem(dying)
        try:
            store.save(state(3), best=True)  # supersedes 1 and 2: removes four files
            completed += 1
        except KeyboardInterrupt:
            pass
        after = CheckpointStore(folder, keep=1)
        latest, best = after.latest(), after.best()
        assert latest is not None
        assert best is not None
        assert latest.iteration == (2 if steps < 3 else 3), steps
        assert best.iteration == (1 if steps < 3 else 3), steps
        after.save(state(4), best=False)
        assert [i.iteration for i in after.list()] == ([1, 4] if steps < 3 else [3, 4])
        assert len(list(folder.iterdir())) == 4, steps
    assert 0 < completed < 12


def test_superseded_checkpoints_go_when_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of its files, and the names in the folder: a loss of power takes what was not synced."""
    happened: list[str] = []
    fsync = os.fsync

    class Noting(DyingFileSystem):
        def delete_file(self, path: str) -> None:
            happened.append("removed")
            super().delete_file(path)

    def noting(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    store = saved(tmp_path, 1, keep=1)
    store._fs = pyarrow.fs.PyFileSystem(Noting(99))
    monkeypatch.setattr(os, "fsync", noting)
    store.save(state(2), best=False)
    tensors, manifest, *rest = happened
    assert re.fullmatch(r"iteration-00000002-\w{8}\.safetensors", tensors)
    assert re.fullmatch(r"iteration-00000002\.json(\.\w{8}\.tmp)?", manifest)
    assert rest == [tmp_path.name, "removed", "removed"]


def damage_tensors(folder: Path, iteration: int) -> None:
    [file] = folder.glob(f"iteration-{iteration:08d}-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate_tensors(folder: Path, iteration: int) -> None:
    [file] = folder.glob(f"iteration-{iteration:08d}-*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])


def remove_tensors(folder: Path, iteration: int) -> None:
    [file] = folder.glob(f"iteration-{iteration:08d}-*.safetensors")
    file.unlink()


def truncate_manifest(folder: Path, iteration: int) -> None:
    file = folder / f"iteration-{iteration:08d}.json"
    file.write_text(file.read_text()[:40])


def empty_manifest(folder: Path, iteration: int) -> None:
    (folder / f"iteration-{iteration:08d}.json").write_text("{}")


def strange_manifest(folder: Path, iteration: int) -> None:
    file = folder / f"iteration-{iteration:08d}.json"
    manifest = json.loads(file.read_text())
    manifest["state"]["unknown"] = 1
    file.write_text(json.dumps(manifest))


DAMAGES = [
    damage_tensors,
    truncate_tensors,
    remove_tensors,
    truncate_manifest,
    empty_manifest,
    strange_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage) -> None:
    store = saved(tmp_path, 1, 2, 3, keep=2)
    damage(tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest is not None
    assert latest.iteration == 2
    assert "checkpoint of iteration 3" in caplog.text
    assert "damaged" in caplog.text

    # Training goes on from 2: the damaged one must not stand in the way of what follows.
    resumed = CheckpointStore(tmp_path, keep=2)
    resumed.save(state(2), best=False)
    assert [info.iteration for info in resumed.list()][-1] == 2
    resumed.save(state(3), best=False)
    latest = resumed.latest()
    assert latest is not None
    assert latest.iteration == 3
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_intact_checkpoint_is_an_error_that_says_what_to_do(tmp_path, damage) -> None:
    store = saved(tmp_path, 1, 2, best=2)
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"none .* is intact .*2, 1.*start a new run"):
        store.latest()
    with pytest.raises(CheckpointError, match=r"iteration 2 .* damaged"):
        store.best()


def test_the_folder_may_be_a_uri(tmp_path: Path) -> None:
    saved(tmp_path / "a b", 1, 2, best=1)
    from_uri = CheckpointStore((tmp_path / "a b").as_uri(), keep=1)
    latest = from_uri.latest()
    assert latest is not None
    assert latest.iteration == 2
    from_uri.save(state(3), best=False)
    assert [info.iteration for info in from_uri.list()] == [1, 3]


def test_a_file_system_that_is_not_local() -> None:
    store = CheckpointStore("mock:///bucket/run", keep=1)
    store.check_writable()
    for iteration in (1, 2, 3):
        store.save(state(iteration), best=iteration == 2)
    assert [(info.iteration, info.best) for info in store.list()] == [(2, True), (3, False)]
    best = store.best()
    assert best is not None
    assert torch.equal(best.tensors["theta.weight"], torch.full((3, 2), 2.0))


def test_relative_paths_do_not_move_with_the_working_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("checkpoints", keep=1)
    monkeypatch.chdir("/")
    store.save(state(1), best=False)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_unwritable_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / below
    store = CheckpointStore(folder, keep=1)
    for attempt in (store.check_writable, lambda: store.save(state(1), best=False)):
        with pytest.raises(CheckpointError, match=rf"{folder} cannot be written.*checkpoint\.uri"):
            attempt()


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "a" / "b", keep=1).check_writable()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_unknown_kind_of_folder_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"floppy://a.*use a local path or a URI"):
        CheckpointStore("floppy://a", keep=1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"milestones": {3: 1}}, r"state\.scheduler\.milestones .*key 3 is a int"),
        ({"bounds": [(0, 1)]}, r"state\.scheduler\.bounds\[0\] .*tuple"),
        ({"f": torch.ones(())}, r"state\.scheduler\.f .*Tensor"),
    ],
)
def test_what_json_would_change_is_refused(tmp_path: Path, value, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path, keep=1).save(state(1, scheduler=value), best=False)
    assert list(tmp_path.iterdir()) == []


def test_theta_alone(tmp_path: Path) -> None:
    theta = {"a.weight": torch.randn(2, 3), "b": torch.randn(4, dtype=torch.float64)}
    save_theta(tmp_path / "theta.safetensors", theta)
    loaded = load_theta(tmp_path / "theta.safetensors")
    assert loaded.keys() == theta.keys()
    assert all(bits(loaded[name]) == bits(theta[name]) for name in theta)


def test_theta_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no meta-parameters"):
        load_theta(tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: no meta-parameters"):
        load_theta(tmp_path / "bad.safetensors")


def test_write_atomically(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new folder" / "results.json"
    write_atomically(path, "ä")
    assert path.read_bytes() == "ä".encode()
    write_atomically(path, b"second")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(WriteError, match=r"results\.json cannot be written: disk full"):
        write_atomically(path, b"third")
    assert path.read_bytes() == b"second"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
