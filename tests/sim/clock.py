"""One virtual clock, one heap of events, one source of randomness.

Everything that happens in a simulated run is an event of ``Clock``; equal times are served in the
order in which they were scheduled, so a seed determines the whole history.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any


class Clock:
    """Virtual time in seconds."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, call, args))

    def run(self, until_s: float, done: Callable[[], bool]) -> None:
        """Serves events until ``done`` or until no event before ``until_s`` is left."""
        heap = self._heap
        while heap and heap[0][0] <= until_s and not done():
            self.now, _, call, args = heapq.heappop(heap)
            self.events += 1
            call(*args)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def between(self, low_s: float, high_s: float) -> float:
        return low_s + (high_s - low_s) * self.random.random()


class Process:
    """A process of the simulation: what it waits for happens to it only while it lives and runs.

    Frozen (SIGSTOP, a stalled virtual machine), it finds everything that came meanwhile when it
    wakes, in order; killed, it finds nothing.
    """

    __slots__ = ("_backlog", "_clock", "alive", "frozen", "name")

    def __init__(self, clock: Clock, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self._clock = clock
        self._backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    @property
    def running(self) -> bool:
        return self.alive and not self.frozen

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self._clock.after(delay_s, self._deliver, call, args)

    def _deliver(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._backlog.append((call, args))
        else:
            call(*args)

    def kill(self) -> None:
        self.alive = False
        self._backlog.clear()

    def freeze(self) -> None:
        self.frozen = True

    def wake(self) -> None:
        """Runs on, first with everything that came meanwhile."""
        if not self.frozen:
            return
        self.frozen = False
        backlog, self._backlog = self._backlog, []
        for index, (call, args) in enumerate(backlog):
            if not self.alive:
                return
            if self.frozen:  # frozen again by what it found
                self._backlog = [*backlog[index:], *self._backlog]
                return
            call(*args)
