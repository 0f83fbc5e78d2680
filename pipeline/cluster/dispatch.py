"""A group of Ray actors: who gets which job, and what happens when one dies or hangs.

    driver                                   worker (x N)
    ------                                   ------------
    put(θ) ──────── object reference ──────▶ (first use on a node fetches it)
    idle worker?  ── GradientJob(t, c) ────▶ sample chunk c of iteration t, compute
    results[c]    ◀─ ChunkResult ─────────── return the gradient sum; when idle, sample t + 1
    ... until every chunk of t is there; the order of arrival does not matter.

Idle workers pull the next job, so a slow one gets fewer. A job whose worker died is issued again; a
job that is overdue is issued a second time and the first answer wins; answers to an earlier round
are discarded. Workers may join late and come back after a restart: nothing depends on who they are.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.actor import ChunkActor
from pipeline.cluster.connection import (
    as_text,
    cluster_address,
    connect,
    lacking,
    refuse_or_wait,
    worker_bundle,
)
from pipeline.cluster.group import Notice, Round, WorkersLost
from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.jobs import FOLLOW_UPS, ChunkResult, GradientJob, Job

_TICK = 0.5  # seconds between checks for overdue jobs
_QUIET = 20.0  # seconds between notices that no worker has started yet
_SHORTEST_TIMEOUT = 30.0  # seconds
_FIRST_TIMEOUT = 600.0  # seconds, as long as no chunk has been answered
_REPLACED_AFTER = 3  # timeouts without an answer
_PATIENCE = 1200.0  # seconds without any worker; a new one may have to compile, and wait for that
_JOBS_AHEAD = 2  # a worker goes on with its second job while the answer to the first travels
_MANY = 8  # with more calls under way, all answers that are there are collected at once


@dataclass(eq=False)
class _Worker:
    """An actor, as the driver knows it."""

    number: int
    handle: Any
    """Ray's handle of the actor."""
    pid: int | None = None
    """Its process id; None until it has answered that it is ready."""
    ready_again: float = 0.0
    """When to ask a restarting worker whether it is ready (time.monotonic)."""
    calls: list[_Call] = field(default_factory=list)
    """The calls that it has not answered yet, oldest first."""


@dataclass(eq=False)
class _Call:
    """Something that a worker was asked to do."""

    worker: _Worker
    started: float
    """When the worker could begin with it (time.monotonic)."""
    round: int = -1
    """Number of the `run` that it belongs to; -1 for the question whether the worker is ready."""
    job: int = -1
    """Position in the jobs of that `run`."""
    what: Job | None = None
    issued_again: bool = False
    """Whether another worker has been given the same job."""


class RayWorkers:
    """A group of Ray actors."""

    def __init__(self, experiment: Experiment, compile: bool, size: int, notice: Notice):
        """Start `size` actors and wait for the first one; the others join when they are ready.

        Raises ValueError where Ray has no room for them and cannot grow, WorkersLost, and what
        building a worker raises.
        """
        import ray

        self._ray = ray
        self.size = size
        self._experiment = experiment
        self._compile = compile
        self._bundle = worker_bundle(experiment)
        self._notice = notice
        self._started_ray = connect(experiment, size)
        self._round = 0
        self._lost_since: float | None = None
        self._replaced = 0
        self._looked = 0.0
        """When it was last checked whether a job is overdue (time.monotonic)."""
        self._warned: set[str] = set()
        self._durations: dict[type, deque[float]] = {}
        """Seconds that the last jobs took, by class of job."""
        self._holders: dict[int, _Worker] = {}
        """The worker that has the trajectories of a chunk, by its number; any other would have to
        collect them again before it can answer a follow-up."""
        self._calls: dict[Any, _Call] = {}
        self._actor = ray.remote(ChunkActor).options(
            num_cpus=experiment.cluster.cpus_per_worker,
            num_gpus=experiment.cluster.gpus_per_worker,
            max_restarts=-1,
            max_concurrency=_JOBS_AHEAD + 1,
        )
        # Small plain arguments: a restart must not need an object that may be gone.
        self._arguments = (experiment, compile, [os.getcwd()])
        self._workers: list[_Worker] = []
        try:
            refuse_or_wait(experiment, lacking("a worker takes", [self._bundle]), notice)
            self._had_room = self._has_room()
            self._workers += [_Worker(number, self._new_actor()) for number in range(size)]
            self._wait_for_first_worker()
        except BaseException:
            self.close()
            raise

    def run(self, theta: FlatVector, jobs: Sequence[Job]) -> Round:
        self._round += 1
        reference = self._ray.put(theta)
        waiting = deque(range(len(jobs)))
        answers: dict[int, ChunkResult] = {}
        busy: dict[int, float] = {}
        while len(answers) < len(jobs):
            self._assign(reference, jobs, waiting, answers)
            settled = self._wait()
            for call, answer in settled:
                if call.round != self._round:
                    continue
                if answer is None:
                    waiting.appendleft(call.job)
                elif call.job not in answers:
                    answers[call.job] = answer
                    seconds = answer.seconds_sampling + answer.seconds_computing
                    busy[call.worker.number] = busy.get(call.worker.number, 0.0) + seconds
            if time.monotonic() - self._looked > _TICK:
                self._looked = time.monotonic()
                self._issue_overdue_again(waiting, answers)
        return Round([answers[n] for n in range(len(jobs))], max(busy.values()))

    def pids(self) -> list[int]:
        """Process ids of the workers that are ready, in no order."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.handle)
        if self._started_ray:
            self._ray.shutdown()

    def _new_actor(self) -> Any:
        return self._actor.remote(*self._arguments)

    def _assign(
        self,
        reference: Any,
        jobs: Sequence[Job],
        waiting: deque[int],
        answers: dict[int, ChunkResult],
    ) -> None:
        """Give waiting jobs to workers: first to those with no job, then to those with one."""
        for load in range(_JOBS_AHEAD):
            for worker in self._workers:
                if worker.pid is None or len(worker.calls) != load:
                    continue
                job = self._next(worker, jobs, waiting, answers)
                if job is None:
                    continue
                ref = worker.handle.run.remote(reference, jobs[job])
                self._note(ref, _Call(worker, time.monotonic(), self._round, job, jobs[job]))

    def _next(
        self,
        worker: _Worker,
        jobs: Sequence[Job],
        waiting: deque[int],
        answers: dict[int, ChunkResult],
    ) -> int | None:
        """The job that a worker is to do next, or None; follow-ups go to the worker that has the
        trajectories, as long as it is there."""
        for job in list(waiting):
            if job in answers:
                waiting.remove(job)
                continue
            asked = jobs[job]
            holder = self._holders.get(asked.chunk) if isinstance(asked, FOLLOW_UPS) else None
            if holder in (None, worker) or holder not in self._workers or holder.pid is None:
                waiting.remove(job)
                return job
        return None if isinstance(jobs[0], FOLLOW_UPS) else self._stolen(worker, answers)

    def _stolen(self, thief: _Worker, answers: dict[int, ChunkResult]) -> int | None:
        """For a worker with nothing to do: a job that waits behind another job of its worker."""
        if thief.calls:
            return None
        for worker in self._workers:
            calls = [call for call in worker.calls if call.job not in answers]
            last = calls[-1] if len(calls) > 1 else None
            if last is not None and last.round == self._round and not last.issued_again:
                last.issued_again = True
                return last.job
        return None

    def _note(self, ref: Any, call: _Call) -> None:
        self._calls[ref] = call
        call.worker.calls.append(call)

    def _wait(self) -> list[tuple[_Call, ChunkResult | None]]:
        """Wait for calls to end; returns those of jobs, with their answer or None if it was lost.

        Raises WorkersLost, and what a job raised.
        """
        for worker in self._workers:
            due = worker.pid is None and time.monotonic() >= worker.ready_again
            if due and not worker.calls:
                self._note(worker.handle.ready.remote(), _Call(worker, time.monotonic()))
        if self._lost_since is not None and time.monotonic() - self._lost_since > _PATIENCE:
            raise WorkersLost(f"no worker has come back for {_PATIENCE:.0f} s")
        if not self._calls:
            if not self._workers:
                raise WorkersLost("all workers are gone and cannot be restarted")
            time.sleep(0.05)
            return []
        done, rest = self._ray.wait(list(self._calls), num_returns=1, timeout=_TICK)
        if len(rest) > _MANY:
            # Others may be there too; asking once for all is cheaper than asking for each.
            done += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        settled = []
        for ref in done:
            call = self._calls.pop(ref)
            call.worker.calls.remove(call)
            answer = self._answer(ref, call)
            if call.round >= 0:
                settled.append((call, answer))
        return settled

    def _answer(self, ref: Any, call: _Call) -> ChunkResult | None:
        """Take in the end of a call: its answer, or None where there is none - the worker was lost
        or has only said that it is ready. Raises what the job raised."""
        errors = self._ray.exceptions
        worker = call.worker
        try:
            answer = self._ray.get(ref)
        except errors.RayTaskError as error:
            # The computation itself failed, and would fail anywhere else too.
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except errors.ActorDiedError as error:
            if worker in self._workers:  # it may have had two jobs
                self._workers.remove(worker)
                self._notice(f"worker {worker.number} is gone for good: {_first_line(error)}")
            return None
        except errors.RayError as error:
            if worker.pid is not None:
                self._notice(
                    f"worker {worker.number} (process {worker.pid}) was lost; "
                    f"its chunk is computed elsewhere ({type(error).__name__})"
                )
            worker.pid, worker.ready_again = None, time.monotonic() + _TICK
            self._note_loss()
            return None
        if call.round < 0:
            worker.pid, warnings = answer
            self._lost_since = None
            for line in set(warnings) - self._warned:
                self._warned.add(line)
                self._notice(line)
            return None
        now = time.monotonic()
        self._durations.setdefault(type(call.what), deque(maxlen=64)).append(now - call.started)
        if isinstance(call.what, GradientJob):
            self._holders[call.what.chunk] = worker
        for next_call in worker.calls:
            next_call.started = now  # it was in the queue until now
        result: ChunkResult = answer
        return result

    def _note_loss(self) -> None:
        if not self.pids() and self._lost_since is None:
            self._lost_since = time.monotonic()

    def _timeout(self) -> float:
        """Seconds after which a job is overdue. They double with each replacement of a worker, so
        that work which takes long is done in the end."""
        limit = self._experiment.cluster.chunk_timeout
        if limit is None:
            if not self._durations:
                return _FIRST_TIMEOUT
            # By the class of job that takes longest: any may have to collect trajectories again.
            longest = max(statistics.median(seconds) for seconds in self._durations.values())
            limit = max(_SHORTEST_TIMEOUT, 20 * longest)
        return float(limit * 2**self._replaced)

    def _issue_overdue_again(self, waiting: deque[int], answers: dict[int, ChunkResult]) -> None:
        """Put the jobs of workers that are silent for too long back into `waiting`, and replace
        those that stay silent."""
        limit, now = self._timeout(), time.monotonic()
        for worker in self._workers:
            calls = [call for call in worker.calls if call.round >= 0]
            silent = max((now - call.started for call in calls), default=0.0)
            if silent < limit:
                continue
            late = [call for call in calls if not call.issued_again]
            if late:
                self._notice(
                    f"worker {worker.number} (process {worker.pid}) has not answered for "
                    f"{silent:.1f} s; its work is issued again"
                )
            for call in late:
                call.issued_again = True
                if call.round == self._round and call.job not in answers:
                    waiting.appendleft(call.job)
                self._holders = {c: w for c, w in self._holders.items() if w is not worker}
            if silent > _REPLACED_AFTER * limit:
                self._notice(f"worker {worker.number} (process {worker.pid}) is replaced")
                self._calls = {r: c for r, c in self._calls.items() if c.worker is not worker}
                worker.calls.clear()
                self._ray.kill(worker.handle)
                worker.handle, worker.pid = self._new_actor(), None
                self._replaced += 1
                self._note_loss()

    def _wait_for_first_worker(self) -> None:
        began = told = time.monotonic()
        while not self.pids():
            self._wait()
            now = time.monotonic()
            if now - told > _QUIET:
                told = now
                self._notice(self._waiting_for(now - began))

    def _waiting_for(self, seconds: float) -> str:
        """Why no worker has started after so many seconds, in words."""
        workers = "the worker" if self.size == 1 else f"the first of {self.size} workers"
        if self._had_room:
            work = "import torch and compile" if self._compile else "import torch"
            return f"{workers} is starting, for {seconds:.0f} s now: processes {work}"
        free = self._ray.available_resources()
        return (
            f"waiting for room, for {seconds:.0f} s now: {workers} takes "
            f"{as_text(self._bundle)}, and others hold what Ray has (free are "
            f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU)"
        )

    def _has_room(self) -> bool:
        """Whether Ray has room for a worker right now. Only asked before the first one starts,
        because that one takes the room."""
        if cluster_address(self._experiment) is None:
            return True  # nobody else is there
        if self._ray.util.get_current_placement_group() is not None:
            return True  # reserved for us, as for a trial
        free = self._ray.available_resources()
        return all(amount <= free.get(kind, 0.0) for kind, amount in self._bundle.items())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
