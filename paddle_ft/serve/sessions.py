"""The state of sessions for pipelines: that of the group, or of one replica alone."""

from __future__ import annotations

import time
from collections.abc import Mapping

from paddle_ft.serve.ledger import Bounds, Ledger, marker_of, name_of
from paddle_ft.serve.log import Kind, Log, State, joined
from paddle_ft.serve.replicated import Replicated

TERM = 1
"""Of a replica alone, which is its own primary."""


class GroupSessions:
    """``types.Sessions`` over what the group keeps, on any replica.

    One that is not the primary passes changes on to it. Before it reads, it has the primary note
    something that changes nothing, and waits until it has that itself: what was acknowledged to a
    client before, through whichever replica, comes earlier in the log.
    """

    def __init__(self, group: Replicated) -> None:
        self._group = group

    async def get(self, session: str, key: str) -> bytes | None:
        name, at_least = name_of(session, key), None
        if self._group.role != "primary":
            at_least = await self._group.put_anywhere("state", marker_of(session), None)
        held = await self._group.get("state", name, at_least)
        return held.value if held is not None else None

    async def put(self, session: str, changes: Mapping[str, bytes], timeout_s: float) -> None:
        value = _joined(session, changes)
        await self._group.put_anywhere("states", session, value, timeout_s)


class LocalSessions:
    """``types.Sessions`` of a replica without a group: they end with its process."""

    def __init__(self, bounds: Bounds) -> None:
        self._log, self._state, self._ledger = Log(), State(), Ledger(bounds)

    async def get(self, session: str, key: str) -> bytes | None:
        self._expire()
        held = self._state.items.get(("state", name_of(session, key)))
        return held.value if held is not None else None

    async def put(self, session: str, changes: Mapping[str, bytes], timeout_s: float) -> None:
        self._expire()
        value = _joined(session, changes)
        self._ledger.check(self._state, "states", session, value)
        self._write("states", session, value)

    def _expire(self) -> None:
        for name in self._ledger.due(time.monotonic(), 256):
            self._write("state", name, None)

    def _write(self, kind: Kind, name: str, value: bytes | None) -> None:
        self._log.append(TERM, kind, name, value)
        for entry in self._state.apply(self._log, self._log.last.sequence):
            for part in entry.parts():
                self._ledger.took(part, time.monotonic())
        self._log.forget(self._log.last.sequence)


def _joined(session: str, changes: Mapping[str, bytes]) -> bytes:
    return joined({name_of(session, key): value for key, value in changes.items()})
