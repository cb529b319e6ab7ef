"""One rank as it is watched: its board, how long it has stood still, what its process does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from paddle_ft.health.board import BoardReader
from paddle_ft.health.flight import delay_s, process_state
from paddle_ft.health.judge import Evidence, Row
from paddle_ft.health.phases import Look, Step

ASK_S = 0.3
"""A rank that has stood still for so long is looked at more closely."""
BUSY_SHARE = 0.2
"""Of one processor, from which on a process counts as busy."""
BUSY_OVER_S = 0.5


class RankWatch:
    """Used by the monitor's thread alone."""

    def __init__(self, rank: int, reader: BoardReader) -> None:
        self.reader = reader
        self.row = Row(rank)
        self._last: Look | None = None
        self._steps = 0
        self._still_s = 0.0
        self._delay_s: float | None = None
        """What its process has waited for a processor so far, when its steps were taken last."""
        self._asked: tuple[float, float] | None = None
        """When it was first asked for in this stillness, and its processor time then."""

    def look(self, pid: int | None, passed_s: float) -> Iterator[tuple[int, Step, float]]:
        """Looks again, ``passed_s`` after the last time.

        Gives new steps, each with its ordinal and for how long its process waited for a processor
        in it, as far as that is known: the average of the steps since the last look, s.
        """
        look = self.reader.look()
        if pid is None:
            self._still_s, self._asked = 0.0, None
        elif look != self._last:
            since_s = time.monotonic() - look.changed_s
            self._still_s, self._asked = min(passed_s, max(0.0, since_s)), None
        else:
            self._still_s += passed_s
        self._last = look
        self.row = Row(
            rank=self.row.rank,
            phase=look.phase,
            entered=look.entered,
            inside=look.inside,
            still_s=self._still_s,
            evidence="",
            alive=pid is not None,
            step=look.steps,
        )
        if pid is not None and self._still_s >= ASK_S:
            self._ask(pid)
        steps = self.reader.new_steps()
        waited_s = self._waited_s(pid) / len(steps) if steps else 0.0
        for step in steps:
            yield self._steps, step, waited_s
            self._steps += 1

    def _waited_s(self, pid: int | None) -> float:
        """Since this was asked last."""
        before_s = self._delay_s
        self._delay_s = None if pid is None else delay_s(pid)
        if before_s is None or self._delay_s is None:
            return 0.0
        return max(0.0, self._delay_s - before_s)  # less: it is another process

    def _ask(self, pid: int) -> None:
        state, now_s = process_state(pid), time.monotonic()
        if state is None:
            self.row = replace(self.row, alive=False)
            return
        letter, cpu_s = state
        if self._asked is None:
            self._asked = now_s, cpu_s
        since_s, before_s = self._asked
        evidence: Evidence = "idle"
        if letter == "T":
            evidence = "stopped"
        elif letter in "tRD":
            evidence = "busy"  # a debugger has it, it waits for a processor, or for a disk
        elif now_s - since_s >= BUSY_OVER_S:
            share = (cpu_s - before_s) / (now_s - since_s)
            evidence = "busy" if share >= BUSY_SHARE else "idle"
        else:
            evidence = "busy"  # not known yet
        self.row = replace(self.row, evidence=evidence)
