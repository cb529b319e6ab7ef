"""What a serving group has promised its clients; raises as soon as one promise is not kept.

A forced promotion, and the beginning anew after all that had the state have ended, give up what
nobody who goes on has got: it was said to be lost. All else must be kept then, too.
"""

from __future__ import annotations

from paddle_ft.serve.broadcast import Replica
from paddle_ft.serve.log import Entry, Position

WISH_S = 10
"""An operator waits so long for a promotion; it must not come later."""


class Broken(Exception):
    """Something that must always hold does not."""


class History:
    def __init__(self) -> None:
        self.leaders: dict[int, str] = {}
        self.entries: dict[int, Entry] = {}
        """Acknowledged ones, by sequence."""
        self.numbers: dict[str, int] = {}
        """Acknowledged, by key."""
        self.reads = 0
        self.acknowledgements = 0
        self.term = 0
        """The newest in which a change was acknowledged."""
        self.age = 0
        """Counts how often changes were given up."""
        self.ordered = True
        """No answer of a term comes after one of a later term. A late one of a primary that was
        taken for dead while it lived may: its change is on all that count, and is not lost."""
        self._forced_term = 0
        """Of the last primary that did not wait until the one before could answer no more."""
        self._given_up_term = 0
        """What is acknowledged in a lower one is lost."""

    def leads(self, name: str, term: int) -> None:
        if self.leaders.setdefault(term, name) != name:
            raise Broken(f"{name} and {self.leaders[term]} are both the primary of term {term}")

    def acknowledged(self, name: str, term: int, entry: Entry) -> bool:
        """False if it is given up already, by who does not know yet that it has been deposed."""
        self.leads(name, term)
        if term < self._given_up_term:
            return False
        if self.ordered and term < self.term and term >= self._forced_term:
            raise Broken(f"{name} answers in term {term} after one has answered in {self.term}")
        self.term = max(term, self.term)
        other = self.entries.setdefault(entry.at.sequence, entry)
        if other != entry:
            raise Broken(f"two entries were acknowledged as {entry.at.sequence}: {other}, {entry}")
        self._count(entry)
        self.acknowledgements += 1
        return True

    def _count(self, entry: Entry) -> None:
        for part in entry.parts():
            if part.value is not None:
                number = max(int(part.value), self.numbers.get(part.key, 0))
                self.numbers[part.key] = number

    def forced(self, term: int, asked_s: float, now_s: float) -> None:
        """A person has made somebody the primary in ``term``."""
        self._forced_term = term
        if now_s - asked_s > WISH_S + 1:
            raise Broken(f"a promotion was forced {now_s - asked_s:.0f} s after it was asked for")

    def gave_up(self, term: int, replica: Replica) -> None:
        """``replica`` goes on with what it has, in ``term``."""
        self._given_up_term, self.term = term, 0
        self.age += 1
        kept = [e for e in self.entries.values() if _has(replica, e.at)]
        self.entries, self.numbers = {e.at.sequence: e for e in kept}, {}
        for entry in kept:
            self._count(entry)

    def ended(self, name: str, alive: bool) -> None:
        """The group has begun anew, believing that ``name`` had ended."""
        if alive:
            raise Broken(f"what {name} has was given up while it lives")

    def undone(self, name: str) -> None:
        if not self.age:
            raise Broken(f"{name} would have to take back what was acknowledged")

    def together(self, key: str, number: int, twin: int) -> None:
        """Both are read at once, and are always written as one change."""
        if number != twin:
            raise Broken(f"of one change of {key} only a part was made: {number}, {twin}")

    def read(self, key: str, number: int, least: int) -> None:
        self.reads += 1
        if number < least:
            raise Broken(f"{key} was read as {number} after {least} had been acknowledged")


def _has(replica: Replica, at: Position) -> bool:
    term = replica.log.term_at(at.sequence)
    return at.sequence <= replica.state.at.sequence if term is None else term == at.term
