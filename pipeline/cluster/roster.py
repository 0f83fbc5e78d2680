"""Which workers there are: started, ready, lost, replaced, given up; and what is said of it."""

from __future__ import annotations

import os
import secrets
import time
from typing import Any

from pipeline.cluster.actor import ChunkActor
from pipeline.cluster.capacity import (
    actor_options,
    has_room,
    waiting_for_room,
    worker_bundle,
)
from pipeline.cluster.connection import cluster_address
from pipeline.cluster.group import Notice, WorkersLost
from pipeline.cluster.messages import AHEAD, Ready
from pipeline.cluster.ray_state import exit_of, leaving_nodes, restarts_of
from pipeline.cluster.remote_worker import RemoteWorker
from pipeline.config.experiment import Experiment

_AGAIN = 0.5  # seconds until a lost worker is asked whether it has come back
_QUIET = 20.0  # seconds without a worker at the start until somebody is told
_MINUTE = 60.0  # seconds between notices that workers are missing
_PATIENCE = 1200.0  # seconds without any worker: its successor may wait to compile, then compile
_HEARSAY = 0.5  # seconds until Ray knows why a process ended
_STARTS = 3  # processes of a worker that may end in a row before they are ready


class Roster:
    """The workers of a group."""

    def __init__(
        self,
        ray: Any,
        experiment: Experiment,
        compile: bool,
        size: int,
        notice: Notice,
    ):
        """Starts nobody yet."""
        self.size, self.replaced = size, 0
        """`replaced`: workers since the last round that needed none."""
        self.workers: dict[int, RemoteWorker] = {}
        self._ray, self._experiment, self._compile = ray, experiment, compile
        self._notice = notice
        self._leaving: set[RemoteWorker] = set()
        """Workers on nodes that are about to be taken away."""
        self._away: set[RemoteWorker] = set()
        """Workers that are not ready."""
        self._cause = ""
        """What ended the last process that was lost."""
        self._refused: Exception | None = None
        """The error of a worker that could not be built."""
        self._warned: set[str] = set()
        self._lost_since: float | None = None
        self._told = time.monotonic()
        self._had_room = True

    def start(self) -> None:
        """Start all actors; wait for none."""
        self._had_room = has_room(self._experiment)
        for number in range(self.size):
            self._start(number)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [worker.pid for worker in self.workers.values() if worker.pid is not None]

    def to_ask(self) -> list[RemoteWorker]:
        """Workers that are to be asked now whether they are ready.

        Raises WorkersLost when there has been none for long.
        """
        now = time.monotonic()
        if self._lost_since is not None and now - self._lost_since > _PATIENCE:
            raise WorkersLost(f"no worker has come back for {_PATIENCE:.0f} s{self._cause}")
        return [w for w in self._away if not w.calls and now >= w.ready_again]

    def ready(self, worker: RemoteWorker, ready: Ready) -> None:
        """A worker has built everything."""
        worker.is_ready(ready)
        worker.restarts_when_ready = restarts_of(worker.handle)
        self._away.discard(worker)
        self._lost_since = None
        for line in set(ready.warnings) - self._warned:
            self._warned.add(line)
            self._notice(line)

    def lost(self, worker: RemoteWorker, error: BaseException) -> None:
        """A worker's process ended, or cannot be reached.

        Raises WorkersLost if it was the last one that could be started.
        """
        why = self.why_lost(worker, error)
        self._cause = f"; the last one that was lost: {why}"
        if worker.pid is not None:
            left = len(self.pids) - 1
            self._notice(
                f"{worker} was lost ({why}); its chunks are computed elsewhere, {left} of "
                f"{self.size} workers go on"
            )
        self._gone(worker, time.monotonic() + _AGAIN)
        died = isinstance(error, self._ray.exceptions.ActorDiedError)
        # One restart is that of the process that was lost.
        if died or restarts_of(worker.handle) - worker.restarts_when_ready > _STARTS:
            self._give_up(worker, why)

    def why_lost(self, worker: RemoteWorker, error: BaseException) -> str:
        """Why a worker's process ended, in words."""
        known, began = "", time.monotonic()
        # A channel ends with the process; Ray hears of it a moment later.
        while worker.pid is not None and not known and time.monotonic() - began < _HEARSAY:
            known = exit_of(worker.pid, worker.node)
            if not known and isinstance(error, self._ray.exceptions.RayError):
                break
            time.sleep(0.02)
        return known or in_words(error)

    def refused(self, worker: RemoteWorker, cause: Exception) -> None:
        """A worker could not be built; believed, and raised, when a second one says so, too."""
        if len(self.workers) == 1 or self._refused is not None:
            raise cause
        self._refused = cause
        self._give_up(worker, f"{type(cause).__name__}: {cause}")

    def replace(self, worker: RemoteWorker) -> None:
        """Another actor instead of one that does not answer."""
        self._notice(f"{worker} is replaced")
        self._away.discard(worker)
        self._ray.kill(worker.handle)
        # Nothing is asked of it any more, and what it was asked does not matter.
        worker.leave()
        worker.pid = None
        worker.calls.clear()
        self.replaced += 1
        self._start(worker.number)

    def takes(self, worker: RemoteWorker) -> bool:
        """Whether a worker may be given work."""
        return worker.pid is not None and worker not in self._leaving

    def look_for_leaving(self) -> None:
        """See which nodes are about to be taken away: their workers finish what they have, and get
        no more, unless there are no others."""
        if cluster_address(self._experiment) is None:
            return
        nodes = leaving_nodes()
        ready = [worker for worker in self.workers.values() if worker.pid is not None]
        leaving = {worker for worker in ready if worker.node in nodes}
        if len(leaving) == len(ready):
            leaving = set()
        for worker in leaving - self._leaving:
            self._notice(f"the node of {worker} is about to be taken away: it gets no more work")
        self._leaving = leaving

    def tell_of_missing(self) -> None:
        """Say once a minute how many of the workers are there, while some are not."""
        ready, now = len(self.pids), time.monotonic()
        if ready < self.size and now - self._told > _MINUTE:
            self._told = now
            self._notice(f"{ready} of {self.size} workers are there{self._cause}")

    def tell_of_waiting(self, began: float) -> None:
        """Say, now and then, what the start waits for; `began` is when (time.monotonic)."""
        now = time.monotonic()
        if now - max(self._told, began) < _QUIET:
            return
        self._told = now
        workers = "the worker" if self.size == 1 else f"the first of {self.size} workers"
        if self._had_room:
            work = (
                "import torch and compile, or wait until another one has compiled the same"
                if self._compile
                else "import torch"
            )
            self._notice(
                f"{workers} is starting, for {now - began:.0f} s now: processes {work}{self._cause}"
            )
        else:
            bundle = worker_bundle(self._experiment)
            self._notice(waiting_for_room(workers, bundle, now - began))

    def close(self) -> None:
        """End the actors."""
        for worker in self.workers.values():
            self._ray.kill(worker.handle)
            worker.leave()

    def _start(self, number: int) -> None:
        """A new actor; with new memory: its predecessor may still write into the old."""
        self.workers[number] = RemoteWorker(number, self._new_actor(number))
        self._gone(self.workers[number], 0.0)

    def _new_actor(self, number: int) -> Any:
        name = f"{self._experiment.name} worker {number}"
        actor = self._ray.remote(ChunkActor).options(
            # Two runs of a cluster, and a worker and its successor, have different names.
            name=f"{name} ({secrets.token_hex(3)})",
            max_restarts=-1,
            max_concurrency=AHEAD + 1,
            **actor_options(self._experiment),
        )
        # Small plain arguments: a restart must not need an object that may be gone.
        return actor.remote(name, self._experiment, self._compile, [os.getcwd()])

    def _gone(self, worker: RemoteWorker, ready_again: float) -> None:
        worker.leave()
        worker.pid, worker.ready_again = None, ready_again
        self._away.add(worker)
        if not self.pids and self._lost_since is None:
            self._lost_since = time.monotonic()

    def _give_up(self, worker: RemoteWorker, why: str) -> None:
        if self.workers.get(worker.number) is not worker:
            return
        del self.workers[worker.number]
        self._away.discard(worker)
        self._ray.kill(worker.handle)
        worker.leave()
        if not self.workers:
            raise WorkersLost(f"no worker is left, and none can be started: {why}")
        left = f"{len(self.workers)} of {self.size} go on"
        self._notice(f"worker {worker.number} is given up ({why}); {left}")


def in_words(error: BaseException) -> str:
    """What Ray says of an end, without the table around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "memory" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines or [''])[0]}"
