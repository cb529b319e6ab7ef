"""The state of sessions for pipelines: that of the group, or of one replica alone."""

from __future__ import annotations

import time
from collections import OrderedDict

from paddle_ft.serve.ledger import Bounds, Ledger, name_of
from paddle_ft.serve.log import Log, Position, State
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.types import Lost

_OWN_MAX = 4096
TERM = 1
"""Of a replica alone, which is its own primary."""


class GroupSessions:
    """``types.Sessions`` over what the group keeps.

    A replica that is not the primary passes changes on to it, and reads its own: it remembers where
    the last change of each of ``_OWN_MAX`` sessions stands.
    """

    def __init__(self, group: Replicated) -> None:
        self._group = group
        self._own: OrderedDict[str, Position] = OrderedDict()

    async def get(self, session: str, key: str) -> bytes | None:
        at_least = self._own.get(session)
        try:
            held = await self._group.get("state", name_of(session, key), at_least)
        except Lost:
            self._own.pop(session, None)  # told once
            raise
        return held.value if held is not None else None

    async def put(self, session: str, key: str, value: bytes) -> None:
        name = name_of(session, key)
        at = await self._group.put_anywhere("state", name, value)
        self._own[session] = max(at, self._own.get(session, at))
        self._own.move_to_end(session)
        if len(self._own) > _OWN_MAX:
            self._own.popitem(last=False)


class LocalSessions:
    """``types.Sessions`` of a replica without a group: they end with its process."""

    def __init__(self, bounds: Bounds) -> None:
        self._log, self._state, self._ledger = Log(), State(), Ledger(bounds)

    async def get(self, session: str, key: str) -> bytes | None:
        self._expire()
        held = self._state.items.get(("state", name_of(session, key)))
        return held.value if held is not None else None

    async def put(self, session: str, key: str, value: bytes) -> None:
        self._expire()
        name = name_of(session, key)
        self._ledger.check(self._state, "state", name, value)
        self._write(name, value)

    def _expire(self) -> None:
        for name in self._ledger.due(time.monotonic(), 256):
            self._write(name, None)

    def _write(self, name: str, value: bytes | None) -> None:
        self._log.append(TERM, "state", name, value)
        for entry in self._state.apply(self._log, self._log.last.sequence):
            self._ledger.took(entry, time.monotonic())
        self._log.forget(self._log.last.sequence)
