"""The events of several launchers as one story of a job: its stints, faults, plans, absences. Pure.

Invariant: everything is on one clock (seconds since 1970), and the stints are in its order. A
*stint* is what one generation did between its first step and its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from paddle_ft.errors import EXIT_COLLECTIVE, EXIT_PAUSED
from paddle_ft.types import Event

NO_END = 2**62
"""As the number of a generation: there is none after it."""


class At(NamedTuple):
    """An event, with the time it happened on the common clock (seconds since 1970)."""

    s: float
    event: Event


class Span(NamedTuple):
    start_s: float
    stop_s: float


class Mark(NamedTuple):
    """``step`` had been applied at ``s``."""

    s: float
    step: int


@dataclass(slots=True)
class Stint:
    """What one generation did, from its first known step to its last."""

    life: int
    """Which period it was in during which launchers were there without a break."""
    generation: int
    marks: list[Mark] = field(default_factory=list)
    """Steps and times, both growing."""
    held_s: float = 0.0

    @property
    def first(self) -> Mark:
        return self.marks[0]

    @property
    def last(self) -> Mark:
        return self.marks[-1]


def _offsets(events: Iterable[Event]) -> dict[str, float]:
    """By launcher, what makes its monotonic clock one of seconds since 1970.

    One offset for all of a launcher's life: its wall clock may be set meanwhile.
    """
    offsets: dict[str, float] = {}
    for event in events:
        offsets.setdefault(event.run, event.wall_s - event.at_s)
    return offsets


def _lives(events: Sequence[At]) -> list[Span]:
    """The periods in which there was a launcher."""
    runs: dict[str, Span] = {}
    for s, event in events:
        known = runs.get(event.run, Span(s, s))
        runs[event.run] = Span(min(known.start_s, s), max(known.stop_s, s))
    merged: list[Span] = []
    for span in sorted(runs.values()):
        if merged and span.start_s <= merged[-1].stop_s:
            merged[-1] = Span(merged[-1].start_s, max(merged[-1].stop_s, span.stop_s))
        else:
            merged.append(span)
    return merged


def life_of(lives: Sequence[Span], s: float) -> int:
    """Number of the period that time ``s`` is in, or comes after."""
    return sum(life.start_s <= s for life in lives) - 1


def last_job(events: Sequence[Event]) -> list[Event]:
    """The events of the job that ran last: log directories are used again.

    A job goes on in the launchers that come after the last one has gone, unless it had come to its
    outcome.
    """
    offsets = _offsets(events)
    jobs = {e.run: e.fields.get("job") for e in events if e.kind == "started"}
    newest = max((e for e in events if e.kind == "started"), key=lambda e: e.wall_s, default=None)
    job = newest.fields.get("job") if newest else None
    own = [e for e in events if jobs.get(e.run, job) == job]
    timed = [At(e.at_s + offsets[e.run], e) for e in own]
    lives = _lives(timed)
    over = {life_of(lives, s) for s, e in timed if e.kind == "outcome"}
    first = max((life + 1 for life in over if life + 1 < len(lives)), default=0)
    return [e for s, e in timed if life_of(lives, s) >= first]


# ---------------------------------------------------------------- what the events say


class Notice(NamedTuple):
    """A launcher took notice of what ended a generation, or was to end it."""

    s: float
    reason: str
    life: int
    generation: int
    collateral: bool = False
    """It tells of what a fault elsewhere has done."""


@dataclass(slots=True)
class Story:
    """What matters of the events, in the order of time."""

    lives: list[Span]
    stints: list[Stint]
    start_s: float
    stop_s: float
    ended: bool
    faults: list[Notice] = field(default_factory=list)
    plans: list[Notice] = field(default_factory=list)
    """Changes that nobody's fault had made."""
    leaving: list[float] = field(default_factory=list)
    """When somebody was asked to leave, or the job had come to its outcome."""
    farewells: list[float] = field(default_factory=list)
    """When a worker had nothing more to do or to wait for."""
    short: list[Span] = field(default_factory=list)
    """Fewer nodes were there than the job needs."""

    @property
    def absent(self) -> list[Span]:
        """No launcher was there."""
        pairs = zip(self.lives, self.lives[1:], strict=False)
        return [Span(before.stop_s, after.start_s) for before, after in pairs]


def _fault(event: Event) -> str:
    """Which fault the event tells of; "" if of none."""
    told = event.fields
    if event.kind == "worker_ended" and told.get("rank") is not None and not told.get("stopped"):
        if told.get("exit_code") in (0, EXIT_PAUSED):
            return ""
        how = f"signal {told['signal']}" if told.get("signal") else f"code {told.get('exit_code')}"
        return f"rank {told['rank']} ended with {how}"
    if event.kind == "hung":  # before it is ended, its stacks are saved
        return f"rank {told.get('rank')} hung: {told.get('reason', '')}"
    if event.kind == "lost_peer":
        return f"rank {told.get('rank')} lost a peer"
    return str(told.get("reason", "")) if event.kind == "trouble" else ""


def tell(events: Sequence[Event]) -> Story:
    """The story of one job; there must be an event."""
    offsets = _offsets(events)
    timed = sorted((At(e.at_s + offsets[e.run], e) for e in events), key=lambda at: at.s)
    lives = _lives(timed)
    newest = timed[-1].event.run
    story = Story(
        lives=lives,
        stints=_stints(events, offsets, lives),
        start_s=timed[0].s,
        stop_s=timed[-1].s,
        ended=any(e.kind == "ended" and e.run == newest for e in events),
    )
    for life in range(len(lives)):
        _read_life(story, life, [at for at in timed if life_of(lives, at.s) == life])
    return story


def _read_life(story: Story, life: int, timed: Sequence[At]) -> None:
    generation = restarts = 0
    short_since_s: float | None = None
    for s, event in timed:
        told = event.fields
        if reason := _fault(event):
            at = int(told.get("generation", generation))
            collateral = event.kind == "lost_peer" or told.get("exit_code") == EXIT_COLLECTIVE
            collateral = collateral or bool(told.get("collateral"))
            story.faults.append(Notice(s, reason, life, at, collateral))
        elif event.kind == "generation" and int(told["number"]) > generation:
            failed = int(told["restarts"]) > restarts
            notices = story.faults if failed else story.plans
            if generation:
                notices.append(Notice(s, str(told.get("reason", "")), life, generation))
            generation, restarts = int(told["number"]), int(told["restarts"])
        elif event.kind == "pause":
            story.plans.append(Notice(s, str(told.get("reason", "")), life, generation))
        elif event.kind in ("leaving", "outcome"):
            story.leaving.append(s)
            if event.kind == "outcome":
                break  # who goes now is not missed
        elif event.kind == "farewell":
            story.farewells.append(s)
        elif event.kind == "members":
            if 0 < told["live"] < told["needed"]:  # with none left, nobody waits
                short_since_s = s if short_since_s is None else short_since_s
            elif short_since_s is not None:
                story.short.append(Span(short_since_s, s))
                short_since_s = None
    if short_since_s is not None:
        story.short.append(Span(short_since_s, story.lives[life].stop_s))


def _stints(
    events: Sequence[Event], offsets: Mapping[str, float], lives: Sequence[Span]
) -> list[Stint]:
    """What the generations did, in the order of time; each after the one before."""
    found: dict[tuple[int, int], Stint] = {}
    for event in events:
        if event.kind not in ("progress", "first_step"):
            continue
        told, offset = event.fields, offsets[event.run]
        key = (life_of(lives, event.at_s + offset), int(told["generation"]))
        stint = found.setdefault(key, Stint(*key))
        at_s = float(told.get("step_s", event.at_s))
        stint.marks.append(Mark(at_s + offset, int(told["step"])))
        stint.held_s = max(stint.held_s, float(told.get("held_s", 0.0)))
    stints: list[Stint] = []
    cursor_s = lives[0].start_s if lives else 0.0
    for _, stint in sorted(found.items()):
        kept: list[Mark] = []
        for mark in sorted(stint.marks):
            if cursor_s <= mark.s <= lives[-1].stop_s and (not kept or mark.step > kept[-1].step):
                kept.append(mark)
        if kept:
            stint.marks, cursor_s = kept, kept[-1].s
            stints.append(stint)
    return stints
