"""Requests of one session, one after the other: what one changes the next one sees.

Memory: one entry for each session that somebody is at; at most ``_WAITING_MAX`` requests wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from paddle_ft.serve.types import Unavailable

_WAITING_MAX = 1024


class Turns:
    """For one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By session; one that has its turn and nobody behind it has an empty queue."""
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, session: str, until_s: float) -> AsyncIterator[None]:
        """Within it no other request of ``session`` runs. ``until_s`` is of the loop's clock.

        Raises Unavailable if it does not come in time, or too many wait.
        """
        queue = self._waiting.get(session)
        if queue is None:
            self._waiting[session] = deque()
        else:
            await self._wait(queue, session, until_s)
        try:
            yield
        finally:
            self._pass_on(session)

    async def _wait(self, queue: deque[asyncio.Future[None]], session: str, until_s: float) -> None:
        if self._count >= _WAITING_MAX:
            raise Unavailable(f"{_WAITING_MAX} requests wait for others of their sessions already.")
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()
        queue.append(mine)
        self._count += 1
        try:
            await asyncio.wait([mine], timeout=max(0.0, until_s - loop.time()))
        except asyncio.CancelledError:
            if mine.done():
                self._pass_on(session)
            raise
        finally:
            self._count -= 1
            with suppress(ValueError):
                queue.remove(mine)
        if not mine.done():
            raise Unavailable("An earlier request of this session has not ended in time.")

    def _pass_on(self, session: str) -> None:
        queue = self._waiting[session]
        if queue:
            queue.popleft().set_result(None)
        else:
            del self._waiting[session]
