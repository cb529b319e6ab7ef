"""What came of each fault, from the steps that the ranks were seen to make.

Pure. A rank is seen through its beacon: a group begins with a page that says nothing, then comes
the position from which it goes on, then each step. From that:

- *noticed*: an agent has written down that something was lost, or made a new group. Some faults
  need no notice (a worker that is thawed soon).
- *recovered*: every rank of a group has made a step beyond the furthest one before the fault, or,
  where the training goes on from an earlier one, beyond that: the first new step of all.
- *redone*: steps that were applied and are done again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Group = tuple[int, int]
"""Era and generation: a private etcd that begins anew begins another era."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The first sight of a page, or of another step on it."""

    at_s: float
    """CLOCK_MONOTONIC of the step; of the sight, while the page says nothing."""
    group: Group
    rank: int
    step: int
    """-1: the page says nothing yet."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was done."""

    fault: str
    victim: str
    """What it hit; "": there was nothing to hit, or it was refused, which ``note`` tells."""
    at_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    struck: Struck
    noticed_s: float | None
    """After the fault; None if nothing was noticed before the recovery."""
    recovered_s: float | None
    """After the fault; None if it never was."""
    redone_steps: int


def judge(
    struck: Sequence[Struck], samples: Sequence[Sample], notices_s: Sequence[float] = ()
) -> list[Outcome]:
    """An outcome for each fault; those that hit nothing have none of the three.

    ``notices_s``: CLOCK_MONOTONIC of when agents saw something lost, beside new groups.
    """
    groups: dict[Group, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.at_s):
        groups.setdefault(sample.group, []).append(sample)
    seen_s = sorted(notices_s)
    return [_judge(s, groups, seen_s) if s.victim else Outcome(s, None, None, 0) for s in struck]


def _judge(
    struck: Struck, groups: Mapping[Group, Sequence[Sample]], notices_s: Sequence[float]
) -> Outcome:
    before = {g: s for g, s in groups.items() if s[0].at_s <= struck.at_s}
    group = max(before, default=(0, 0))
    last = max((s.step for own in before.values() for s in own if s.at_s <= struck.at_s), default=0)
    later = sorted(g for g in groups if g > group)
    anew = [groups[g][0].at_s for g in later]
    noticed_s = min((s for s in (*anew, *notices_s) if s > struck.at_s), default=None)
    for each in (group, *later):
        own = groups.get(each, ())
        found = all_beyond(own, last if each == group else None, struck.at_s)
        if found is None:
            continue
        at_s, start = found
        if noticed_s is not None and noticed_s > at_s:
            noticed_s = None
        redone = max(0, last - start)
        return Outcome(struck, _since(noticed_s, struck), at_s - struck.at_s, redone)
    return Outcome(struck, _since(noticed_s, struck), None, 0)


def _since(at_s: float | None, struck: Struck) -> float | None:
    return None if at_s is None else at_s - struck.at_s


def all_beyond(own: Sequence[Sample], last: int | None, after_s: float) -> tuple[float, int] | None:
    """When all ranks of the group that ``own`` is of had gone beyond ``last``; and ``last``.

    ``last`` None: the step that the group itself began from. ``own`` is in the order of time.
    """
    first: dict[int, int] = {}
    for s in own:
        if s.step >= 0:
            first.setdefault(s.rank, s.step)
    ranks = {s.rank for s in own}
    if not ranks or ranks - first.keys():
        return None
    start = max(first.values()) if last is None else last
    reached: dict[int, float] = {}
    for s in own:
        if s.step > start and s.at_s > after_s:
            reached.setdefault(s.rank, s.at_s)
    if ranks - reached.keys():
        return None
    return max(reached.values()), start


@dataclass(frozen=True, slots=True)
class Result:
    """The end of the job."""

    exit_code: int
    steps: int
    seconds: float
    weights: str
    """``equal``, what differs, or "" if they were not compared."""


def lines(outcomes: Sequence[Outcome], began_s: float, result: Result | None) -> Iterator[str]:
    """The report as a table in Markdown, and the end of the job."""
    head = ("fault", "hit", "at", "noticed", "recovered", "steps redone")
    yield "| " + " | ".join(head) + " |"
    yield "| --- " * len(head) + "|"
    for o in outcomes:
        struck = o.struck
        hit = struck.victim or f"nothing: {struck.note}"
        end = "never" if o.recovered_s is None else _told(o.recovered_s)
        noticed = "no need" if o.noticed_s is None and o.recovered_s is not None else "-"
        noticed = noticed if o.noticed_s is None else _told(o.noticed_s)
        cells = (struck.fault, hit, f"{struck.at_s - began_s:.1f} s", noticed, end)
        if not struck.victim:
            cells = (*cells[:3], "-", "-")
        yield "| " + " | ".join((*cells, str(o.redone_steps))) + " |"
    yield summary(outcomes)
    if result is not None:
        compared = f"; weights: {result.weights}" if result.weights else ""
        yield (
            f"the job ended with {result.exit_code} after {result.seconds:.1f} s at step "
            f"{result.steps}{compared}"
        )


def summary(outcomes: Sequence[Outcome]) -> str:
    """``20 faults, 20 recovered: p50 0.12 s, p99 0.40 s; 3 steps redone``."""
    hit = [o for o in outcomes if o.struck.victim]
    took_s = sorted(o.recovered_s for o in hit if o.recovered_s is not None)
    told = f"{len(hit)} faults, {len(took_s)} recovered"
    if took_s:
        told += f": p50 {_told(quantile(took_s, 0.5))}, p99 {_told(quantile(took_s, 0.99))}"
    return f"{told}; {sum(o.redone_steps for o in hit)} steps redone"


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest of ``ordered`` at or below which ``part`` of them lie."""
    return ordered[max(0, math.ceil(len(ordered) * part) - 1)]


def as_record(
    outcomes: Sequence[Outcome], began_s: float, result: Result | None
) -> dict[str, object]:
    """The same for a JSON file; times in seconds."""
    faults = [
        {
            "fault": o.struck.fault,
            "victim": o.struck.victim,
            "note": o.struck.note,
            "at_s": o.struck.at_s - began_s,
            "noticed_s": o.noticed_s,
            "recovered_s": o.recovered_s,
            "redone_steps": o.redone_steps,
        }
        for o in outcomes
    ]
    end = (
        {}
        if result is None
        else {
            "exit_code": result.exit_code,
            "steps": result.steps,
            "seconds": result.seconds,
            "weights": result.weights,
        }
    )
    return {"faults": faults, "summary": summary(outcomes), **end}


def _told(seconds: float) -> str:
    return f"{seconds:.2f} s"
