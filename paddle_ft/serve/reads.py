"""Reads that wait until a replica has got to a position. One event loop only."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from paddle_ft.serve.types import Unavailable

WAITING_MAX = 10_000


class Reads:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, asyncio.Future[None]]] = []
        """By the sequence that is waited for."""
        self._numbers = itertools.count()
        self._gone = 0
        """Of those in the heap, how many nobody waits for any more."""

    async def wait(self, sequence: int, timeout_s: float) -> None:
        """Returns once ``sequence`` is reached; raises Unavailable if it is not in time."""
        if len(self._heap) - self._gone >= WAITING_MAX:
            raise Unavailable(f"{WAITING_MAX} reads wait already: ask again", 1.0)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (sequence, next(self._numbers), waiting))
        try:
            await asyncio.wait_for(waiting, timeout_s)
        except asyncio.TimeoutError:
            raise Unavailable(
                f"this replica has not got to {sequence} in time: ask again", 0.5
            ) from None
        finally:
            if waiting.cancelled():
                self._forget_one()

    def reached(self, sequence: int) -> None:
        while self._heap and self._heap[0][0] <= sequence:
            waiting = heapq.heappop(self._heap)[2]
            if waiting.done():
                self._gone -= 1
            else:
                waiting.set_result(None)

    def close(self) -> None:
        heap, self._heap, self._gone = self._heap, [], 0
        for _, _, waiting in heap:
            if not waiting.done():
                waiting.set_exception(Unavailable("this replica leaves: ask another one"))

    def _forget_one(self) -> None:
        self._gone += 1
        if self._gone > 16 + len(self._heap) // 2:
            self._heap = [each for each in self._heap if not each[2].done()]
            heapq.heapify(self._heap)
            self._gone = 0
