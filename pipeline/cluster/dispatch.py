"""A group of Ray actors: who gets which piece of work, and what happens when one dies or hangs.

    driver                                   worker (x N)
    ------                                   ------------
    θ ──────── shared memory, or put ──────▶ (read once per iteration)
    idle worker?  ── block of chunks ──────▶ sample, adapt, differentiate; chunk after chunk
    tree of sums  ◀─ sum of the block ────── metrics by message, the vector by shared memory
    ... until the tree is complete; the order of arrival does not matter.

Idle workers pull the next piece; when there is none, they take over what waits behind another piece
elsewhere. A piece whose worker died is given out again, in two halves; one that is overdue is given
out a second time, and the first answer wins; answers to an earlier round are discarded. Workers may
join late and come back after a restart: nothing depends on who they are.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.cluster.capacity import lacking, refuse_or_wait, worker_bundle
from pipeline.cluster.connection import bytes_in_calls, connect
from pipeline.cluster.group import Notice, WorkersLost
from pipeline.cluster.messages import AHEAD, Failed, Reply
from pipeline.cluster.nodes import Nodes
from pipeline.cluster.remote_worker import Call, RemoteWorker
from pipeline.cluster.roster import Roster
from pipeline.cluster.rounds import ChunkSum, JobList, Piece, Round, Total, block_size
from pipeline.config.experiment import Experiment
from pipeline.maml.flat_vector import FlatVector
from pipeline.worker.jobs import (
    ChunkJob,
    Cut,
    GradientJob,
    Job,
    JobResult,
    described,
    tasks_per_chunk,
    units,
)
from pipeline.worker.tree import Span, blocks_of

_TICK = 0.5  # seconds between looks at what is overdue
_SHORTEST_TIMEOUT = 30.0
_FIRST_TIMEOUT = 600.0  # while nothing is known of how long a chunk takes
_REPLACED_AFTER = 3  # timeouts without an answer
_DEADLY = 3  # processes that a single chunk may end
_SECOND_OPINION = 60.0  # seconds that a piece waits for another worker than the one that failed


class RayWorkers:
    """A group of Ray actors."""

    def __init__(
        self, experiment: Experiment, compile: bool, size: int, notice: Notice, numbers: int
    ):
        """Returns when the first worker is ready. `numbers`: the size of θ."""
        import ray

        self._ray, self._experiment, self._notice = ray, experiment, notice
        self._looked = time.monotonic()
        """When overdue workers were last looked for (time.monotonic)."""
        self._durations: dict[type, deque[float]] = {}
        """Seconds per chunk, or job, of the last calls, by kind of job."""
        self._holders: list[tuple[Span, int]] = []
        """Which worker, by number, acted out which chunks in the last gradient round."""
        self._free: list[deque[RemoteWorker]] = [deque() for _ in range(AHEAD)]
        """Ready workers by the number of their calls; entries may be out of date."""
        self._second: deque[Call] = deque()
        """Calls that waited behind another one when they were made."""
        per_batch = experiment.outer.tasks_per_batch
        self._cut = Cut(per_batch, tasks_per_chunk(experiment, numbers, compile))
        self._started_ray = connect(experiment, size)
        self._roster = Roster(ray, experiment, compile, size, notice)
        self._nodes = Nodes(
            ray,
            self._roster.workers,
            numbers,
            experiment.compute.dtype,
            bytes_in_calls(experiment),
            notice,
        )
        try:
            refuse_or_wait(
                experiment, lacking("a worker takes", [worker_bundle(experiment)]), notice
            )
            self._roster.start()
            began = time.monotonic()
            while not self._roster.pids:
                self._wait()
                self._roster.tell_of_waiting(began)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._roster.size

    @property
    def ready(self) -> int:
        return len(self._roster.pids)

    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return self._roster.pids

    def run(self, theta: FlatVector, jobs: Sequence[Job]) -> list[JobResult]:
        round = JobList(jobs)
        self._finish(round, theta, None)
        return round.answers()

    def total(
        self,
        theta: FlatVector,
        ask: Callable[[Span], ChunkJob],
        num_chunks: int,
        vector: FlatVector | None = None,
    ) -> Total:
        gradients = isinstance(ask(Span(0, num_chunks)), GradientJob)
        blocks: Sequence[tuple[Span, int | None]] = self._holders
        if gradients or not blocks:
            size = block_size(num_chunks, self.ready, self._median(GradientJob))
            blocks = [(block, None) for block in blocks_of(num_chunks, size)]
        round = ChunkSum(ask, num_chunks, blocks)
        self._finish(round, theta, vector)
        if gradients:
            self._holders = round.answered_by()
        return round.total()

    def close(self) -> None:
        self._nodes.close()
        self._roster.close()
        if self._started_ray:
            self._ray.shutdown()

    def _finish(self, round: Round, theta: FlatVector, vector: FlatVector | None) -> None:
        self._nodes.begin(round, theta, vector)
        self._line_up()
        replaced = self._roster.replaced
        while not round.done:
            self._assign(round)
            for call, reply in self._wait(patient=not round.waiting):
                if call.round is round and call.piece is not None:
                    self._take_in(round, call.worker, call.piece, reply)
            if time.monotonic() - self._looked > _TICK:
                self._looked = time.monotonic()
                self._issue_overdue_again(round)
                self._roster.look_for_leaving()
                self._roster.tell_of_missing()
        if self._roster.replaced == replaced:
            self._roster.replaced = 0  # time-outs come back

    def _line_up(self) -> None:
        """Workers of a node stand together: they get neighbouring blocks, whose sum is one vector.
        In every round it is the same order, so that who prepared for a block gets it."""
        for free in self._free:
            free.clear()
        for worker in sorted(self._roster.workers.values(), key=lambda w: (w.node, w.number)):
            self._note_free(worker)

    def _take_in(
        self, round: Round, worker: RemoteWorker, piece: Piece, reply: Reply | None
    ) -> None:
        """A piece was answered, or lost (None)."""
        answer = None if reply is None else reply.answer
        if answer is not None:
            round.accept(piece, answer, worker.number, apart=reply is not None and reply.apart)
        elif round.needs(piece):
            round.waiting.extendleft(reversed(round.parts(piece)))

    def _assign(self, round: Round) -> None:
        """Give pieces to the workers that have the fewest, while there are pieces."""
        for load, free in enumerate(self._free):
            unsuited = []
            while free:
                worker = free[0]
                if not self._roster.takes(worker) or len(worker.calls) != load:
                    free.popleft()  # out of date
                    continue
                piece = self._next(round, worker)
                if piece is None and load == 0:
                    piece = self._taken_over(round)
                if piece is None:
                    if not round.waiting:
                        break
                    unsuited.append(free.popleft())  # for it alone there is nothing
                    continue
                free.popleft()
                call = Call(worker, time.monotonic(), round, piece)
                worker.calls.append(call)
                self._nodes.ask(call)
                if load:
                    self._second.append(call)
                self._note_free(worker)
            free.extend(unsuited)

    def _next(self, round: Round, worker: RemoteWorker) -> Piece | None:
        """The first waiting piece that this worker may have."""
        for _ in range(len(round.waiting)):
            piece = round.waiting.popleft()
            if not round.needs(piece):
                continue
            if self._suits(piece, worker):
                return piece
            round.waiting.append(piece)
        return None

    def _suits(self, piece: Piece, worker: RemoteWorker) -> bool:
        """Not who failed at it while there are others; who has what it asks about, if anybody."""
        if piece.refused_by == worker.number and len(self._roster.workers) > 1:
            # Others may still be starting, but they may also never find room.
            return time.monotonic() - piece.refused_at > _SECOND_OPINION
        holder = self._roster.workers.get(piece.held_by) if piece.held_by is not None else None
        return holder in (None, worker) or holder.pid is None

    def _taken_over(self, round: Round) -> Piece | None:
        """For a worker with nothing to do: what waits behind another call elsewhere."""
        while self._second:
            call = self._second.pop()
            behind = call.worker.calls and call.worker.calls[0] is not call
            if call.round is not round or call.issued_again or call.piece is None or not behind:
                continue
            if call.piece.held_by is None and round.needs(call.piece):
                call.issued_again = True
                first, *rest = round.parts(call.piece)
                round.waiting.extend(rest)
                return first
        return None

    def _note_free(self, worker: RemoteWorker) -> None:
        if self._roster.takes(worker) and len(worker.calls) < AHEAD:
            self._free[len(worker.calls)].append(worker)

    def _wait(self, patient: bool = False) -> list[tuple[Call, Reply | None]]:
        """Calls of rounds that have ended, with the reply, or None where the piece was lost;
        `patient`: there is no more work for who is early."""
        for worker in self._roster.to_ask():
            # The first answer comes when everything is compiled.
            call = Call(worker, time.monotonic())
            worker.calls.append(call)
            self._nodes.replies.expect(worker.handle.ready.remote(), call)
        self._nodes.flush(patient)
        settled = []
        for what, reply in self._nodes.replies.arrived():
            for call, each in [(what, reply)] if isinstance(what, Call) else what(reply) or []:
                if call in call.worker.calls:  # otherwise it has been replaced meanwhile
                    settled.append((call, self._settled(call, each)))
        return settled

    def _settled(self, call: Call, reply: Any) -> Reply | None:
        """The reply to a call, unless it is an error or another question's; see to the worker."""
        begun, now = call.worker.calls[0] is call, time.monotonic()
        call.worker.answered(call, now)
        found = None
        if isinstance(reply, Failed):
            self._failed(call, reply.cause)
        elif isinstance(reply, BaseException):
            self._lost(call, reply, begun)
        elif isinstance(reply, Reply) and call.piece is not None:
            found = reply
            if reply.answer is not None:
                seconds = (now - call.started) / units(call.piece.job)
                kind = type(call.piece.job)
                self._durations.setdefault(kind, deque(maxlen=64)).append(seconds)
        else:
            self._roster.ready(call.worker, reply)
            self._nodes.attach(call.worker)
        self._note_free(call.worker)
        return found

    def _lost(self, call: Call, error: BaseException, begun: bool) -> None:
        """A call ended without an answer: its computation failed, or the process ended."""
        errors = self._ray.exceptions
        if isinstance(error, errors.RayTaskError):
            self._failed(call, error.cause if isinstance(error.cause, Exception) else error)
        elif isinstance(error, errors.RayError | EOFError | OSError):
            if begun and call.piece is not None and call.worker.pid is not None:
                self._blame(call, error)
            self._roster.lost(call.worker, error)
        else:
            raise error

    def _blame(self, call: Call, error: BaseException) -> None:
        """Count a process that ended while it computed a piece. Raises WorkersLost."""
        assert call.piece is not None
        assert call.round is not None
        call.piece.deaths += 1
        if call.piece.deaths >= _DEADLY and len(call.round.parts(call.piece)) == 1:
            raise WorkersLost(
                f"{described(call.piece.job, self._cut)} ended {call.piece.deaths} processes in "
                "turn, and would end the next one, too; the last one: "
                f"{self._roster.why_lost(call.worker, error)}"
            )

    def _failed(self, call: Call, cause: Exception) -> None:
        """An error of a computation is believed, and raised, when a second worker meets it."""
        if call.piece is None:
            self._roster.refused(call.worker, cause)
        elif call.piece.refused_by is None and len(self._roster.workers) > 1:
            call.piece.refused_by, call.piece.refused_at = call.worker.number, time.monotonic()
            why = f"{type(cause).__name__}: {cause}"
            self._notice(f"{call.worker} failed ({why}); another one tries the same")
        else:
            raise cause

    def _median(self, kind: type) -> float | None:
        """Seconds per chunk of a kind of job, once it is known."""
        seconds = self._durations.get(kind)
        return statistics.median(seconds) if seconds else None

    def _timeout(self) -> float:
        """Seconds for a chunk after which it is overdue; longer after each replacement, so that
        work which simply takes that long is done in the end."""
        limit = self._experiment.cluster.chunk_timeout
        if limit is None:
            if not self._durations:
                return _FIRST_TIMEOUT
            # The longest kind of job: any may have to collect its trajectories again.
            longest = max(statistics.median(seconds) for seconds in self._durations.values())
            limit = max(_SHORTEST_TIMEOUT, 20 * longest)
        return float(limit * 2**self._roster.replaced)

    def _issue_overdue_again(self, round: Round) -> None:
        limit, now = self._timeout(), time.monotonic()
        for worker in list(self._roster.workers.values()):
            pieces = [(call, call.piece) for call in worker.calls if call.piece is not None]
            silent = max(((now - c.started) / units(p.job) for c, p in pieces), default=0.0)
            if silent < limit:
                continue
            late = [(call, piece) for call, piece in pieces if not call.issued_again]
            if late:
                seconds = now - late[0][0].started
                self._notice(
                    f"{worker} has not answered for {seconds:.1f} s; its work is issued again"
                )
            for call, piece in late:
                call.issued_again = True
                if call.round is round and round.needs(piece):
                    round.waiting.appendleft(replace(piece, held_by=None))
            self._holders = [(span, n) for span, n in self._holders if n != worker.number]
            if silent > _REPLACED_AFTER * limit:
                self._nodes.replies.forget(worker.calls)
                self._roster.replace(worker)
