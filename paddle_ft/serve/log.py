"""The log of changes that a primary broadcasts to its replicas, and the state they make. Pure.

Invariants:
- sequences count 1, 2, 3 … without a gap, and terms never fall along a log;
- a term has one primary, which gives each sequence to one entry: so two logs that hold an entry of
  the same (term, sequence) are equal up to it;
- a state is made of acknowledged entries only, and therefore never taken back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["state", "version", "setting"]
"""State of one user's session, the version of a model that is served, a setting of the group."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where an entry stands; a log whose last one is greater knows more."""

    term: int = 0
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    at: Position
    kind: Kind
    key: str
    value: bytes | None
    """None: ``key`` is removed."""


@dataclass(frozen=True, slots=True)
class Held:
    """A value, and the sequence of the entry it came with."""

    value: bytes
    sequence: int


@dataclass(frozen=True, slots=True)
class Image:
    """The state at one position: what a newcomer begins with."""

    at: Position
    items: Mapping[tuple[Kind, str], Held]


@dataclass
class Log:
    """Entries after ``base``, all of which the state at ``base`` holds already."""

    base: Position = Position()
    entries: list[Entry] = field(default_factory=list)

    @property
    def last(self) -> Position:
        return self.entries[-1].at if self.entries else self.base

    def term_at(self, sequence: int) -> int | None:
        """Of the entry with that sequence; None if it is not held, or not any more."""
        if sequence == self.base.sequence:
            return self.base.term
        index = sequence - self.base.sequence - 1
        return self.entries[index].at.term if 0 <= index < len(self.entries) else None

    def append(self, term: int, kind: Kind, key: str, value: bytes | None) -> Entry:
        """The primary's way: the next entry, in its own term."""
        assert term >= self.last.term, "a primary has seen every term below its own"
        entry = Entry(Position(term, self.last.sequence + 1), kind, key, value)
        self.entries.append(entry)
        return entry

    def holds(self, position: Position) -> bool:
        return self.term_at(position.sequence) == position.term

    def follow(self, before: Position, entries: Sequence[Entry]) -> bool:
        """A replica's way: ``entries`` come after ``before`` in the primary's log.

        False if ``before`` is not here: the primary has to begin earlier, at ``meeting``. What
        differs from the primary's log is cut off; what was heard before is left alone, since a
        late message may be shorter than what came after it.
        """
        if before.sequence < self.base.sequence:  # of what the base holds nothing differs
            entries = [e for e in entries if e.at.sequence > self.base.sequence]
            if not entries:
                return True
        elif not self.holds(before):
            return False
        for number, entry in enumerate(entries):
            if self.holds(entry.at):
                continue
            del self.entries[entry.at.sequence - self.base.sequence - 1 :]
            self.entries += entries[number:]
            break
        return True

    def meeting(self, before: Position) -> int:
        """The greatest sequence below ``before`` at which this log may agree with the primary's.

        Entries of a term are skipped as a whole, so that few questions find where logs part.
        """
        sequence = min(before.sequence - 1, self.last.sequence)
        while sequence > self.base.sequence and (self.term_at(sequence) or 0) > before.term:
            sequence -= 1
        return max(sequence, self.base.sequence)

    def after(self, sequence: int, most: int, bytes_max: int | None = None) -> list[Entry] | None:
        """At most ``most`` entries after ``sequence``; None if some of them are not held.

        ``bytes_max``: of their values; the first one is given in any case.
        """
        if not self.base.sequence <= sequence <= self.last.sequence:
            return None
        start = sequence - self.base.sequence
        entries = self.entries[start : start + max(0, most)]
        if bytes_max is None:
            return entries
        size_bytes = 0
        for number, entry in enumerate(entries):
            size_bytes += len(entry.key) + len(entry.value or b"")
            if number and size_bytes > bytes_max:
                return entries[:number]
        return entries

    def forget(self, sequence: int) -> None:
        """Drops the entries up to ``sequence``, which the state holds."""
        term = self.term_at(sequence)
        if term is None or sequence == self.base.sequence:
            return
        del self.entries[: sequence - self.base.sequence]
        self.base = Position(term, sequence)


@dataclass
class State:
    """What the acknowledged entries up to ``at`` make."""

    at: Position = Position()
    items: dict[tuple[Kind, str], Held] = field(default_factory=dict)
    size_bytes: int = 0
    """Of keys and values."""

    def apply(self, log: Log, acknowledged: int) -> list[Entry]:
        """Takes the entries of ``log`` up to ``acknowledged`` in; gives those that were new."""
        new = []
        for entry in log.after(self.at.sequence, acknowledged - self.at.sequence) or ():
            name = entry.kind, entry.key
            old = self.items.pop(name, None)
            if old is not None:
                self.size_bytes -= len(entry.key) + len(old.value)
            if entry.value is not None:
                self.items[name] = Held(entry.value, entry.at.sequence)
                self.size_bytes += len(entry.key) + len(entry.value)
            self.at = entry.at
            new.append(entry)
        return new

    def changes(self, image: Image) -> list[Entry]:
        """What has to be changed in this state to make it the one of ``image``."""
        new = [
            Entry(Position(image.at.term, held.sequence), kind, key, held.value)
            for (kind, key), held in image.items.items()
            if self.items.get((kind, key)) != held
        ]
        gone = [
            Entry(image.at, kind, key, None)
            for kind, key in self.items
            if (kind, key) not in image.items
        ]
        return [*new, *gone]

    def image(self) -> Image:
        return Image(self.at, dict(self.items))

    @classmethod
    def of(cls, image: Image) -> State:
        size_bytes = sum(len(key) + len(held.value) for (_, key), held in image.items.items())
        return cls(image.at, dict(image.items), size_bytes)
