"""Which tries teach time-outs: not those that met a replica while it stood still.

A replica that was stopped for a while answers late what it has been asked meanwhile, and tries at
it are given up. Learnt from, either would make the time-outs longer, so that the next one that
stands still keeps its requests for longer, and so on. Whether it stood still is known from its
health checks some tenths of a second later; so a try waits for ``WAIT_S`` before it is looked at.
Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from paddle_ft.serve.latency import Learners, Try
from paddle_ft.serve.routing import Health

WAIT_S = 1.0
"""Longer than a silence takes to be noticed."""
SPANS_MAX = 20
"""Silences kept of each replica."""
PENDING_MAX = 10_000


class Lessons:
    def __init__(self, learners: Learners) -> None:
        self.learners = learners
        self._pending: deque[tuple[Try, str, float]] = deque(maxlen=PENDING_MAX)
        self._spans: dict[str, deque[list[float]]] = {}
        """By replica: from when until when it was silent, the newest last."""

    def saw(self, tried: Try, name: str, ended_s: float) -> None:
        """``tried`` was at the replica ``name``, and its request ended at ``ended_s``."""
        self._pending.append((tried, name, ended_s))

    def step(self, now_s: float, names: Mapping[str, str], health: Mapping[str, Health]) -> None:
        """To be called several times a second.

        Args:
            names: of the replicas there are, by address.
            health: of replicas, by name.
        """
        for name in [n for n in names.values() if health.get(n) == "silent"]:
            spans = self._spans.setdefault(name, deque(maxlen=SPANS_MAX))
            if spans and now_s - spans[-1][1] <= WAIT_S:
                spans[-1][1] = now_s
            else:
                spans.append([now_s - WAIT_S, now_s])
        answering = {address for address, name in names.items() if health.get(name) == "ready"}
        while self._pending and self._pending[0][2] <= now_s - WAIT_S:
            tried, name, ended_s = self._pending.popleft()
            if not self._stood_still(name, ended_s - tried.request_s, ended_s):
                self.learners.observe(tried, now_s, answering)
        for name in self._spans.keys() - set(names.values()):
            del self._spans[name]

    def _stood_still(self, name: str, begin_s: float, end_s: float) -> bool:
        return any(b <= end_s and begin_s <= e for b, e in self._spans.get(name, ()))
