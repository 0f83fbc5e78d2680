"""Questions and answers between the driver and a worker of its own machine, beside Ray's calls.

A call of Ray takes a millisecond or two, there and back, as much as a small chunk takes to compute.
Where both processes are on one machine they talk through a socket instead. It has no file, opens
only for who has the key, which Ray carries, and ends with either process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple


class ChannelAddress(NamedTuple):
    """Where a worker listens."""

    name: str
    """Of the socket, in the abstract name space (see unix(7))."""
    key: bytes


class Failed(NamedTuple):
    """An answer: the computation raised an error."""

    cause: Exception


def listen(answer: Callable[..., Future[Any]]) -> ChannelAddress:
    """Answer the questions of one driver, in a thread of its own, until it closes the connection.

    `answer` gets the arguments of a question. Raises OSError where there are no such sockets.
    """
    name = f"\0maml-{os.getpid()}-{secrets.token_hex(8)}"
    address = ChannelAddress(name, secrets.token_bytes(32))
    listener = Listener(name, "AF_UNIX", authkey=address.key)

    def serve() -> None:
        with listener, _accepted(listener) as connection:
            listener.close()
            while True:
                try:
                    number, arguments = connection.recv()
                except (EOFError, OSError):
                    return  # the driver has ended, or asks in another way
                answer(*arguments).add_done_callback(_Reply(connection, number))

    threading.Thread(target=serve, name="channel", daemon=True).start()
    return address


def _accepted(listener: Listener) -> Connection[Any, Any]:
    """The first who has the key."""
    while True:
        with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):
            connection = listener.accept()
            assert isinstance(connection, Connection)
            return connection


class _Reply:
    """Sends an answer as soon as it is there, from the thread that found it."""

    def __init__(self, connection: Connection[Any, Any], number: int):
        self._connection, self._number = connection, number

    def __call__(self, done: Future[Any]) -> None:
        error = done.exception()
        reply = done.result() if error is None else Failed(_portable(error))
        with contextlib.suppress(OSError):  # nobody is there to hear it
            self._connection.send((self._number, reply))


def _portable(error: BaseException) -> Exception:
    """An error that can be sent: most can, some have parts that cannot."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def connect_to(address: ChannelAddress) -> Connection[Any, Any] | None:
    """The driver's end: `send((number, arguments))`, and `recv()` gives (number, answer).

    None where it cannot be reached.
    """
    try:
        return Client(address.name, "AF_UNIX", authkey=address.key)
    except (OSError, EOFError, AuthenticationError):
        return None
