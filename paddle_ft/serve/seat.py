"""What one replica does next: stand, become the primary, record who is in sync, hand over. Pure.

A ``Seat`` is told of the group in etcd (``saw``), of messages (``hear``), of how its transactions
ended (``ended``), and the time. It gives the next transaction (``due``), one at a time. Whoever
carries it out is either ``serve.member`` or the simulator (tests/sim/serve), which breaks promises
when a comparison of these transactions is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paddle_ft.coordination.kv import Transaction
from paddle_ft.serve import elect, registry
from paddle_ft.serve.broadcast import (
    HOLD_S,
    UNCONFIRMED_S,
    Answer,
    Append,
    Install,
    Primary,
    Replica,
)
from paddle_ft.serve.elect import Candidate, Election, stands
from paddle_ft.serve.log import Answers, Entry, Kind, Position
from paddle_ft.serve.registry import Group, InSync, Keys, ReplicaRecord

PATIENCE_S = 0.5
"""How long a replica that is in sync may be behind before it is one no longer."""
HAND_OVER_S = 0.3
"""How long changes wait for a planned promotion before it is called off."""


@dataclass(frozen=True, slots=True)
class Deed:
    """A transaction to be carried out, and what it is for."""

    kind: Literal["campaign", "begin", "record", "hand_over", "refuse", "force"]
    transaction: Transaction
    in_sync: frozenset[str] = frozenset()
    """Of a record; of those whose changes are given up."""


class Seat:
    """One replica's place in its group.

    Args:
        in_sync_min: so many, with the primary, must have an entry before it is acknowledged.
        patience_s: how long one that is in sync may be behind before it is in sync no longer.
        observe_s: how long a primary without a lease must be silent before this one stands; not
            less than HOLD_S.
    """

    def __init__(
        self,
        name: str,
        keys: Keys,
        in_sync_min: int = 1,
        patience_s: float = PATIENCE_S,
        observe_s: float = HOLD_S,
    ) -> None:
        self.replica = Replica(name)
        self.primary: Primary | None = None
        self.group = Group()
        self._deaths: dict[str, int] = {}
        """create_revision of the records of replicas whose processes are known to have ended."""
        self._keys = keys
        self._in_sync_min = in_sync_min
        self._patience_s = patience_s
        self._observe_s = observe_s
        self._vacant_since_s = 0.0
        self._heard_s = float("-inf")
        self._heard_of = ""
        """The primary that was followed last."""
        self._ahead_s = 0.0
        """Its clock goes before this replica's by so much, or more."""
        self._recorded_revision = 0
        """mod_revision of what ``primary.recorded`` says."""
        self._candidacy: int | None = None
        """in_sync_revision of a campaign that may take effect still."""
        self._won_revision = 0
        """When it did."""
        self._handing_s = float("inf")
        """Since when changes wait for a hand-over."""
        self._handed = False
        """That may have taken effect."""
        self._called_off = 0
        """promote_revision of a wish that is not to be fulfilled."""

    @property
    def name(self) -> str:
        return self.replica.name

    @property
    def in_sync(self) -> frozenset[str]:
        """As etcd has it, or as this primary has written it since."""
        if self.primary is not None:
            return self.primary.recorded
        return frozenset(self.group.in_sync.names if self.group.in_sync else ())

    @property
    def recorded_revision(self) -> int:
        """mod_revision of what says who is in sync."""
        return self._recorded_revision

    @property
    def dead(self) -> frozenset[str]:
        """Replicas whose processes are known to have ended."""
        return frozenset(self._deaths)

    def died(self, *names: str) -> None:
        """They are known to have ended, unless they register again."""
        for name in names:
            self._deaths[name] = self.group.since.get(name, 0)

    @property
    def outlived(self) -> tuple[str, ...]:
        """For this replica's record."""
        in_sync = self.group.in_sync
        return elect.outlived(self.name, in_sync.names if in_sync else ())

    def leave(self) -> None:
        """Is the primary no longer."""
        self._step_down()

    @property
    def handing_over(self) -> bool:
        """Changes have to wait: another replica is about to become the primary."""
        return self.primary is not None and self._handing_s != float("inf")

    def leads(self, now_s: float, deadline_s: float) -> bool:
        """Whether it may say that a change is done, and what the newest value is.

        ``deadline_s``: until when the lease of the primary's key, if it is its own, certainly
        stands.
        """
        primary = self.primary
        if primary is None or primary.deposed:
            return False
        return now_s < deadline_s or primary.confirmed(now_s)

    def inherited(self) -> int:
        """Up to where the state must go before what is asked for now is read, too.

        A new primary first learns that what it has of its predecessor is acknowledged, as it may
        have been before: who reads there, and then writes, goes on from the newest. It holds for
        who has asked, also if this replica is the primary no longer when it gets there.
        """
        return self.primary.inherited if self.primary is not None else 0

    def answers(self, at_least: Position, inherited: int) -> Answers:
        """Whether what is read here has the entry at ``at_least``, and what was ``inherited`` when
        it was asked for."""
        state = self.replica.state
        found = state.answers(at_least)
        return "wait" if found == "yes" and state.at.sequence < inherited else found

    # ------------------------------------------------------------ what is seen

    def saw(self, group: Group, now_s: float) -> Sequence[Entry]:
        """Takes a newer view of the group; gives what is acknowledged with it."""
        if group.revision < self.group.revision:
            return ()
        if group.primary is None and self.group.primary is not None:
            self._vacant_since_s = now_s
        self.group = group
        for name in [n for n, at in self._deaths.items() if group.since.get(n, at) > at]:
            del self._deaths[name]  # it was cut off, and is back
        won = self._won_revision and group.revision >= self._won_revision
        if won or group.in_sync_revision != self._candidacy:
            self._candidacy, self._won_revision = None, 0
        mine = group.primary == self.name
        if self.primary is not None and not (mine and group.term == self.primary.term):
            self._step_down()
        if mine and self.primary is None:
            self._step_up(now_s)
        if self.primary is None or group.in_sync_revision <= self._recorded_revision:
            return ()
        names = frozenset(group.in_sync.names if group.in_sync else ())
        if names != self.primary.proposed:
            return ()
        self._recorded_revision = group.in_sync_revision
        return self.primary.recorded_is(names)

    def _step_up(self, now_s: float) -> None:
        group, replica = self.group, self.replica
        if group.in_sync is None or group.term <= replica.log.last.term:
            return
        if group.term < replica.term:  # somebody else has it by now
            return
        self._recorded_revision = group.in_sync_revision
        members = group.in_sync.names
        self.primary = Primary(replica, group.term, members, self._in_sync_min, now_s)

    def _step_down(self) -> None:
        self.primary = None
        self._handing_s, self._handed = float("inf"), False

    # ------------------------------------------------------------ messages

    def hear(self, message: Append | Install, now_s: float) -> Answer:
        """A primary's message."""
        own = self.primary
        if own is not None:
            if message.term < own.term:
                return Answer(own.term, self.name, False, 0)
            self._step_down()
        answer = self.replica.hear(message)
        if answer.sent_s == UNCONFIRMED_S:
            return answer
        self._heard_s, self._heard_of = now_s, message.sender
        self._ahead_s = message.sent_s - now_s
        if self._candidacy is not None:  # it may be the primary in a moment: no promise
            return Answer(answer.term, answer.sender, answer.agrees, answer.sequence)
        return answer

    def at_primary(self, name: str, now_s: float) -> float | None:
        """A time by the clock of the primary ``name`` at which it is not later than ``now_s``
        here; None if this replica does not follow that one yet."""
        return now_s + self._ahead_s if self._heard_of == name else None

    def answered(self, answer: Answer, now_s: float) -> Sequence[Entry]:
        """A replica's answer to this primary; gives what is acknowledged with it."""
        if self.primary is None:
            return ()
        new = self.primary.hear(answer, now_s)
        if self.primary.deposed:
            self._step_down()
        return new

    def put(self, kind: Kind, key: str, value: bytes | None) -> Entry:
        assert self.primary is not None
        return self.primary.put(kind, key, value)

    # ------------------------------------------------------------ what is due

    def due(self, now_s: float, lease: int, unix_s: float = 0.0) -> Deed | None:
        """The next transaction, if there is one; ``lease`` is this replica's own, 0: it has none.

        The one before must have ended. ``unix_s``: the time of day, to be noted for people.
        """
        if self.primary is not None and self.primary.deposed:
            self._step_down()
        group, promote = self.group, self.group.promote
        wanted = promote is not None and not promote.refused and promote.target == self.name
        if lease and promote is not None and promote.force and wanted and self.primary is None:
            lost = () if self.name in self.in_sync else self.in_sync
            txn = registry.force(self._keys, group, self.name, lease, unix_s)
            return Deed("force", txn, frozenset(lost))
        if self.primary is not None:
            return self._promotion_due(now_s) or self._record_due(now_s)
        if lease and group.revision and not self.replica.undone and self._stands(now_s):
            self._candidacy = group.in_sync_revision
            if elect.all_ended(group):
                txn = registry.begin(self._keys, group, self.name, lease, unix_s)
                return Deed("begin", txn, self.in_sync)
            return Deed("campaign", registry.campaign(self._keys, group, self.name, lease))
        return None

    def _stands(self, now_s: float) -> bool:
        group = self.group
        target = group.promote.target if group.promote and not group.promote.refused else ""
        in_sync = frozenset(group.in_sync.names) if group.in_sync else None
        ended = elect.ended(group)
        election = Election(
            me=self.name,
            candidates={n: _candidate(r) for n, r in group.replicas.items() if n not in ended},
            in_sync=None if elect.all_ended(group) else in_sync,
            primary=group.primary or "",
            vacant_since_s=self._vacant_since_s,
            handed_to=target,
            heard_s=self._heard_s,
            dead=self._heard_of in self.dead | ended,
            observe_s=self._observe_s,
        )
        return stands(election, now_s)

    def _record_due(self, now_s: float) -> Deed | None:
        primary = self.primary
        assert primary is not None
        live = set(self.group.replicas) - self.dead
        if not primary.record_due(live, now_s, self._patience_s):
            return None
        assert primary.proposed is not None
        names = InSync(primary.term, tuple(sorted(primary.proposed)))
        txn = registry.record(self._keys, names, self._recorded_revision)
        return Deed("record", txn, primary.proposed)

    def _promotion_due(self, now_s: float) -> Deed | None:
        """A hand-over once its target has everything; a refusal if that cannot be."""
        primary, group = self.primary, self.group
        assert primary is not None
        promote = group.promote
        if promote is None or promote.refused:
            self._handing_s, self._handed = float("inf"), False
            return None
        why = self._obstacle(promote.target, promote.force)
        if promote.force and not why:  # the target does it by itself: no waiting, no refusing
            self._handing_s, self._handed = float("inf"), False
            return None
        if not why and now_s - self._handing_s > HAND_OVER_S:
            why = f"{promote.target} did not have everything within {HAND_OVER_S:g} s"
        if why or group.promote_revision == self._called_off:
            self._called_off = group.promote_revision
            if not self._handed:  # else it has to be known first
                self._handing_s = float("inf")
            why = why or f"{promote.target} could not take over in time"
            return Deed("refuse", registry.refuse(self._keys, group, why))
        self._handing_s = min(self._handing_s, now_s)
        if primary.proposed is not None:
            return None  # the record first
        done = primary.acknowledged == primary.log.last.sequence
        if not done or primary.agreed(promote.target) < primary.log.last.sequence:
            return None
        self._handed = True
        revision = self._recorded_revision
        txn = registry.hand_over(self._keys, group, revision, promote.target)
        return Deed("hand_over", txn)

    def _obstacle(self, target: str, force: bool) -> str:
        """Why ``target`` cannot become the primary now; "" if it can."""
        assert self.primary is not None
        if target == self.name:
            return f"{target} is the primary already"
        if target not in self.group.replicas:
            return f"there is no replica {target}"
        if force:
            return ""
        if not _candidate(self.group.replicas[target]).ready:
            return f"{target} is {self.group.replicas[target].condition}: wait until it is ready"
        if target not in self.primary.recorded:
            return f"{target} is not in sync: wait until it is, or force it"
        return ""

    def ended(self, deed: Deed, succeeded: bool | None, revision: int) -> Sequence[Entry]:
        """How a transaction ended, at which revision of etcd; None: that is not known.

        Gives what is acknowledged with it.
        """
        if deed.kind in ("campaign", "begin") and succeeded is not None:
            self._won_revision = revision if succeeded else 0
            self._candidacy = self._candidacy if succeeded else None
        primary = self.primary
        if deed.kind != "record" or not succeeded or primary is None:
            return ()
        if primary.proposed != deed.in_sync or revision <= self._recorded_revision:
            return ()
        self._recorded_revision = revision
        return primary.recorded_is(deed.in_sync)


def _candidate(record: ReplicaRecord) -> Candidate:
    return Candidate(record.name, Position(record.term, record.sequence), elect.fit(record))
