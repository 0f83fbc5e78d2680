"""Waits for what workers answer, whether it comes through Ray or through a channel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

_TICK = 0.5  # seconds to wait at most
_BOTH = 0.002  # seconds between looks at one way, while the other is waited for, too
_MANY = 8  # references, from which on answers are collected together

Key = Any
"""What a call is known by: Ray's reference, or the number of a call through a channel."""


class Replies:
    """Calls under way, and the answers to them."""

    def __init__(self, ray: Any):
        self._ray = ray
        self._references: dict[Any, Any] = {}
        self._channels: dict[Connection[Any, Any], dict[int, Any]] = {}

    def __len__(self) -> int:
        return len(self._references) + sum(len(calls) for calls in self._channels.values())

    def expect(self, key: Key, call: Any, channel: Connection[Any, Any] | None = None) -> None:
        """There will be an answer to a call: with Ray's reference for a key, or through a channel
        with a number for one. `call` is given back with the answer."""
        if channel is None:
            self._references[key] = call
        else:
            self._channels.setdefault(channel, {})[key] = call

    def forget(self, calls: Sequence[Any]) -> None:
        """No longer wait for the answers to these calls."""
        gone = {id(call) for call in calls}
        for under_way in (self._references, *self._channels.values()):
            for key in [key for key, call in under_way.items() if id(call) in gone]:
                del under_way[key]

    def arrived(self) -> list[tuple[Any, Any]]:
        """Calls that were answered, each with the answer or the error, once there are any; none
        after half a second."""
        for channel in [channel for channel in self._channels if channel.closed]:
            del self._channels[channel]  # whoever closed it wants no answers
        channels = [channel for channel, under_way in self._channels.items() if under_way]
        began = time.monotonic()
        while True:
            if not self._references and not channels:
                time.sleep(_BOTH)
                return []
            both = bool(self._references and channels)
            found = self._from_channels(channels, _BOTH if both else _TICK) if channels else []
            if self._references:
                found += self._from_ray(0.0 if channels else _TICK)
            if found or time.monotonic() - began > _TICK:
                return found

    def _from_channels(
        self, channels: list[Connection[Any, Any]], timeout: float
    ) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        for channel in wait(channels, timeout):
            assert isinstance(channel, Connection)
            under_way = self._channels[channel]
            try:
                number, reply = channel.recv()
            except (EOFError, OSError) as error:
                found += [(call, error) for call in under_way.values()]
                del self._channels[channel]
                continue
            if number in under_way:
                found.append((under_way.pop(number), reply))
        return found

    def _from_ray(self, timeout: float) -> list[tuple[Any, Any]]:
        done, rest = self._ray.wait(list(self._references), num_returns=1, timeout=timeout)
        if len(rest) > _MANY:
            # Others may be there too; asking once for all is cheaper than asking for each.
            done += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [
            (self._references.pop(reference), reply)
            for reference, reply in zip(done, self._fetched(done), strict=True)
        ]

    def _fetched(self, references: list[Any]) -> list[Any]:
        """Replies, or in their place the errors."""
        try:
            return list(self._ray.get(references))
        except Exception:
            return [self._one(reference) for reference in references]

    def _one(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except Exception as error:
            return error
