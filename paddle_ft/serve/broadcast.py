"""Who may acknowledge a change, and when: the primary's and the replica's side. Pure.

The names of the replicas that every acknowledged entry is on are recorded in etcd: they are **in
sync**. Only the primary writes that record, in a transaction that fails if it is the primary no
longer; only who is in it may become the next primary (``elect``). Hence:

- an entry is acknowledged once all that are in sync have it, and at least ``in_sync_min`` are;
- who does not keep up is taken out of the record first, and not waited for after that;
- who has caught up is waited for first, and put into the record after that;
- so whoever becomes primary holds every entry that was ever acknowledged. It keeps its log as it
  is, and the others cut theirs back to where they agree with it.

An answer of etcd that is lost leaves two records possible, also later: a request may still be on
its way. So both count until etcd is known to have taken the new one, and the primary proposes no
other one before that. A record is never smaller than what acknowledging takes: it would only keep
others from taking over.

Who may still say that it is done: whoever becomes the primary next was in sync, has not heard of
this one for HOLD_S (or knows that it is dead), and refuses it afterwards. So a primary whose other
members of the record have all answered what it sent within FRESH_S is the only one, whatever has
become of its lease (``confirmed``); one that is alone in the record goes by its lease.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from paddle_ft.serve.log import Entry, Image, Kind, Log, Position, State

ENTRIES_MAX = 256
"""In one message."""
MESSAGE_BYTES_MAX = 2**20
"""Of the values in one message, unless a single one is larger."""
KEPT = 10_000
"""So many entries that the state holds already are kept, for those who are a little behind, or who
are being sent an image."""
KEPT_BYTES = 2**26
"""And not more of them than this; for a while up to twice of both."""
FRESH_S = 0.4
HOLD_S = 0.5
"""Longer than FRESH_S by what two clocks may differ in that time."""
UNCONFIRMED_S = float("-inf")


@dataclass(frozen=True, slots=True)
class Append:
    """The primary's entries after ``before``; none of them is a sign of life."""

    term: int
    sender: str
    before: Position
    entries: tuple[Entry, ...]
    acknowledged: int
    sent_s: float = UNCONFIRMED_S
    """By the primary's clock; comes back with the answer."""


@dataclass(frozen=True, slots=True)
class Install:
    """Begin with ``image``: the entries that made it are not held any more."""

    term: int
    sender: str
    image: Image
    sent_s: float = UNCONFIRMED_S


@dataclass(frozen=True, slots=True)
class Answer:
    """``agrees``: the replica's log is the primary's up to ``sequence``; else it may be there."""

    term: int
    sender: str
    agrees: bool
    sequence: int
    sent_s: float = UNCONFIRMED_S
    """Of what is answered; the sender will not stand for HOLD_S."""


@dataclass
class Replica:
    """One replica's log and state, and the highest term it has heard of."""

    name: str
    term: int = 0
    log: Log = field(default_factory=Log)
    state: State = field(default_factory=State)
    undone: bool = False
    """After a forced promotion: the primary lacks what this state is made of. This replica cannot
    go on; it has to begin anew, under another name."""
    _fresh: list[Iterable[Entry]] = field(default_factory=list)
    """What has changed the state and has not been taken away yet."""
    kept: int = KEPT
    kept_bytes: int = KEPT_BYTES
    _applied_bytes: int = 0
    """Of those entries of the log that the state holds."""

    @property
    def pending_bytes(self) -> int:
        """Of the entries that are not acknowledged yet, as far as is known here."""
        return self.log.size_bytes - self._applied_bytes

    def hear(self, message: Append | Install) -> Answer:
        """Follows a primary; refuses one of a lower term, which then learns of the higher one."""
        if message.term < self.term:
            return Answer(self.term, self.name, False, 0)
        self.term = message.term
        if isinstance(message, Install):
            at = [message.image.at]
        else:
            at = [message.before, *[entry.at for entry in message.entries]]
        if self.undone or any(self._differs(position) for position in at):
            self.undone = True
            return Answer(self.term, self.name, False, 0)
        if isinstance(message, Install):
            return self._begin_with(message)
        before, entries = message.before, message.entries
        if not self.log.follow(before, entries):
            meeting = self.log.meeting(before)
            return Answer(self.term, self.name, False, meeting, message.sent_s)
        agreed = before.sequence + len(entries)
        self.apply(min(message.acknowledged, agreed))
        return Answer(self.term, self.name, True, agreed, message.sent_s)

    def apply(self, acknowledged: int) -> Sequence[Entry]:
        """Takes what is acknowledged into the state; gives what is new."""
        new = self.state.apply(self.log, acknowledged)
        self._fresh += [entry.parts() for entry in new]
        self._applied_bytes += sum(entry.size_bytes for entry in new)
        at, log = self.state.at.sequence, self.log
        too_many = at - log.base.sequence > 2 * self.kept
        if too_many or self._applied_bytes > 2 * self.kept_bytes:
            first = max(at - self.kept, log.within(at, self.kept_bytes))
            self._applied_bytes -= log.forget(first)
        return new

    def fresh(self) -> Iterator[Entry]:
        """What has changed the state since it was asked for last, one by one; of an image it is
        found while it is taken."""
        fresh, self._fresh = self._fresh, []
        return chain.from_iterable(fresh)

    def _differs(self, position: Position) -> bool:
        """Whether the state holds another entry in the place of that of the primary."""
        if not 0 < position.sequence <= self.state.at.sequence:
            return False
        term = self.log.term_at(position.sequence)
        if term is None:  # terms never fall along a log
            return position.term > self.log.base.term
        return term != position.term

    def _begin_with(self, message: Install) -> Answer:
        image = message.image
        if image.at.sequence > self.state.at.sequence:
            if not self.log.holds(image.at):
                self.log = Log(image.at)
            else:
                self.log.forget(image.at.sequence)
            self._applied_bytes = 0
            self._fresh.append(self.state.changes(image))
            self.state = State.of(image)
        return Answer(self.term, self.name, True, image.at.sequence, message.sent_s)


@dataclass
class Progress:
    """What the primary knows of one replica."""

    agreed: int = 0
    """Its log is the primary's up to here."""
    next: int = 0
    """What it is told next comes after this sequence."""
    heard_s: float = float("-inf")
    confirmed_s: float = UNCONFIRMED_S
    """When that was sent which it has answered, and by which it is bound."""
    behind_since_s: float = float("inf")
    """Since when it lacks something that was there."""


class Primary:
    """The primary's side, for one term.

    Args:
        replica: its own log and state, which it goes on with.
        term: create_revision of the key that makes it the primary.
        recorded: who is in sync, as etcd has it.
        in_sync_min: so many, with the primary, must have an entry before it is acknowledged.
    """

    def __init__(
        self,
        replica: Replica,
        term: int,
        recorded: Iterable[str],
        in_sync_min: int,
        now_s: float,
    ) -> None:
        assert term > replica.log.last.term, "etcd counts up"
        replica.term = max(replica.term, term)
        self.term = term
        self.recorded = frozenset(recorded)
        self.proposed: frozenset[str] | None = None
        """Another record, which etcd may or may not have taken by now."""
        self.acknowledged = replica.state.at.sequence
        self.inherited = replica.log.last.sequence
        """Up to there its predecessor may have acknowledged."""
        self._replica = replica
        self._in_sync_min = in_sync_min
        self._progress: dict[str, Progress] = {}
        self._began_s = now_s

    @property
    def log(self) -> Log:
        return self._replica.log

    @property
    def deposed(self) -> bool:
        """A higher term has been heard of."""
        return self._replica.term > self.term

    @property
    def accepts(self) -> bool:
        """Whether a change can be acknowledged with those that are in sync now."""
        return not self.deposed and len(self.recorded) >= self._in_sync_min

    def confirmed(self, now_s: float) -> bool:
        """Whether nobody else can be the primary now; False if it is alone in the record."""
        counted = (self.recorded | (self.proposed or frozenset())) - {self._replica.name}
        since_s = min((self._of(name).confirmed_s for name in counted), default=UNCONFIRMED_S)
        return not self.deposed and now_s - since_s < FRESH_S

    def agreed(self, name: str) -> int:
        """Up to where ``name`` has this log."""
        return self._has(name)

    def told(self, name: str) -> bool:
        """Whether ``name`` has been sent all that there is, as far as is known."""
        return self._of(name).next >= self.log.last.sequence

    def put(self, kind: Kind, key: str, value: bytes | None) -> Entry:
        """Takes a change in; it is done once ``acknowledged`` has come to its sequence."""
        assert not self.deposed
        return self.log.append(self.term, kind, key, value)

    def message(self, name: str, now_s: float) -> Append | Install:
        """What ``name`` is told next."""
        progress = self._of(name)
        start = progress.next
        entries = self.log.after(start, ENTRIES_MAX, MESSAGE_BYTES_MAX)
        term = self.log.term_at(start)
        if entries is None or term is None:
            progress.next = self._replica.state.at.sequence
            return Install(self.term, self._replica.name, self._replica.state.image(), now_s)
        if progress.agreed < self.log.last.sequence:
            progress.behind_since_s = min(progress.behind_since_s, now_s)
        before = Position(term, start)
        known = self.acknowledged
        return Append(self.term, self._replica.name, before, tuple(entries), known, now_s)

    def hear(self, answer: Answer, now_s: float) -> Sequence[Entry]:
        """Takes a replica's answer; gives what is acknowledged with it."""
        if answer.term > self.term:
            self._replica.term = max(self._replica.term, answer.term)
            return ()
        progress = self._of(answer.sender)
        progress.heard_s = max(progress.heard_s, now_s)
        if answer.term == self.term:
            progress.confirmed_s = max(progress.confirmed_s, answer.sent_s)
        if answer.agrees:
            if answer.sequence > progress.agreed:
                progress.agreed = answer.sequence
                progress.behind_since_s = now_s
            progress.next = max(progress.next, progress.agreed)
            if progress.agreed >= self.log.last.sequence:
                progress.behind_since_s = float("inf")
        elif answer.sequence < progress.next:
            progress.next = max(answer.sequence, progress.agreed)
        return self.advance()

    def advance(self) -> Sequence[Entry]:
        """Acknowledges what all that count have; gives what is new."""
        counted = [self.recorded] if self.proposed is None else [self.recorded, self.proposed]
        if self.deposed or min(map(len, counted)) < self._in_sync_min:
            return ()
        have = [self._has(name) for names in counted for name in names]
        self.acknowledged = max(self.acknowledged, min(have, default=0))
        return self._replica.apply(self.acknowledged)

    def _has(self, name: str) -> int:
        return self.log.last.sequence if name == self._replica.name else self._of(name).agreed

    def _of(self, name: str) -> Progress:
        new = Progress(next=self.log.last.sequence, heard_s=self._began_s)
        return self._progress.setdefault(name, new)

    # ------------------------------------------------------------ who is in sync

    def record_due(self, live: Iterable[str], now_s: float, patience_s: float) -> bool:
        """Whether the record in etcd should be another one; ``proposed`` is what it should be.

        ``live``: replicas that are registered. Who has not answered, or not caught up, for
        ``patience_s`` goes out; who has caught up comes in. Until ``recorded_is`` the old and the
        new record both count.
        """
        if self.deposed:
            return False
        if self.proposed is not None:
            return True
        wanted = {self._replica.name}
        for name in set(live) - wanted:
            progress = self._of(name)
            silent = now_s - progress.heard_s > patience_s
            slow = now_s - progress.behind_since_s > patience_s
            if name in self.recorded:
                if not silent and not slow:
                    wanted.add(name)
            elif not silent and progress.agreed >= self.acknowledged:
                wanted.add(name)
        furthest = sorted(self.recorded - wanted, key=lambda n: (-self._of(n).agreed, n))
        wanted |= set(furthest[: max(0, self._in_sync_min - len(wanted))])
        if wanted == self.recorded:
            return False
        self.proposed = frozenset(wanted)
        return True

    def recorded_is(self, names: Iterable[str]) -> Sequence[Entry]:
        """etcd has taken what was proposed: ``names`` are in sync."""
        self.recorded, self.proposed = frozenset(names), None
        return self.advance()
