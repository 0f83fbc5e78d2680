"""A worker as the driver knows it: an actor, where it is at home, and what it was asked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.cluster.messages import Addend, Ready
from pipeline.cluster.rounds import Piece, Round

_numbers = itertools.count(1)


@dataclass(eq=False)
class Call:
    """A question to a worker that is not answered yet."""

    worker: RemoteWorker
    started: float
    """When it began to be computed, as far as the driver can know (time.monotonic)."""
    round: Round | None = None
    """None: the question whether the worker is ready."""
    piece: Piece | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    issued_again: bool = False


class Home(Protocol):
    """A node that asks its workers by a way of its own."""

    def ask(self, call: Call, arguments: bytes, addend: Addend | None) -> None:
        """Put a question to a worker that is at home here; `arguments` are those of
        `ChunkActor.run` but the last, pickled. It may wait until `Nodes.flush`."""
        ...

    def leave(self, worker: RemoteWorker) -> None:
        """A worker's process has ended, or is not asked here any more."""
        ...


class RemoteWorker:
    """An actor, and the calls that it has."""

    def __init__(self, number: int, handle: Any):
        self.number, self.handle, self.identity = number, handle, next(_numbers)
        """`identity`: unlike `number`, no successor has it."""
        self.pid: int | None = None
        """None until it answered that it is ready."""
        self.node = ""
        """Ray's id of the node that it is on."""
        self.home: Home | None = None
        """Who asks it; None: it is called itself."""
        self.at_home = False
        """Whether its home has told that it can ask it."""
        self.ready_again = 0.0
        """When to ask a restarting worker next (time.monotonic)."""
        self.restarts_when_ready = -1
        """How often Ray had restarted it when it was ready last; -1 before it was."""
        self.calls: list[Call] = []
        """What it has been asked and not answered yet, in this order."""

    def __str__(self) -> str:
        process = "" if self.pid is None else f" (process {self.pid})"
        return f"worker {self.number}{process}"

    def answered(self, call: Call, now: float) -> None:
        """A call has ended; the next one begins."""
        self.calls.remove(call)
        for following in self.calls[:1]:
            following.started = now

    def is_ready(self, ready: Ready) -> None:
        """Take in the answer to the question whether it is ready."""
        self.pid, self.node = ready.pid, ready.node

    def leave(self) -> None:
        """From now on it is called itself, if at all."""
        if self.home is not None:
            self.home.leave(self)
        self.home, self.at_home = None, False
