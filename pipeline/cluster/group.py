"""Who does the jobs of an iteration: the interface of worker groups, and the group in this process.

`dispatch` holds the group of Ray actors. Both call `ChunkComputer.run` and nothing else, so that
local and distributed runs share every computation; only the transport differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pipeline.cluster.compile_lock import first_to_compile, program_key
from pipeline.cluster.rounds import Total, total_of
from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.cpus import available_cpus
from pipeline.worker.jobs import ChunkJob, Job, JobResult
from pipeline.worker.learner import computes_little
from pipeline.worker.program_cache import identity
from pipeline.worker.tree import Span
from tasks.errors import ReportedError

Notice = Callable[[str], None]
"""Shows a line to a person: a worker died, a chunk was issued again, ..."""


class WorkersLost(ReportedError):
    """No worker is left, and none will come back."""

    exit_code = 1


class WorkerGroup(Protocol):
    """Does jobs, in this process or elsewhere."""

    @property
    def size(self) -> int:
        """Number of actors that were asked for; 0 in process."""
        ...

    @property
    def ready(self) -> int:
        """Number of actors that are there now; 0 in process."""
        ...

    def run(self, theta: FlatVector, jobs: Sequence[Job]) -> list[JobResult]:
        """Do separate jobs at θ, a flat vector [D]; wait for all, and return them in order.

        Raises what `ChunkComputer.run` raises, and WorkersLost.
        """
        ...

    def total(
        self,
        theta: FlatVector,
        ask: Callable[[Span], ChunkJob],
        num_chunks: int,
        vector: FlatVector | None = None,
    ) -> Total:
        """Ask the same of all chunks of a meta-batch, and add up: the same bits whoever computes
        what. `ask` gives the job for a block of chunks; `vector` [D] is what it is about.

        Raises what `run` raises.
        """
        ...

    def close(self) -> None:
        """End the workers, and give back what they took."""
        ...


class InProcess:
    """The group without actors: jobs are done here, one after the other."""

    size = ready = 0

    def __init__(
        self,
        experiment: Experiment,
        compile: bool,
        *,
        warm_up: bool = True,
        notice: Notice = lambda line: None,
    ):
        """Sets torch's number of threads until `close`. Without `warm_up` functions are compiled
        when they are first used. `notice` is told whom the warm-up waits for. Raises what
        `ChunkComputer` and its `warm_up` raise."""
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads_per_chunk(experiment, 0))
        self._computer = ChunkComputer(experiment, compile)
        if warm_up:
            warm_up_once(self._computer, experiment, compile, notice)

    def run(self, theta: FlatVector, jobs: Sequence[Job]) -> list[JobResult]:
        return [self._computer.run(theta, job) for job in jobs]

    def total(
        self,
        theta: FlatVector,
        ask: Callable[[Span], ChunkJob],
        num_chunks: int,
        vector: FlatVector | None = None,
    ) -> Total:
        result = self._computer.run(theta, ask(Span(0, num_chunks)), vector)
        return total_of(
            [result], result.gradient, result.seconds_sampling + result.seconds_computing
        )

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def threads_per_chunk(experiment: Experiment, workers: int) -> int:
    """Threads that compute a chunk: `compute.threads` where it is set; else one for a small model,
    whose threads would mostly wait for each other; else one per CPU of an actor (`workers` > 0), or
    one per CPU that this process may use."""
    if experiment.compute.threads is not None:
        return experiment.compute.threads
    cpus = max(1, int(experiment.cluster.cpus_per_worker)) if workers else available_cpus()
    return 1 if cpus > 1 and computes_little(experiment) else cpus


def on_driver(experiment: Experiment) -> Experiment:
    """The experiment as this process computes it: on the CPU where actors will have the GPUs,
    because the head node of a cluster often has none."""
    if not experiment.cluster.gpus_per_worker:
        return experiment
    return experiment.changed(compute={"device": "cpu"})


def warm_up_once(
    computer: ChunkComputer, experiment: Experiment, compile: bool, notice: Notice
) -> None:
    """Warm a computer up. Where it compiles, one process of this machine does so first; those that
    come later find its programs in the cache, and need not wait for each other."""
    if not compile:
        computer.warm_up()
        return
    program = program_key(identity(experiment), torch.__version__, str(torch.get_num_threads()))
    with first_to_compile(program, notice):
        computer.warm_up()
