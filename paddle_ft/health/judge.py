"""Who does not come, and for how long that is nothing unusual. Pure.

Invariants:
- **a rank that waits for another is never blamed**: who is inside a collective, or forms the
  group, is blamed only if its process is stopped;
- nobody is blamed within the time that the run itself has shown to be usual for what the rank does
  (``Usual``), and nobody who keeps a processor busy within ``BUSY_PATIENCE`` times of it;
- where several do not come and nothing tells them apart, they get ``DOUBT_PATIENCE`` times of it.

What is measured is how long a rank has stood still *while it was looked at*, so that a machine that
was asleep as a whole accuses nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from paddle_ft.health.figures import PairTime
from paddle_ft.health.pace import Pace, same_paces
from paddle_ft.health.phases import (
    COMPUTE,
    DATA,
    JOINING,
    LOADING,
    LOOSE,
    NAMES,
    NOTHING,
    OPTIMIZER,
    OUTSIDE,
    OVER,
    REDUCE,
    SAVING,
    Step,
)

Kind = Literal["slow", "starved", "slow_link", "bad_link", "hung", "dead"]
"""``starved``: slower because it waits for a processor that other programs use; a note, for as long
as that may pass by itself. ``slow_link``: reductions take longer; ``bad_link``: this one is why."""
Evidence = Literal["", "stopped", "busy", "idle"]

FACTOR = 3.0
"""So many times as long as the slowest normal step a rank may take."""
LEARN_STEPS = 5
"""Before so many steps nothing is known."""
WARM_STEPS = 2
"""Of a process that are not normal: they compile."""
STEPS_KEPT = 512
ASIDE_MIN_S = 30.0
"""Between steps, on data and on saving a rank may take at least so long."""
ASIDE_SEEN = 5
ASIDE_NOISE_S = 0.001
IDLE_MORE_S = 1.0
"""What a rank gets on top whose process is not stopped: it may be about to come."""
BUSY_PATIENCE = 5.0
DOUBT_PATIENCE = 5.0
FORGIVEN_STEPS = 200
"""After so many steps the patience of a false alarm is halved."""
STOPPED_UNLEARNT_S = 10.0
WAITING_MIN_S = 0.2
"""Somebody must have waited for so long for a rank to be late."""


@dataclass(frozen=True, slots=True)
class Row:
    """One rank, now."""

    rank: int
    phase: int = NOTHING
    entered: int = 0
    """Number of the collective it entered last."""
    inside: bool = False
    still_s: float = 0.0
    """Since when its board has not changed, as far as it was looked at."""
    evidence: Evidence = ""
    """What its process does, as far as it was asked for."""
    alive: bool = True
    step: int = 0

    @property
    def waits(self) -> bool:
        return self.inside or self.phase == JOINING


@dataclass(frozen=True, slots=True)
class Waiting:
    """Ranks of another node wait in collective ``number`` (0: for the group to be formed)."""

    number: int
    still_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: Kind
    rank: int
    """-1: nobody is to blame in particular."""
    collective: int
    since_s: float
    """How long ago it began."""
    reason: str


@dataclass(frozen=True, slots=True)
class HealthRecord:
    """Value of ``health/<member>``: what a node tells of its ranks, when something has changed."""

    generation: int
    rows: tuple[Row, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    waiting: Waiting | None = None
    paces: tuple[Pace, ...] = ()
    blamed: tuple[float, ...] = ()
    """When ranks of this node were ended because they hung: seconds since 1970, its own clock."""
    links: tuple[PairTime, ...] = ()
    """What its links took, where somebody finds reductions slow: there and back, s."""

    def says_as(self, other: HealthRecord) -> bool:
        """Whether there is no need to tell both: figures that change all the time do not count."""
        return (
            self.generation == other.generation
            and self.blamed == other.blamed
            and self.links == other.links
            and _heads(self) == _heads(other)
            and same_paces(self.paces, other.paces)
        )


def _heads(record: HealthRecord) -> tuple[object, ...]:
    number = record.waiting.number if record.waiting else -1
    return (number, *((v.kind, v.rank) for v in record.verdicts if v.kind != "starved"))


@dataclass(slots=True)
class Usual:
    """What the run has shown to be usual. Times in seconds.

    ``floor_s`` is added to every bound, ``cap_s`` is the bound where nothing is known, and the
    largest.
    """

    floor_s: float
    cap_s: float
    patience: float = 1.0
    """Grows after a rank was ended that was not stopped: perhaps it would have come."""
    _done: int = 0
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    _aside: dict[int, deque[float]] = field(default_factory=dict)

    def learn(self, step: Step, ordinal: int) -> None:
        """``ordinal``: which step of its process in its group, from 0."""
        for phase, seconds in (
            (DATA, step.data_s),
            (OUTSIDE, step.outside_s),
            (SAVING, step.saving_s),
            (LOOSE, step.busy_s),
        ):
            if seconds > ASIDE_NOISE_S:
                self._aside.setdefault(phase, deque(maxlen=STEPS_KEPT)).append(seconds)
        if ordinal >= WARM_STEPS:
            self._steps.append(step.total_s - step.outside_s - step.saving_s)
            self._done += 1
            if self._done % FORGIVEN_STEPS == 0:
                self.patience = max(1.0, self.patience / 2)

    @property
    def slowest_s(self) -> float:
        """The slowest normal step; 0.0 while that is not known."""
        return max(self._steps) if len(self._steps) >= LEARN_STEPS else 0.0

    @property
    def tight_s(self) -> float:
        """For what belongs to a step."""
        slowest_s = self.slowest_s
        return min(self.cap_s, FACTOR * slowest_s + self.floor_s) if slowest_s else self.cap_s

    def bound_s(self, phase: int, evidence: Evidence) -> float:
        """How long a rank that others wait for may stand still."""
        if phase == OVER:
            return float("inf")
        if evidence == "stopped":
            return min(self.tight_s, max(STOPPED_UNLEARNT_S, self.floor_s))
        if phase in (COMPUTE, OPTIMIZER, REDUCE):
            bound_s = (self.tight_s + IDLE_MORE_S) * self.patience
        else:
            bound_s = self._aside_s(phase)
        return min(self.cap_s, bound_s * (BUSY_PATIENCE if evidence == "busy" else 1.0))

    def _aside_s(self, phase: int) -> float:
        seen = self._aside.get(phase, ())
        if phase in (NOTHING, LOADING, JOINING) or len(seen) < ASIDE_SEEN:
            return self.cap_s
        return max(ASIDE_MIN_S, FACTOR * max(seen) + self.floor_s) * self.patience


def find_hung(rows: Sequence[Row], elsewhere: Iterable[Waiting], usual: Usual) -> list[Verdict]:
    """The ranks of this node that are to be ended, because they do not come.

    Args:
        rows: this node's ranks of one group.
        elsewhere: where ranks of other nodes wait, in the same group.
    """
    stopped = [row for row in rows if _late(row, usual) and row.alive and row.evidence == "stopped"]
    if stopped:
        return [_verdict(row, rows, elsewhere) for row in stopped]
    missing = missing_at(rows, elsewhere)
    if any(row.evidence == "stopped" for row in missing):
        return []  # that one first: the others may wait for it in a way that is not seen
    late = [row for row in missing if _late(row, usual)]
    if len(late) > 1:
        late = [row for row in late if row.still_s >= DOUBT_PATIENCE * usual.tight_s]
    return [_verdict(row, rows, elsewhere) for row in late]


def missing_at(rows: Sequence[Row], elsewhere: Iterable[Waiting]) -> list[Row]:
    """Who has not come to where the furthest of the others wait."""
    waits = [Waiting(r.entered if r.inside else 0, r.still_s) for r in rows if r.waits and r.alive]
    waits = [w for w in (*waits, *elsewhere) if w.still_s >= WAITING_MIN_S]
    if not waits:
        return []
    number = max(w.number for w in waits)
    return [r for r in rows if r.alive and not r.waits and (r.entered < number or not number)]


def _late(row: Row, usual: Usual) -> bool:
    return row.still_s >= usual.bound_s(row.phase, row.evidence)


def next_bound_s(rows: Iterable[Row], usual: Usual) -> float:
    """After how long the next bound is over, if nobody moves until then; inf: all are over."""
    bounds = [
        bound_s - row.still_s
        for row in rows
        for bound_s in (usual.tight_s, usual.bound_s(row.phase, row.evidence))
    ]
    return min((left_s for left_s in bounds if left_s > 0), default=float("inf"))


def _verdict(row: Row, rows: Sequence[Row], elsewhere: Iterable[Waiting]) -> Verdict:
    number = max((r.entered for r in rows if r.inside), default=0)
    number = max([number, *(w.number for w in elsewhere)])
    how = {"stopped": "its process is stopped", "busy": "its process keeps a processor busy"}
    where = f"it has not come to collective {number}" if number else "it has not come to the group"
    if row.inside or not (number or row.phase <= LOADING):
        where = f"it is in collective {row.entered}" if row.inside else "it stands still"
    told = [where, f"{NAMES[row.phase]} since {row.still_s:.1f} s"]
    told += [how[row.evidence]] if row.evidence in how else []
    return Verdict("hung", row.rank, number, row.still_s, ", ".join(told))


def patience_after(usual: Usual, ended: Iterable[Row]) -> float:
    """For the next time, after ``ended`` were ended: who was not stopped might have come."""
    sleeping = any(row.evidence != "stopped" for row in ended)
    return min(64.0, usual.patience * 2) if sleeping else usual.patience
