"""The process that Ray starts on a node: it computes chunks for a driver elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from pipeline.cluster.group import threads_per_chunk, warm_up_once
from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import ChunkResult, Job

_IDLE = 2e-3  # seconds without a job, after which a worker prepares tasks of the next iteration

_T = TypeVar("_T")


class ChunkActor:
    """The Ray actor: a `ChunkComputer` in a process of its own.

    One thread of its own computes, one job after the other. Ray's threads only wait for it, so
    they can meanwhile send the last answer and receive the arguments of the next job.
    """

    def __init__(self, experiment: Experiment, compile: bool, import_paths: list[str]):
        """`import_paths` are the folders in which the driver finds a user's own tasks and models;
        they are added to `sys.path`."""
        sys.path += [path for path in import_paths if path not in sys.path]
        # By default torch starts a thread per core in every actor.
        torch.set_num_threads(threads_per_chunk(experiment, 1))
        self._experiment, self._compile = experiment.without_gpu(), compile
        self._computer: ChunkComputer | None = None
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._compute, name="compute", daemon=True).start()

    def ready(self) -> tuple[int, list[str]]:
        """Build and warm up the computer; returns the process id, and warnings for the driver.

        Raises what `ChunkComputer` and its `warm_up` raise.
        """
        return os.getpid(), self._computed(self._build)

    def run(self, theta: FlatVector, job: Job) -> ChunkResult:
        """Do a job at θ, a flat vector [D]. Raises what `ChunkComputer.run` raises."""

        def work() -> ChunkResult:
            self._build()
            assert self._computer is not None
            return self._computer.run(theta, job)

        return self._computed(work)

    def _computed(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the computing thread; returns what it returns, raises what it raises."""
        future: Future[_T] = Future()
        self._work.put((work, future))
        return future.result()

    def _compute(self) -> None:
        """The computing thread: do what is queued; prepare the next iteration when idle."""
        while True:
            try:
                # Not idle at once: Ray's threads need the processor to send the last answer.
                work, future = self._work.get(timeout=_IDLE)
            except Empty:
                if self._prepared_ahead():
                    continue
                work, future = self._work.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _prepared_ahead(self) -> bool:
        """Use idle time for the next iteration; False if there is nothing to do."""
        try:
            return self._computer is not None and self._computer.prepare_ahead()
        except Exception:
            return True  # the job that needs these tasks will meet the error, and report it

    def _build(self) -> list[str]:
        """Build and warm up the computer unless that is done; returns the warnings given then."""
        if self._computer is not None:
            return []
        warnings = _Warnings()
        logging.getLogger("pipeline").addHandler(warnings)
        try:
            computer = ChunkComputer(self._experiment, self._compile)
            warm_up_once(computer, self._experiment, self._compile, warnings.lines.append)
        finally:
            logging.getLogger("pipeline").removeHandler(warnings)
        self._computer = computer
        return warnings.lines


class _Warnings(logging.Handler):
    """Collects warnings for the driver to show: nobody reads the log of an actor."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
