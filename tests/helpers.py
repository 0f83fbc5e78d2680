"""Tasks and models for tests, many of which misbehave; looking at runs."""

import contextlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.cluster.channel import ChannelAddress
from pipeline.runs.checkpoint import load_theta
from pipeline.training.session import Watcher
from tasks.base import Classification, Examples, TaskBatch, as_tensor
from tasks.control.mdp import Transition
from tasks.control.navigation import Navigation, Plane
from tasks.image_store import ClassImages, write_store
from tasks.random import UInt64, task_keys, uniform
from tasks.sinusoid import Sinusoid


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    """Write a zip archive with these files; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@dataclass(frozen=True, kw_only=True)
class SlowSinusoid(Sinusoid):
    """Each look at the loss takes a while, so that there is time to kill somebody."""

    seconds: float = 0.01

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().loss(prediction, target)


@dataclass(frozen=True, kw_only=True)
class Squares(Sinusoid):
    """Without `mse_loss`, whose second derivative wants all of its arguments mapped over."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return ((prediction - target) ** 2).mean()


@dataclass(frozen=True, kw_only=True)
class SlowNavigation(Navigation):
    """Each time step takes a while."""

    seconds: float = 0.01

    def environment(
        self, parameters: Tensor, keys: UInt64, trajectories: int, like: Tensor
    ) -> Plane:
        return _SlowPlane(super().environment(parameters, keys, trajectories, like), self.seconds)


class _SlowPlane(Plane):
    def __init__(self, plane: Plane, seconds: float):
        self.__dict__.update(plane.__dict__)
        self._seconds = seconds

    def step(self, action: Tensor) -> Transition:
        time.sleep(self._seconds)
        return super().step(action)


@dataclass(frozen=True, kw_only=True)
class NanSinusoid(Sinusoid):
    """Training tasks first_bad .. last_bad have a target that is not a number."""

    first_bad: int = 0
    last_bad: int = 0

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        batch = super().sample(seed, split, indices)
        y = batch.query.y.clone()
        if split == "train":
            y[(indices >= self.first_bad) & (indices <= self.last_bad)] = float("nan")
        return TaskBatch(batch.support, Examples(batch.query.x, y))


@dataclass(frozen=True, kw_only=True)
class ScaledSinusoid(Sinusoid):
    """Its loss has a unit of its own."""

    scale: float = 1.0

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * super().loss(prediction, target)


@dataclass(frozen=True, kw_only=True)
class BrokenSinusoid(Sinusoid):
    """Cannot be sampled."""

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        raise ZeroDivisionError("on purpose")


@dataclass(frozen=True, kw_only=True)
class DyingSinusoid(Sinusoid):
    """The process that sees example `at` for the first time dies of it, once."""

    at: int = 0
    once: str = ""

    def pooled(self, seed: int, indices: npt.NDArray[np.int64]) -> Examples:
        if self.at in indices and not Path(self.once).exists():
            Path(self.once).touch()
            os._exit(1)
        return super().pooled(seed, indices)


@dataclass(frozen=True, kw_only=True)
class ThreadsSinusoid(Sinusoid):
    """Writes down with how many threads of torch its pooled examples are computed on."""

    seen: str = ""

    def pooled(self, seed: int, indices: npt.NDArray[np.int64]) -> Examples:
        Path(self.seen).write_text(str(torch.get_num_threads()))
        return super().pooled(seed, indices)


@dataclass(frozen=True, kw_only=True)
class DeadlySinusoid(Sinusoid):
    """Every process that samples training task `at` ends, as one that runs out of memory."""

    at: int = 0

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        if split == "train" and self.at in indices:
            os._exit(9)
        return super().sample(seed, split, indices)


@dataclass(frozen=True, kw_only=True)
class CrashingSinusoid(Sinusoid):
    """No process but the driver's can look at it."""

    driver: int = 0

    def __post_init__(self) -> None:
        if os.getpid() != self.driver:
            os._exit(9)


@dataclass(frozen=True, kw_only=True)
class SpoiltOnceSinusoid(Sinusoid):
    """The first process that samples training task `at` fails at it, and no other one does."""

    at: int = 0
    once: str = ""

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        if split == "train" and self.at in indices and not Path(self.once).exists():
            Path(self.once).touch()
            raise OSError("this machine's disk is full")
        return super().sample(seed, split, indices)


@dataclass(frozen=True, kw_only=True)
class FailingSinusoid(Sinusoid):
    """Its examples are broken, but not the first ones."""

    def pooled(self, seed: int, indices: npt.NDArray[np.int64]) -> Examples:
        if indices.max() > 10:
            raise RuntimeError("these data are broken")
        return super().pooled(seed, indices)


class OwnClasses(Classification):
    """Points on two sides of a line of each task's own: no label means the same in two tasks."""

    input_shape = (2,)
    output_size = 2

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        keys = task_keys(seed, split, indices)

        def examples(stream: int) -> Examples:
            x = uniform(keys, stream, 20, -1.0, 1.0).reshape(-1, 10, 2)
            across = uniform(keys, 0, 2, -1.0, 1.0)[:, None]
            return Examples(as_tensor(x), as_tensor(((x * across).sum(-1) > 0).astype(np.int64)))

        return TaskBatch(examples(1), examples(2))


class Images(Classification):
    """Only the loss and the metrics are used."""

    input_shape = (1, 8, 8)
    output_size = 2

    def sample(self, seed: int, split: str, indices: npt.NDArray[np.int64]) -> TaskBatch:
        raise NotImplementedError


def images(
    num_tasks: int,
    shape: tuple[int, ...],
    ways: int = 2,
    shots: int = 1,
    queries: int = 2,
    seed: int = 0,
) -> TaskBatch:
    """Tasks of noise, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def examples(count: int) -> Examples:
        x = torch.randn(num_tasks, ways * count, *shape, dtype=torch.float64, generator=generator)
        return Examples(x, torch.arange(ways).repeat_interleave(count).repeat(num_tasks, 1))

    return TaskBatch(support=examples(shots), query=examples(queries))


class Cube(torch.autograd.Function):
    """x³ with reverse derivatives only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * upstream


class BackwardOnly(torch.nn.Linear):
    """A linear policy, cubed: without forward derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Cube.apply(super().forward(x))
        return out


def backward_only(input_shape: tuple[int, ...], output_size: int) -> torch.nn.Module:
    return BackwardOnly(*input_shape, output_size)


def write_tiny(root: Path, seed: int, size: int = 28) -> str:
    """Write the store `tiny` of nine classes of noise; returns its content hash."""
    generator = np.random.default_rng(seed)
    splits = ["train"] * 4 + ["validation"] * 2 + ["test"] * 3
    classes = (
        ClassImages(f"c{n}", split, generator.integers(0, 256, (6, size, size, 1), np.uint8))
        for n, split in enumerate(splits)
    )
    return write_store(root, "tiny", classes, source="noise", command="make it").content_hash


def final_theta(run_dir: Path) -> torch.Tensor:
    theta = load_theta(run_dir / "theta.safetensors")
    return by_name(theta)


def by_name(params: dict[str, torch.Tensor]) -> torch.Tensor:
    """One vector, in the order of the names: files keep no order."""
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


class Recorder(Watcher):
    """Keeps what it is told, and calls `at` after each iteration."""

    def __init__(self, at: Any = None):
        self.notices: list[str] = []
        self.metrics: list[dict[str, float]] = []
        self.session: Any = None
        self._at = at

    def started(self, session: Any) -> None:
        self.session = session

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)
        if self._at is not None:
            self._at(iteration, self)


@contextlib.contextmanager
def silent_listener() -> Iterator[tuple[subprocess.Popen[str], ChannelAddress]]:
    """A process that listens for questions and answers none, and where; killed at the end."""
    script = (
        "import sys\nfrom concurrent.futures import Future\n"
        "from pipeline.cluster.channel import listen\n"
        "address = listen(lambda *_: Future())\n"
        "print(address.name[1:], address.key.hex(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name, key = process.stdout.readline().split()
        try:
            yield process, ChannelAddress("\0" + name, bytes.fromhex(key))
        finally:
            process.kill()
