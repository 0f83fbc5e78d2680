"""The process that computes chunks for a driver elsewhere: what Ray starts on the nodes."""

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

from pipeline.cluster.channel import ChannelAddress, listen
from pipeline.cluster.group import threads_per_chunk, warm_up_once
from pipeline.cluster.messages import InMemory, Ready, Reply
from pipeline.cluster.shared_vectors import Address, SharedVectors, StaleVector
from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import Job

_IDLE = 3e-4  # seconds without a job, after which a worker prepares tasks of the next iteration

_T = TypeVar("_T")


class ChunkActor:
    """The Ray actor: a `ChunkComputer` in a process of its own.

    One thread computes, one job after the other; Ray's threads meanwhile carry the answer to the
    job before and the arguments of the next one.
    """

    def __init__(self, name: str, experiment: Experiment, compile: bool, import_paths: list[str]):
        """`name`: for people, in Ray's dashboard and logs."""
        # A task or model of the user's own is imported as the driver would.
        sys.path += [path for path in import_paths if path not in sys.path]
        # Without this, N actors would start N x cores threads.
        torch.set_num_threads(threads_per_chunk(experiment, 1))
        self._name = name
        self._experiment, self._compile = experiment.without_gpu(), compile
        self._computer: ChunkComputer | None = None
        self._broadcast: SharedVectors | None = None
        self._results: SharedVectors | None = None
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._compute, name="compute", daemon=True).start()

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> Ready:
        """Build and warm up everything."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return self._submitted(lambda: Ready(os.getpid(), node, self._build())).result()

    def attach(self, memory: tuple[Address, Address]) -> ChannelAddress | None:
        """Map the memory of this node that θ is read from and the one that answers are put into;
        where to connect for questions, or None where that is not possible."""

        def work() -> ChannelAddress | None:
            self._broadcast, self._results = (SharedVectors.attach(each) for each in memory)
            if self._broadcast is None or self._results is None:
                return None
            try:
                return listen(self._asked)
            except OSError:
                return None

        return self._submitted(work).result()

    def run(
        self,
        theta: FlatVector | InMemory,
        vector: FlatVector | InMemory | None,
        job: Job,
        result: InMemory | None,
    ) -> Reply:
        """Compute a job at θ, about a vector if it is about one; `result`: where the vector of the
        answer is to be put, instead of coming back with it."""
        return self._asked(theta, vector, job, result).result()

    def _asked(
        self,
        theta: FlatVector | InMemory,
        vector: FlatVector | InMemory | None,
        job: Job,
        result: InMemory | None,
    ) -> Future[Reply]:
        def work() -> Reply:
            self._build()
            assert self._computer is not None
            try:
                at, about = self._taken(theta), self._taken(vector)
            except StaleVector:
                return Reply(None)
            assert at is not None
            answer = self._computer.run(at, job, about)
            if not self._still_there(theta) or not self._still_there(vector):
                return Reply(None)  # computed at what was being overwritten
            if result is None or self._results is None or not self._results.takes(answer.gradient):
                return Reply(answer)
            assert answer.gradient is not None
            self._results.write(*result, answer.gradient)
            return Reply(answer).parted()

        return self._submitted(work)

    def _taken(self, given: FlatVector | InMemory | None) -> FlatVector | None:
        """A vector from wherever it is. Raises StaleVector."""
        if not isinstance(given, tuple):
            return given
        if self._broadcast is None:
            raise StaleVector("this process has just been restarted")
        return self._broadcast.awaited(*given)

    def _still_there(self, given: FlatVector | InMemory | None) -> bool:
        """Whether a vector that was taken has not been overwritten meanwhile."""
        if not isinstance(given, tuple):
            return True
        return self._broadcast is not None and self._broadcast.holds(*given)

    def _submitted(self, work: Callable[[], _T]) -> Future[_T]:
        """What `work` will return or raise, on the computing thread."""
        future: Future[_T] = Future()
        self._work.put((work, future))
        return future

    def _compute(self) -> None:
        while True:
            try:
                # The answer to the last job leaves first.
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
            return True  # the job itself will meet the error, and report it

    def _build(self) -> list[str]:
        if self._computer is not None:
            return []
        warnings = _Warnings()
        logging.getLogger("pipeline").addHandler(warnings)
        try:
            computer = ChunkComputer(self._experiment, self._compile)
            # Whom it waits for nobody hears in time: the answer to `ready` comes afterwards.
            warm_up_once(computer, self._experiment, self._compile, notice=lambda line: None)
        finally:
            logging.getLogger("pipeline").removeHandler(warnings)
        self._computer = computer
        return warnings.lines


class _Warnings(logging.Handler):
    """Collects warnings: what an actor writes to its log nobody reads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
