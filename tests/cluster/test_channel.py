"""A channel carries questions and answers, opens with its key only, ends with either process."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.cluster.channel import ChannelAddress, connect_to, listen
from pipeline.cluster.hub import Hub
from pipeline.cluster.messages import Failed, InMemory, Reply, opened
from pipeline.cluster.replies import Replies
from tests.helpers import silent_listener


class Unportable(Exception):
    """Holds what cannot be sent."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def answered(what: str, number: int, place: InMemory | None) -> Future[Any]:
    future: Future[Any] = Future()
    if what == "answer":
        future.set_result(Reply(None))
    elif what == "fail":
        future.set_exception(ZeroDivisionError("on purpose"))
    elif what == "lock":
        future.set_exception(Unportable())
    return future


@pytest.fixture
def hub() -> Hub:
    """One worker, number 0, in this process."""
    found = Hub(3, "float32")
    found.open(0)
    assert found.connect(0, listen(answered))
    return found


def ask(hub: Hub, number: int, what: str, worker: int = 0) -> None:
    hub.ask(worker, number, what, pickle.dumps((what, number)), apart=True)


def arrived(replies: Replies) -> list[tuple[Any, Any]]:
    """The next answers, whenever they come."""
    while True:
        found = replies.arrived()
        if found:
            return found


def test_questions_and_answers(hub: Hub) -> None:
    replies = Replies(None, hub)
    for number, what in enumerate(["answer", "fail", "lock"]):
        ask(hub, number, what)
    found = dict(reply for _ in range(3) for reply in arrived(replies))
    assert not hub.busy
    assert found["answer"] == Reply(None)
    assert isinstance(found["fail"], Failed)
    assert isinstance(found["fail"].cause, ZeroDivisionError)
    assert "Unportable: holds a lock" in str(found["lock"].cause)


def test_only_with_the_key() -> None:
    address = listen(answered)
    assert connect_to(address._replace(key=b"another")) is None
    channel = connect_to(address)  # still open for who has it
    assert channel is not None
    channel.send((1, None, pickle.dumps(("answer", 4))))
    number, apart, content = channel.recv()
    assert (number, apart, opened(content)) == (1, False, Reply(None))
    assert connect_to(ChannelAddress("\0maml-nobody", b"")) is None


def test_what_a_closed_worker_was_asked_does_not_come(hub: Hub) -> None:
    hub.open(1)
    assert hub.connect(1, listen(answered))
    ask(hub, 1, "answer")
    ask(hub, 2, "answer", worker=1)
    hub.close(0)
    assert arrived(Replies(None, hub)) == [("answer", Reply(None))]
    assert not hub.busy


def test_a_killed_process_is_noticed_at_once(hub: Hub) -> None:
    with silent_listener() as (process, address):
        hub.open(1)
        assert hub.connect(1, address)
        ask(hub, 1, "lost", worker=1)
        os.kill(process.pid, signal.SIGKILL)
        ((call, error),) = arrived(Replies(None, hub))
    assert call == "lost"
    assert isinstance(error, (EOFError, OSError))


@pytest.mark.parametrize("calls", [0, 1])
def test_waiting_for_nothing_ends(calls: int, hub: Hub) -> None:
    if calls:
        ask(hub, 1, "never answered")
    assert Replies(None, hub).arrived() == []
