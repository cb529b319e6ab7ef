"""Where the time of a job went, from the events of its launchers. Pure.

Invariant: every second between the first event and the last one is in exactly one category.

    useful      steps that were not done before, and the one that follows a recovery
    redone      steps that were done before, and lost
    checkpoint  training was held up by a snapshot, or waited for the last one to be safe
    detection   from the last step before a fault until a launcher took notice
    recovery    from there to the first new step, without that step itself
    waiting     too few nodes, or a planned change of members
    absent      no launcher at all, from the end of the last one to the start of the next
    startup     until the first step; and from the end of training to that of the launcher

The time line is cut at the steps: between two stints (``story``) lies a *gap*, which a fault or a
planned change has made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from paddle_ft.observe.story import NO_END, Notice, Span, Stint, Story, life_of, tell
from paddle_ft.types import Event

Category = Literal[
    "useful", "redone", "checkpoint", "detection", "recovery", "waiting", "absent", "startup"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
TITLES: Mapping[Category, str] = {
    "useful": "useful training",
    "redone": "redone work",
    "checkpoint": "checkpoint stall",
    "detection": "detection",
    "recovery": "recovery",
    "waiting": "waiting for members",
    "absent": "no launcher running",
    "startup": "start-up and end",
}


class Fault(NamedTuple):
    """One interruption that was not planned."""

    wall_s: float
    """When it was noticed, seconds since 1970."""
    reason: str
    detection_s: float
    recovery_s: float
    """Without time in which too few nodes were there."""
    steps_redone: int
    over: bool
    """A new step has been done since."""


@dataclass(frozen=True, slots=True)
class Account:
    """Seconds by category; their sum is the wall time."""

    start_s: float
    """Seconds since 1970."""
    wall_s: float
    seconds: Mapping[Category, float]
    steps: int
    """The highest step that was reached."""
    steps_redone: int
    faults: tuple[Fault, ...]
    ended: bool
    """The last launcher has said that it ends."""

    @property
    def goodput(self) -> float:
        """Useful share of the wall time, 0 to 1."""
        return self.seconds["useful"] / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def goodput_from_first_step(self) -> float:
        """The same without the start-up."""
        left_s = self.wall_s - self.seconds["startup"]
        return self.seconds["useful"] / left_s if left_s > 0 else 0.0


def summary(told: Account) -> str:
    """One short line for people: ``goodput 97.8 % (recovery 1.5 %, start-up 0.7 %)``."""
    shares = {c: told.seconds[c] / told.wall_s for c in CATEGORIES if told.wall_s > 0}
    lost = sorted(((s, c) for c, s in shares.items() if c != "useful"), reverse=True)
    named = [f"{TITLES[c]} {s:.1%}".replace("%", " %") for s, c in lost if s >= 0.0005]
    line = f"goodput {told.goodput:.1%}".replace("%", " %")
    return f"{line} ({', '.join(named)})" if named else line


def to_json(told: Account) -> dict[str, Any]:
    """JSON values; ``seconds`` by category sum up to ``wall_s``."""
    return {
        "goodput": told.goodput,
        "goodput_from_first_step": told.goodput_from_first_step,
        "start_s": told.start_s,
        "wall_s": told.wall_s,
        "seconds": dict(told.seconds),
        "steps": told.steps,
        "steps_redone": told.steps_redone,
        "faults": [fault._asdict() for fault in told.faults],
        "ended": told.ended,
    }


# ---------------------------------------------------------------- the account


class _Book:
    """Adds up; what is added covers the time line once."""

    def __init__(self, story: Story) -> None:
        self.seconds: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
        self._story = story

    def add(self, category: Category, start_s: float, stop_s: float) -> float:
        """``category`` from ``start_s`` to ``stop_s`` but for what nobody was there for, or too
        few; gives the seconds that counted."""
        away: list[tuple[Span, Category]] = [(span, "absent") for span in self._story.absent]
        if category in ("recovery", "startup"):
            away += [(span, "waiting") for span in self._story.short]
        own_s = stop_s - start_s
        at_s = start_s
        for span, why in sorted(away):
            begin_s, end_s = max(at_s, span.start_s), min(stop_s, span.stop_s)
            if end_s > begin_s:
                self.seconds[why] += end_s - begin_s
                own_s -= end_s - begin_s
                at_s = end_s
        self.seconds[category] += own_s
        return own_s

    def move(self, source: Category, target: Category, seconds: float) -> None:
        seconds = min(max(0.0, seconds), self.seconds[source])
        self.seconds[source] -= seconds
        self.seconds[target] += seconds


def account(events: Sequence[Event]) -> Account:
    """Where the time of one job went, by the events of one or several of its launchers.

    The account ends with the last event: a launcher that was killed tells nothing of its end.
    Raises ValueError if there are no events.
    """
    if not events:
        raise ValueError("there are no events")
    story = tell(events)
    book, faults = _Book(story), []
    step_s = _mean_step_s(story.stints)
    reached, redone, before = 0, 0, None
    for stint in story.stints:
        again = max(0, min(stint.last.step, reached) - stint.first.step + 1) if before else 0
        if before is None:
            book.add("startup", story.start_s, stint.first.s)
        else:
            until = stint.generation if stint.life == before.life else NO_END
            fault = _gap(book, story, before, stint.first.s, until)
            if fault is not None:
                step: Category = "redone" if stint.first.step <= reached else "useful"
                credit_s = min(step_s, fault.recovery_s)
                book.move("recovery", step, credit_s)
                own_s = fault.recovery_s - credit_s
                faults.append(fault._replace(recovery_s=own_s, steps_redone=again, over=True))
        _work(book, stint, reached)
        redone += again
        reached, before = max(reached, stint.last.step), stint
    if before is None:
        book.add("startup", story.start_s, story.stop_s)
    elif (fault := _tail(book, story, before)) is not None:
        faults.append(fault)
    return Account(
        start_s=story.start_s,
        wall_s=story.stop_s - story.start_s,
        seconds=book.seconds,
        steps=reached,
        steps_redone=redone,
        faults=tuple(faults),
        ended=story.ended,
    )


def _mean_step_s(stints: Sequence[Stint]) -> float:
    steps = sum(s.last.step - s.first.step for s in stints)
    spent_s = sum(max(0.0, s.last.s - s.first.s - s.held_s) for s in stints)
    return spent_s / steps if steps else 0.0


def _work(book: _Book, stint: Stint, reached: int) -> None:
    """The time between the steps of a stint; steps up to ``reached`` had been done before."""
    useful_s = redone_s = 0.0
    for one, two in zip(stint.marks, stint.marks[1:], strict=False):
        share = max(0.0, (min(two.step, reached) - one.step) / (two.step - one.step))
        redone_s += (two.s - one.s) * share
        useful_s += (two.s - one.s) * (1 - share)
    whole_s = useful_s + redone_s
    held_share = min(1.0, stint.held_s / whole_s) if whole_s > 0 else 0.0
    book.seconds["checkpoint"] += whole_s * held_share
    book.seconds["useful"] += useful_s * (1 - held_share)
    book.seconds["redone"] += redone_s * (1 - held_share)


def _gap(book: _Book, story: Story, before: Stint, stop_s: float, until: int) -> Fault | None:
    """Adds the time from the last step of ``before`` until ``stop_s``, when the generation
    ``until`` had its first; gives the fault that made the gap, if one did."""
    start_s = before.last.s
    notices = _all(story.faults, before, until)
    notice = min(notices, default=None)
    if life_of(story.lives, stop_s) > before.life:  # all launchers were gone
        begins_s = min(stop_s, max(start_s, story.lives[before.life + 1].start_s))
        if any(before.first.s < s <= begins_s for s in story.leaving):
            _end(book, story, start_s, begins_s)
            book.add("startup", begins_s, stop_s)
            return None
        notice = notice or Notice(begins_s, "the launchers had gone", before.life, until)
    if notice is None:
        book.add("waiting", start_s, stop_s)
        return None
    plan = min(_all(story.plans, before, until), default=None)
    reason = min((n for n in notices if not n.collateral), default=notice).reason
    noticed_s = min(stop_s, max(start_s, notice.s))
    planned = plan is not None and plan.s < notice.s
    detected_s = book.add("waiting" if planned else "detection", start_s, noticed_s)
    recovery_s = book.add("recovery", noticed_s, stop_s)
    return Fault(noticed_s, reason, 0.0 if planned else detected_s, recovery_s, 0, False)


def _tail(book: _Book, story: Story, before: Stint) -> Fault | None:
    """Adds the time after the last step."""
    start_s, stop_s = before.last.s, story.stop_s
    another = life_of(story.lives, stop_s) != before.life
    over = story.ended or any(s > before.first.s for s in story.leaving)
    if another or _all(story.faults, before, NO_END):
        return _gap(book, story, before, stop_s, NO_END)
    if over:
        _end(book, story, start_s, stop_s)
    else:
        planned = _all(story.plans, before, NO_END)
        book.add("waiting" if planned else "useful", start_s, stop_s)
    return None


def _end(book: _Book, story: Story, start_s: float, stop_s: float) -> None:
    """Adds the time after the last step: first the last checkpoint, then the processes end."""
    saved_s = max((s for s in story.farewells if start_s <= s <= stop_s), default=stop_s)
    book.add("checkpoint", start_s, saved_s)
    book.add("startup", saved_s, stop_s)


def _all(notices: Sequence[Notice], before: Stint, until: int) -> list[Notice]:
    """What ended ``before``, or a later generation of that life before ``until``.

    By number, not by time: the clocks of several nodes are not the same.
    """
    numbers = range(before.generation, until)
    return [n for n in notices if n.life == before.life and n.generation in numbers]
