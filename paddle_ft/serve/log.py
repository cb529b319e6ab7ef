"""The log of changes that a primary broadcasts to its replicas, and the state they make. Pure.

Invariants:
- sequences count 1, 2, 3 … without a gap, and terms never fall along a log;
- a term has one primary, which gives each sequence to one entry: so two logs that hold an entry of
  the same (term, sequence) are equal up to it;
- a state is made of acknowledged entries only, and therefore never taken back.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["state", "version", "setting", "states"]
"""State of one user's session, the version of a model that is served, a setting of the group;
several of the first, which come together (``joined``)."""

Answers = Literal["yes", "wait", "lost"]
"""Whether a state has an entry, may have it later, or never will."""
ITEM_BYTES = 128
"""Counted for each item besides its key and value, so that many small ones are bounded, too."""
_LENGTH = struct.Struct("<I")
TERMS_MAX = 1000
"""Of so many it is known where they begin; what is older is held to be there."""


def size_of(key: str, value: bytes | None) -> int:
    """What an entry or item counts, in bytes."""
    return ITEM_BYTES + len(key) + len(value or b"")


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

    @property
    def size_bytes(self) -> int:
        return size_of(self.key, self.value)

    def parts(self) -> list[Entry]:
        """What it changes, one by one. Raises ValueError for bytes that ``joined`` did not make."""
        if self.kind != "states":
            return [self]
        data, parts = self.value or b"", []
        while data:
            key, data = _first(data)
            value, data = _first(data)
            parts.append(Entry(self.at, "state", key.decode(), value))
        return parts


def joined(changes: Mapping[str, bytes]) -> bytes:
    """The value of an entry that changes several keys at once: all of them, or none."""
    parts = [part for key, value in changes.items() for part in (key.encode(), value)]
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _first(data: bytes) -> tuple[bytes, bytes]:
    """The first part of what ``joined`` made, and the rest."""
    if len(data) < _LENGTH.size:
        raise ValueError("a joint change ends too early")
    end = _LENGTH.size + int(_LENGTH.unpack_from(data)[0])
    if len(data) < end:
        raise ValueError("a joint change ends too early")
    return data[_LENGTH.size : end], data[end:]


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
    terms: tuple[Position, ...] = ()
    """The first entry of each term, as far as they are known, up to ``at``."""
    size_bytes: int | None = field(default=None, compare=False)
    """Of its items, as ``size_of`` counts; None: nobody has counted."""


@dataclass
class Log:
    """Entries after ``base``, all of which the state at ``base`` holds already."""

    base: Position = Position()
    entries: list[Entry] = field(default_factory=list)
    size_bytes: int = 0
    """Of ``entries``."""

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
        self.size_bytes += entry.size_bytes
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
            start, new = entry.at.sequence - self.base.sequence - 1, entries[number:]
            self.size_bytes -= sum(e.size_bytes for e in self.entries[start:])
            self.size_bytes += sum(e.size_bytes for e in new)
            self.entries[start:] = new
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

    def forget(self, sequence: int) -> int:
        """Drops the entries up to ``sequence``, which the state holds; gives their bytes."""
        term = self.term_at(sequence)
        if term is None or sequence == self.base.sequence:
            return 0
        count = sequence - self.base.sequence
        dropped_bytes = sum(entry.size_bytes for entry in self.entries[:count])
        del self.entries[:count]
        self.size_bytes -= dropped_bytes
        self.base = Position(term, sequence)
        return dropped_bytes

    def within(self, sequence: int, bytes_max: int) -> int:
        """The least sequence, at most ``sequence``, after which up to it are ``bytes_max``."""
        while sequence > self.base.sequence:
            bytes_max -= self.entries[sequence - self.base.sequence - 1].size_bytes
            if bytes_max < 0:
                break
            sequence -= 1
        return sequence


@dataclass
class State:
    """What the acknowledged entries up to ``at`` make."""

    at: Position = Position()
    items: dict[tuple[Kind, str], Held] = field(default_factory=dict)
    size_bytes: int = 0
    """Of its items, as ``size_of`` counts."""
    terms: list[Position] = field(default_factory=list)
    """The first entry of each term, as far as they are known."""

    def term_at(self, sequence: int) -> int | None:
        """Of the entry with that sequence, which this state has; None if that is not known."""
        index = bisect_right(self.terms, sequence, key=lambda first: first.sequence)
        return self.terms[index - 1].term if index else None

    def answers(self, position: Position) -> Answers:
        """Whether this state has the entry at ``position``."""
        if position.sequence > self.at.sequence:  # terms never fall along a log
            return "lost" if self.at.term > position.term else "wait"
        if self.term_at(position.sequence) in (position.term, None):
            return "yes"
        # Of another history; if that is the older one, this replica is about to begin anew.
        return "lost" if self.at.term >= position.term else "wait"

    def apply(self, log: Log, acknowledged: int) -> list[Entry]:
        """Takes the entries of ``log`` up to ``acknowledged`` in; gives those that were new."""
        new = []
        for entry in log.after(self.at.sequence, acknowledged - self.at.sequence) or ():
            for part in entry.parts():
                self._change(part)
            if entry.at.term != self.at.term:
                self.terms.append(entry.at)
                del self.terms[:-TERMS_MAX]
            self.at = entry.at
            new.append(entry)
        return new

    def _change(self, part: Entry) -> None:
        name = part.kind, part.key
        old = self.items.pop(name, None)
        if old is not None:
            self.size_bytes -= size_of(part.key, old.value)
        if part.value is not None:
            self.items[name] = Held(part.value, part.at.sequence)
            self.size_bytes += part.size_bytes

    def changes(self, image: Image) -> Iterator[Entry]:
        """What has to be changed in this state to make it the one of ``image``.

        Of a large one it takes long: this state must not change before the last is taken.
        """
        for (kind, key), held in image.items.items():
            if self.items.get((kind, key)) != held:
                yield Entry(Position(image.at.term, held.sequence), kind, key, held.value)
        for kind, key in self.items:
            if (kind, key) not in image.items:
                yield Entry(image.at, kind, key, None)

    def image(self) -> Image:
        return Image(self.at, dict(self.items), tuple(self.terms), self.size_bytes)

    @classmethod
    def of(cls, image: Image) -> State:
        size_bytes = image.size_bytes
        if size_bytes is None:
            size_bytes = sum(size_of(key, held.value) for (_, key), held in image.items.items())
        return cls(image.at, dict(image.items), size_bytes, list(image.terms))
