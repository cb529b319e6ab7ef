"""A run under load, and the rows that every such run gives."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.recovery_analysis import percentile
from bench.report import Row
from bench.serving_analysis import (
    Strike,
    answered_by_two_terms,
    failed,
    longest_gap_s,
    lost,
    p99_s,
    slowest_s,
    within,
)
from bench.serving_world import Broken, Load, World
from paddle_ft.errors import EtcdUnavailable

Say = Callable[[str], None]
CALM_S = 3.0
"""Load before the first fault, against which the rest is held."""


@dataclass
class Run:
    """What one run under load has shown."""

    load: Load
    strikes: list[Strike] = field(default_factory=list)
    held: dict[tuple[int, str], int] | None = None
    """The state in the end; None if it could not be read."""
    broken: str = ""
    began_s: float = 0.0

    @property
    def calm_p99_s(self) -> float:
        first = self.strikes[0].at_s if self.strikes else float("inf")
        return p99_s(within(self.load.requests, 0.0, first))


class Progress:
    """Lines with the time that is left."""

    def __init__(self, say: Say, what: str, count: int) -> None:
        self._say, self._what, self._count = say, what, count
        self._began_s, self._done = time.monotonic(), 0

    def step(self, told: str = "") -> None:
        self._done += 1
        left_s = (time.monotonic() - self._began_s) / self._done * (self._count - self._done)
        self._say(f"{self._what}: {self._done} of {self._count}, {left_s:.0f} s left {told}")


def under_load(
    world: World, rate_hz: float, writers: int, act: Callable[[Run], None], say: Say
) -> Run:
    """Does ``act`` under load; what goes wrong in it ends the run, and is told in its rows."""
    with world.load(rate_hz, writers) as load:
        run = Run(load, began_s=time.monotonic())
        time.sleep(CALM_S)
        try:
            act(run)
        except (Broken, EtcdUnavailable, OSError, subprocess.SubprocessError) as error:
            run.broken = f"ended after {len(run.strikes)}: {error}"
            say(run.broken)
        time.sleep(1.0)
    if load.acks:
        try:
            run.held = world.held(load.acks)
        except (Broken, EtcdUnavailable, OSError, ValueError) as error:
            run.broken += f" the state in the end: {error}"
    say(f"{len(load.requests)} requests, {failed(load.requests)} failed, slowest "
        f"{slowest_s(load.requests):.3f} s; {len(load.acks)} changes of the state")  # fmt: skip
    return run


# ---------------------------------------------------------------- rows of all kinds


def failures(run: Run, group: str) -> Row:
    found = run.load.requests
    reasons = sorted(run.load.told.items(), key=lambda item: -item[1][0])[:5]
    why = "; ".join(
        f"{count:.0f} x {text} ({first_s - run.began_s:.1f} to {last_s - run.began_s:.1f} s)"
        for text, (count, first_s, last_s) in reasons
    )
    note = f"of {len(found)} requests; the load took {run.load.core_share:.0%} of a core."
    if why:
        note += f" {why}."
    if run.broken:
        note += f" {run.broken}"
    return Row(group, "failed requests", "requests", [failed(found)] if found else [],
               goal=0.0, note=note)  # fmt: skip


def slowest(run: Run, group: str, goal_s: float | None) -> Row:
    found = run.load.requests
    near = [slowest_s(within(found, s.at_s - 1.0, s.at_s + 3.0)) for s in run.strikes]
    note = f"p99 of all {p99_s(found):.3f} s, before the first {run.calm_p99_s:.3f} s"
    if near:
        note += f"; within 3 s of each: {statistics.median(near):.3f} s (median), {max(near):.3f} s"
    return Row(group, "slowest request", "s", [slowest_s(found)] if found else [],
               goal=goal_s, note=note + ".")  # fmt: skip


def state(run: Run, group: str) -> list[Row]:
    """Entries lost, replies of two terms, reads of an own write."""
    load = run.load
    missing = f"not run: {load.state}" if load.state else "not run: nothing was acknowledged"
    names = (
        ("acknowledged state entries lost", "entries"),
        ("replies to writes from two terms", "replies"),
        ("reads that have not the reader's own write", "reads"),
    )
    if not load.acks:
        refused = f"; {load.put_failures}" if load.put_failures and not load.state else ""
        notes = [f"{missing}{refused}", "not run: as above", "not run: as above"]
        return [
            Row(group, name, unit, (), goal=0.0, note=note)
            for (name, unit), note in zip(names, notes, strict=True)
        ]
    gone = lost(load.acks, run.held) if run.held is not None else []
    told = [
        f"{len(load.acks)} acknowledged; {'; '.join(gone[:3])}",
        f"terms {min(a.term for a in load.acks)} to {max(a.term for a in load.acks)}",
        f"of {load.reads}; {'; '.join(load.stale[:3])}",
    ]
    values = [
        [len(gone)] if run.held is not None else [],
        [answered_by_two_terms(load.acks)],
        [len(load.stale)] if load.reads else [],
    ]
    if run.held is None:
        told[0] = f"not run: {run.broken}"
    if load.put_failures:
        told[1] += f"; tries that were refused or failed: {load.put_failures}"
    return [
        Row(group, name, unit, value, goal=0.0, note=note)
        for (name, unit), value, note in zip(names, values, told, strict=True)
    ]


def worst(group: str, name: str, values: Sequence[float], goal: float | None, note: str = "",
          peers: Mapping[str, Sequence[float]] | None = None) -> Row:  # fmt: skip
    """The goal is one of the largest value; the note tells of the others."""
    told = note
    if values:
        middle = statistics.median(values)
        told = f"of {len(values)}, p50 {middle:.3f}, p90 {percentile(values, 0.9):.3f}. {note}"
    row_values = [max(values)] if values else []
    return Row(group, name, "s", row_values, goal=goal, note=told.strip(), peers=peers or {})


def without_primary(run: Run) -> list[float]:
    """From each strike on the primary until all was as before: the longest time in which nothing
    was acknowledged."""
    times = [a.answered_s for a in run.load.acks]
    return [
        longest_gap_s(times, s.at_s, max(s.over_s, s.at_s + 3.0))
        for s in run.strikes
        if s.primary_s is not None and times
    ]
