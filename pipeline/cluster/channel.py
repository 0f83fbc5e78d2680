"""Questions and answers between a worker and another process of its machine, beside Ray's calls.

A call of Ray takes a millisecond or two, there and back, as much as a small chunk takes to compute.
Where both processes are on one machine they talk through a socket instead. It has no file, opens
only for who has the key, which Ray carries, and ends with either process.

Who asks sends (number, where to put the vector of the answer, pickled arguments) and gets (number,
whether the vector is there, pickled reply).
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

from pipeline.cluster.messages import Failed, Reply


class ChannelAddress(NamedTuple):
    """Where a worker listens."""

    name: str
    """Of the socket, in the abstract name space (see unix(7))."""
    key: bytes


def listen(answer: Callable[..., Future[Reply]]) -> ChannelAddress:
    """Answer the questions of one process, in a thread of its own, until it closes the connection.

    `answer` gets the arguments of a question, then the place for the vector. Raises OSError where
    there are no such sockets.
    """
    name = f"\0maml-{os.getpid()}-{secrets.token_hex(8)}"
    address = ChannelAddress(name, secrets.token_bytes(32))
    listener = Listener(name, "AF_UNIX", authkey=address.key)

    def serve() -> None:
        with listener, _accepted(listener) as connection:
            listener.close()
            while True:
                try:
                    number, place, arguments = connection.recv()
                except (EOFError, OSError):
                    return  # who asked has ended, or asks in another way
                done = answer(*pickle.loads(arguments), place)
                done.add_done_callback(_Sender(connection, number))

    threading.Thread(target=serve, name="channel", daemon=True).start()
    return address


def _accepted(listener: Listener) -> Connection[Any, Any]:
    """The first who has the key."""
    while True:
        with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):
            connection = listener.accept()
            assert isinstance(connection, Connection)
            return connection


class _Sender:
    """Sends an answer as soon as it is there, from the thread that found it."""

    def __init__(self, connection: Connection[Any, Any], number: int):
        self._connection, self._number = connection, number

    def __call__(self, done: Future[Reply]) -> None:
        error = done.exception()
        reply = done.result() if error is None else Failed(_portable(error))
        apart = isinstance(reply, Reply) and reply.apart
        with contextlib.suppress(OSError):  # nobody is there to hear it
            self._connection.send((self._number, apart, pickle.dumps(reply)))


def _portable(error: BaseException) -> Exception:
    """An error that can be sent: most can, some have parts that cannot."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def connect_to(address: ChannelAddress) -> Connection[Any, Any] | None:
    """The end of who asks; None where the worker cannot be reached."""
    try:
        return Client(address.name, "AF_UNIX", authkey=address.key)
    except (OSError, EOFError, AuthenticationError):
        return None
