"""Waits for what workers answer, whether it comes through Ray or to the hub of this process."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from pipeline.cluster.hub import Hub
from pipeline.cluster.messages import Reply, opened

_TICK = 0.5  # seconds to wait at most
_BOTH = 0.002  # seconds between looks at one way, while the other is waited for, too
_MANY = 8  # references, from which on answers are collected together


class Replies:
    """Calls under way, and the answers to them."""

    def __init__(self, ray: Any, hub: Hub | None):
        self._ray, self._hub = ray, hub
        self._references: dict[Any, Any] = {}

    def expect(self, reference: Any, call: Any) -> None:
        """There will be an answer to a call of Ray; `call` is given back with it."""
        self._references[reference] = call

    def forget(self, calls: Collection[Any]) -> None:
        """Wait no longer for these calls of Ray."""
        gone = {id(call) for call in calls}
        self._references = {r: call for r, call in self._references.items() if id(call) not in gone}

    def arrived(self) -> list[tuple[Any, Any]]:
        """Calls that were answered, each with the answer or the error, once there are any; none
        after half a second."""
        began = time.monotonic()
        while True:
            hub = self._hub if self._hub is not None and self._hub.busy else None
            if hub is None and not self._references:
                time.sleep(_BOTH)
                return []
            found: list[tuple[Any, Any]] = []
            if hub is not None:
                timeout = _BOTH if self._references else _TICK
                for call, content, vector in hub.arrived(timeout):
                    reply = opened(content)
                    if vector is not None:
                        assert isinstance(reply, Reply)
                        reply = reply.joined(vector)
                    found.append((call, reply))
            if self._references:
                found += self._from_ray(0.0 if hub is not None else _TICK)
            if found or time.monotonic() - began > _TICK:
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

    def _fetched(self, references: Collection[Any]) -> list[Any]:
        """Replies, or in their place the errors."""
        try:
            return list(self._ray.get(list(references)))
        except Exception:
            return [self._one(reference) for reference in references]

    def _one(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except Exception as error:
            return error
