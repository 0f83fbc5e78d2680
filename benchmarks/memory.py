"""Measures the peak memory of a meta-gradient through many inner steps, against one step.

    python benchmarks/memory.py                   on the CPU (minutes, mostly compiling)
    python benchmarks/memory.py --device cuda     what torch allocates on the GPU
    python benchmarks/memory.py --modes eager     without compiling

conv4 on 8 tasks, 5-way 1-shot with 1 query per class, second order: 1 step, 20 steps, and 20 steps
with `inner.recompute`. Each is measured in a process of its own. A first call builds everything,
compilation included; the calls after it are measured:

- peak: the most memory that the process (on a GPU: torch) has held;
- growth: the peak beyond what was held before the first call, with parameters and tasks in place;
- a call's own: the peak beyond what was held right before the call.

On a CPU the peak is VmHWM, the high-water mark of the resident memory. The compiler would set it,
so the mark is reset after the first call (/proc/self/clear_refs); where that is forbidden, the
table says so and "peak" includes the first call. Besides, a process thrown away compiles first, so
that the measured one traces but finds its kernels on disk, and freed memory is made to leave the
process at once (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_).

Compiled, 20 steps are never one program but one per stage, with `inner.recompute` or without.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.flat_vector import Layout
from pipeline.maml.meta_gradient import Knobs, chunk_function
from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import conv4
from tasks.base import Classification, Examples, TaskBatch, as_tensor

TARGET = 2.0  # many steps with `inner.recompute` over one step
CALLS = 3
MODES = ("eager", "compiled")


@dataclass(frozen=True, kw_only=True)
class NoiseImages(Classification):
    """Noise in the shapes of Omniglot: speed and memory do not depend on the content."""

    shots: int = 1
    queries: int = 1
    input_shape = (1, 28, 28)
    output_size = 5

    def sample(self, seed: int, split: str, indices: Any) -> TaskBatch:
        rngs = [np.random.default_rng([seed, int(index)]) for index in indices]

        def examples(count: int) -> Examples:
            shape = (self.output_size * count, *self.input_shape)
            images = np.stack([rng.random(shape, dtype=np.float32) for rng in rngs])
            labels = torch.arange(self.output_size).repeat_interleave(count)
            return Examples(as_tensor(images), labels.repeat(len(rngs), 1))

        return TaskBatch(support=examples(self.shots), query=examples(self.queries))


@contextmanager
def compilation_must_succeed() -> Iterator[None]:
    """Turn the warning that compilation failed into an error."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("pipeline.maml.compilation")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if messages:
        raise RuntimeError(messages[0])


def hardware(device: str, threads: int, *libraries: str) -> str:
    """Machine, libraries and date of a measurement, in words."""
    model = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((x.split(":")[1].strip() for x in file if x.startswith("model name")), model)
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    versions = [f"Python {platform.python_version()}"]
    for library in libraries:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{library} {importlib.metadata.version(library)}")
    return (
        f"{datetime.date.today()}: {gpu}{model}, {os.cpu_count()} cores, {threads} threads; "
        f"{', '.join(versions)}"
    )


def use_threads(threads: int | None) -> int:
    """Give every library as many threads: XLA uses as many as this process may use cores."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    threads = threads or len(allowed) or os.cpu_count() or 1
    if threads < len(allowed):
        os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)
    return threads


@dataclass(frozen=True)
class Setting:
    """What one process measures."""

    mode: str
    steps: int
    recompute: bool
    device: str
    tasks: int
    threads: int


@dataclass(frozen=True)
class Measurement:
    """Bytes of memory; `reset` says whether the mark could be reset after the first call."""

    baseline: int
    before_call: int
    peak: int
    reset: bool

    @property
    def growth(self) -> int:
        return self.peak - self.baseline

    @property
    def own(self) -> int:
        return self.peak - self.before_call


def measure(setting: Setting) -> Measurement:
    """Measure a setting in this process."""
    torch.manual_seed(0)
    use_threads(setting.threads)
    task = NoiseImages()
    model = conv4(task.input_shape, task.output_size).to(setting.device)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    layout = Layout.of(theta)
    batch = task.sample(0, "train", np.arange(setting.tasks)).to(setting.device, torch.float32)
    arguments = layout.join(theta), batch, Knobs(torch.tensor(0.1, device=setting.device))
    function = chunk_function(
        Objective(model, task),
        Adaptation.of(model, steps=setting.steps),
        layout,
        recompute=setting.recompute,
        compile=setting.mode == "compiled",
    )
    memory = Gpu() if setting.device == "cuda" else Process()
    baseline = memory.held()
    with compilation_must_succeed():
        function(*arguments)
    reset = memory.reset_peak()
    before_call = memory.held()
    for _ in range(CALLS):
        function(*arguments)
    return Measurement(baseline, before_call, memory.peak(), reset)


class Process:
    """Resident memory of this process (Linux)."""

    def held(self) -> int:
        """Resident bytes, after all free memory has been returned to the system."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    def reset_peak(self) -> bool:
        """Reset the peak to what is held now; return whether that was possible."""
        self.held()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
        raise OSError(f"/proc/self/status has no {field}")


class Gpu:
    """Memory that torch's allocator has handed out on the GPU."""

    def held(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> bool:
        self.held()
        torch.cuda.reset_peak_memory_stats()
        return True


def measured_apart(setting: Setting, cache: str) -> Measurement:
    """`measure` in a process of its own; another one compiles first where that is asked."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    command = [sys.executable, __file__, "--measure", json.dumps(vars(setting))]
    output = ""
    for _ in range(2 if setting.mode == "compiled" else 1):
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            raise SystemExit(f"failed with status {run.returncode}: {setting}")
        output = run.stdout
    return Measurement(**json.loads(output.splitlines()[-1]))


def table(mode: str, steps: int, arguments: argparse.Namespace, cache: str) -> list[str]:
    """The rows of a mode; ratios are to the first row."""
    rows, first = [], None
    for count, recompute in ((1, False), (1, True), (steps, False), (steps, True)):
        name = f"{count} step{'s' * (count > 1)}{', recompute' * recompute}"
        print(f"{mode}, {name} ...", file=sys.stderr, flush=True)
        setting = Setting(
            mode, count, recompute, arguments.device, arguments.tasks, arguments.threads
        )
        result = measured_apart(setting, cache)
        first = first or result
        values = [
            f"{value / 2**20:,.0f} MiB | {value / max(1, one):.2f}x"
            for value, one in (
                (result.peak, first.peak),
                (result.growth, first.growth),
                (result.own, first.own),
            )
        ]
        target = f"at most {TARGET:.0f}x" if recompute and count > 1 else ""
        peak = "" if result.reset else " (peak of the first call included)"
        rows.append(f"| {mode} | {name}{peak} | {' | '.join(values)} | {target} |")
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=20, help="many")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # for the processes that measure
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(vars(measure(Setting(**json.loads(arguments.measure))))))
        return
    arguments.threads = use_threads(arguments.threads)
    print(hardware(arguments.device, arguments.threads, "torch"))
    print(
        f"\nconv4, 64 filters, {arguments.tasks} tasks, 5-way 1-shot, 1 query; ratios to 1 step.\n"
    )
    print("| mode | inner steps | peak | ratio | growth | ratio | a call's own | ratio | target |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for mode in arguments.modes:
            print(*table(mode, arguments.steps, arguments, cache), sep="\n", flush=True)


if __name__ == "__main__":
    main()
