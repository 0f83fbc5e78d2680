"""A channel carries questions and answers, opens with its key only, ends with either process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.cluster.channel import ChannelAddress, Failed, connect_to, listen
from pipeline.cluster.replies import Replies


class Unportable(Exception):
    """Holds what cannot be sent."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def answered(what: str, number: int) -> Future[int]:
    future: Future[int] = Future()
    if what == "double":
        future.set_result(2 * number)
    elif what == "fail":
        future.set_exception(ZeroDivisionError("on purpose"))
    else:
        future.set_exception(Unportable())
    return future


def arrived(replies: Replies) -> list[tuple[Any, Any]]:
    """The next answers, whenever they come."""
    while True:
        found = replies.arrived()
        if found:
            return found


def test_questions_and_answers() -> None:
    channel = connect_to(listen(answered))
    assert channel is not None
    replies = Replies(ray=None)
    for number, what in enumerate(["double", "fail", "lock"]):
        replies.expect(number, what, channel)
        channel.send((number, (what, 21)))
    found = dict(reply for _ in range(3) for reply in arrived(replies))
    assert len(replies) == 0
    assert found["double"] == 42
    assert isinstance(found["fail"], Failed)
    assert isinstance(found["fail"].cause, ZeroDivisionError)
    assert "Unportable: holds a lock" in str(found["lock"].cause)


def test_only_with_the_key() -> None:
    address = listen(answered)
    assert connect_to(address._replace(key=b"another")) is None
    channel = connect_to(address)  # still open for who has it
    assert channel is not None
    channel.send((1, ("double", 4)))
    assert channel.recv() == (1, 8)
    assert connect_to(ChannelAddress("\0maml-nobody", b"")) is None


def test_what_is_forgotten_does_not_come() -> None:
    channel = connect_to(listen(answered))
    assert channel is not None
    replies = Replies(ray=None)
    replaced = "a call of a worker that was replaced"
    replies.expect(1, replaced, channel)
    replies.expect(2, "wanted", channel)
    replies.forget([replaced])
    channel.send((1, ("double", 1)))
    channel.send((2, ("double", 2)))
    assert arrived(replies) == [("wanted", 4)]
    replies.expect(3, "never", channel)
    channel.close()
    assert replies.arrived() == []
    assert len(replies) == 0


def test_a_killed_process_is_noticed_at_once() -> None:
    script = (
        "import sys\nfrom concurrent.futures import Future\n"
        "from pipeline.cluster.channel import listen\n"
        "address = listen(lambda: Future())\n"
        "print(address.name[1:], address.key.hex(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name, key = process.stdout.readline().split()
        channel = connect_to(ChannelAddress("\0" + name, bytes.fromhex(key)))
        assert channel is not None
        replies = Replies(ray=None)
        replies.expect(1, "lost", channel)
        channel.send((1, ()))
        os.kill(process.pid, signal.SIGKILL)
        ((call, error),) = arrived(replies)
    assert call == "lost"
    assert isinstance(error, (EOFError, OSError))


@pytest.mark.parametrize("calls", [0, 1])
def test_waiting_for_nothing_ends(calls: int) -> None:
    channel = connect_to(listen(answered))
    assert channel is not None
    replies = Replies(ray=None)
    if calls:
        replies.expect(1, "never answered", channel)
    assert replies.arrived() == []
