"""What the step logs of a job say about a fault. Pure.

A step is new if no rank had applied it when the fault struck, and all have it once every rank of
the world that it was made in has written it down. What a rank writes down twice was done twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Applied:
    """One rank has applied one step."""

    at_s: float
    """Monotonic."""
    rank: int
    world: int
    step: int
    pid: int


@dataclass(frozen=True, slots=True)
class Resumption:
    """How a job went on after a fault; seconds from the fault."""

    new_s: float
    """Until all ranks of the world there was then had applied a new step."""
    redone: int
    """Steps that a rank applied once more."""
    full_s: float | None
    """As ``new_s``, of the first step in a world as large as before; None if there was none."""
    again_s: float = 0.0
    """As ``new_s``, of the first step of all, which may be one that was applied before."""


def parse(text: str) -> list[Applied]:
    """The lines of a step log; one that was cut short is left out."""
    found = []
    for line in text.split("\n")[:-1]:
        words = line.split()
        if len(words) == 5:
            numbers = map(int, words[1:])
            found.append(Applied(float(words[0]), *numbers))
    return found


def completed(lines: Iterable[Applied]) -> list[tuple[float, int, int]]:
    """(when the last rank had it, step, world) of each step that all ranks have, by time.

    A step that was done again counts once for each time and world in which all ranks had it.
    """
    open_steps: dict[tuple[int, int], set[int]] = {}
    done = []
    for line in sorted(lines, key=lambda x: x.at_s):
        have = open_steps.setdefault((line.step, line.world), set())
        have.add(line.rank)
        if len(have) == line.world:
            done.append((line.at_s, line.step, line.world))
            have.clear()
    return done


def resumption(lines: Sequence[Applied], fault_s: float) -> Resumption | None:
    """How the job went on after what happened at ``fault_s``; None if it did not."""
    before = [x for x in lines if x.at_s <= fault_s]
    after = [x for x in lines if x.at_s > fault_s]
    if not before:
        return None
    furthest = max(x.step for x in before)
    world = max(before, key=lambda x: x.at_s).world
    new = completed(x for x in after if x.step > furthest)
    if not new:
        return None
    again_s = completed(after)[0][0] - fault_s
    full = next((at_s for at_s, _, w in new if w == world), None)
    return Resumption(
        new[0][0] - fault_s,
        redone_steps(before, after),
        None if full is None else full - fault_s,
        again_s,
    )


def redone_steps(before: Iterable[Applied], after: Iterable[Applied]) -> int:
    """Steps that a rank applied before and applied once more after."""
    had = {(x.rank, x.step) for x in before}
    return len({x.step for x in after if (x.rank, x.step) in had})


def latest(lines: Iterable[Applied]) -> dict[int, int]:
    """Process id by rank, of the world in which the newest step was made."""
    ordered = sorted(lines, key=lambda x: x.at_s)
    if not ordered:
        return {}
    world = ordered[-1].world
    return {x.rank: x.pid for x in ordered if x.rank < world}


def intervals(lines: Iterable[Applied]) -> list[float]:
    """Seconds between steps that follow each other on one process, over all processes."""
    by_pid: dict[int, list[Applied]] = {}
    for line in lines:
        by_pid.setdefault(line.pid, []).append(line)
    found = []
    for own in by_pid.values():
        own.sort(key=lambda x: x.at_s)
        found += [b.at_s - a.at_s for a, b in pairwise(own) if b.step == a.step + 1]
    return found


WARM_STEPS = 2
"""Of a process, or of a group that a process came to: they are not normal."""


def slowest_calm(lines: Iterable[Applied], faults: Sequence[tuple[float, float]]) -> float:
    """The slowest step outside of ``faults`` (from the signal until all ranks stepped again), s.

    Neither the first ``WARM_STEPS`` of a process count nor those of the ranks that waited for it.
    """
    by_pid: dict[int, list[Applied]] = {}
    for line in sorted(lines, key=lambda x: x.at_s):
        by_pid.setdefault(line.pid, []).append(line)
    cold = {x.step for own in by_pid.values() for x in own[:WARM_STEPS]}
    slowest_s = 0.0
    for own in by_pid.values():
        for a, b in pairwise(own):
            hurt = any(a.at_s <= until_s and b.at_s >= at_s for at_s, until_s in faults)
            if b.step == a.step + 1 and b.step not in cold and not hurt:
                slowest_s = max(slowest_s, b.at_s - a.at_s)
    return slowest_s


def longest_pause(lines: Iterable[Applied], pids: Iterable[int], since_s: float) -> float:
    """The longest time between two steps on any of ``pids``, after ``since_s``; 0.0 if none."""
    wanted = set(pids)
    return max(intervals(x for x in lines if x.pid in wanted and x.at_s > since_s), default=0.0)


def growth_pause(lines: Iterable[Applied], pids: Iterable[int], since_s: float) -> float:
    """The longest time on any of ``pids`` from its last step in a world to its first one in a
    larger world, after ``since_s``; 0.0 if none grew."""
    wanted = set(pids)
    grown = [0.0]
    for pid in wanted:
        own = sorted((x for x in lines if x.pid == pid and x.at_s > since_s), key=lambda x: x.at_s)
        grown += [b.at_s - a.at_s for a, b in pairwise(own) if b.world > a.world]
    return max(grown)


def useful_share(
    lines: Iterable[Applied], begin_s: float, end_s: float, step_s: float, world: int
) -> float:
    """Share of the time from ``begin_s`` to ``end_s`` in which ``world`` ranks did new work.

    A step counts once, for as long as an undisturbed one lasts, and by the part of the ranks that
    it was made on.
    """
    counted: dict[int, float] = {}
    for at_s, step, made_on in completed(lines):
        if begin_s < at_s <= end_s:
            counted[step] = max(counted.get(step, 0.0), min(made_on / world, 1.0))
    return sum(counted.values()) * step_s / (end_s - begin_s)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
