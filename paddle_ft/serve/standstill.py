"""How old a request may be that a replica reads now: as old as its event loop stood still. Pure.

A process that was stopped, or was busy with something else, reads afterwards what came in
meanwhile. Whoever sent it may have given it up since, and gone on with another replica: a change
made now would undo a later one. So the time of a request counts from when it may have come in.
"""

from __future__ import annotations

RECENT_S = 1.0
"""So long after it stood still, what came in meanwhile may still be read."""


class Standstill:
    def __init__(self) -> None:
        self._turned_s = float("inf")
        """When the loop took its last turn; not yet."""
        self._gap_s = 0.0
        self._gap_until_s = float("-inf")

    def turned(self, now_s: float) -> None:
        gap_s = now_s - self._turned_s
        if gap_s >= self.age_s(now_s):
            self._gap_s, self._gap_until_s = gap_s, now_s + RECENT_S
        self._turned_s = now_s

    def age_s(self, now_s: float) -> float:
        """At most so long ago came in what is read now."""
        recent_s = self._gap_s if now_s < self._gap_until_s else 0.0
        return max(0.0, now_s - self._turned_s, recent_s)
