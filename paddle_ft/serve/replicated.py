"""The state that a serving group shares, as one replica has it: an object for its event loop.

    group = Replicated(GroupSettings(etcd, "digits", node="n1", host=…, http_port=…))
    await group.start()
    position = await group.put("state", "session-7", b"…")  # on the primary
    held = await group.get("state", "session-7", at_least=position)  # on any replica
    await group.promote("n2")
    await group.close()

What was acknowledged (``put`` has returned) is on every replica that is in sync, and survives all
but the last of them. Decisions are ``seat``'s, carrying them out ``participant``'s.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from paddle_ft.agent.net import endpoint
from paddle_ft.serve import passing, promotion, registry
from paddle_ft.serve.ledger import Ledger
from paddle_ft.serve.log import Entry, Held, Kind, Position
from paddle_ft.serve.participant import GroupSettings, Participant
from paddle_ft.serve.reads import Reads
from paddle_ft.serve.registry import Group, ReplicaRecord
from paddle_ft.serve.seat import Seat
from paddle_ft.serve.types import Lost, NoPrimary, NotPrimary, ServeError, Unavailable

log = logging.getLogger("paddle_ft")

__all__ = ["GroupSettings", "Replicated", "Status"]

PIECE_S = 0.004
"""So long at a time a replica is busy with what an image has changed."""
PIECE = 32
PENDING_MAX = 10_000
"""Changes that are not acknowledged yet."""
PENDING_BYTES_MAX = 2**26
EXPIRED_MAX = 256
"""Keys of sessions deleted at one look."""
LOOK_S = 1.0
LEAVE_S = 2.0


@dataclass(frozen=True, slots=True)
class Status:
    """What ``paddle-ft serving`` tells of a replica."""

    name: str
    role: str
    term: int
    """Of the primary that it follows, or its own."""
    primary: str
    in_sync: tuple[str, ...]
    at: Position
    """Where its state stands."""
    last: Position
    """Its log's last entry."""
    lease_left_s: float
    agreed: dict[str, int] = field(default_factory=dict)
    """On the primary: up to where the others have its log."""


class Replicated:
    """Used on one event loop, which runs all of it but the waiting for etcd."""

    def __init__(self, settings: GroupSettings) -> None:
        """Opens nothing yet; raises ConfigError."""
        self._settings = settings
        self._party = Participant(settings, self, self.put)
        self._puts: dict[int, asyncio.Future[Position]] = {}
        """By sequence."""
        self._reads = Reads()
        self._ledger = Ledger(settings.bounds)
        self._expiry: asyncio.Task[None] | None = None
        self._callbacks: list[Callable[[Entry], None]] = []
        self._news: deque[Iterator[Entry]] = deque()
        """Of what has changed the state, what has not been told of yet."""

    async def start(self) -> None:
        """Listens, registers, and takes part from now on; raises CoordinationError, ConfigError."""
        await self._party.start()
        self._expiry = asyncio.get_running_loop().create_task(self._expire())

    async def hand_over(self) -> bool:
        """Before it leaves: makes another the primary; False if there is none that can be."""
        return await promotion.hand_over(self._party, LEAVE_S)

    async def close(self) -> None:
        """Leaves: a primary hands over first, if somebody is in sync. Waits for etcd."""
        if self._seat.primary is not None and not await self.hand_over():
            await promotion.give_up(self._party, LEAVE_S)
        if self._expiry is not None:
            self._expiry.cancel()
        await self._party.close()
        self._reads.close()

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done once this replica takes part no longer; with an exception if by a defect."""
        return self._party.ended

    # ------------------------------------------------------------ what is known

    @property
    def name(self) -> str:
        """Of this life of this replica."""
        return self._seat.name

    @property
    def _seat(self) -> Seat:
        return self._party.seat

    @property
    def group(self) -> Group:
        """As etcd has it."""
        return self._seat.group

    @property
    def role(self) -> str:
        """``primary`` while it may answer changes, else ``replica``."""
        return "primary" if self._party.leads() else "replica"

    @property
    def term(self) -> int:
        """Of the primary; goes with every reply to a change."""
        primary = self._seat.primary
        return primary.term if primary is not None else self._seat.replica.term

    @property
    def at(self) -> Position:
        """Where this replica's state stands; it holds all up to there that was acknowledged."""
        return self._seat.replica.state.at

    @property
    def primary(self) -> ReplicaRecord | None:
        """Whom changes go to; None if that is not known."""
        return self.group.replicas.get(self.group.primary or "")

    def status(self) -> Status:
        seat = self._seat
        agreed = {}
        if seat.primary is not None:
            agreed = {n: seat.primary.agreed(n) for n in self.group.replicas if n != self.name}
        return Status(
            name=self.name,
            role=self.role,
            term=self.term,
            primary=self.group.primary or "",
            in_sync=tuple(sorted(seat.in_sync)),
            at=seat.replica.state.at,
            last=seat.replica.log.last,
            lease_left_s=self._party.member.deadline_s(self._party.member.lease) - time.monotonic(),
            agreed=agreed,
        )

    def items(self, kind: Kind) -> dict[str, bytes]:
        """All of one kind, as this replica has it."""
        found = self._seat.replica.state.items.items()
        return {key: held.value for (k, key), held in found if k == kind}

    def on_applied(self, callback: Callable[[Entry], None]) -> None:
        """``callback`` is called with each acknowledged change but those of sessions, on the event
        loop, in order; where a replica begins with an image, with what differs, soon after.

        It must not block.
        """
        self._callbacks.append(callback)

    @property
    def told(self) -> bool:
        """Whether the callbacks have been told of all that the state has."""
        return not self._news

    def tell(self, **changes: Any) -> None:
        """Sets fields of this replica's record (condition, models, weight, share, ports)."""
        self._party.tell(**changes)

    async def choose(self, level: registry.Level) -> None:
        """How the group is served, unless somebody has chosen by now."""
        member = self._party.member
        txn = registry.choose(member.keys, level, self.group)
        await self._party.in_thread(member.transact, txn)

    # ------------------------------------------------------------ changes

    async def put(
        self, kind: Kind, key: str, value: bytes | None, timeout_s: float = 5.0, term: int = 0
    ) -> Position:
        """Where the change stands, once all that are in sync have it. None removes ``key``.

        ``term``: if not 0, in no other one, of a change that another replica passes on.

        Raises:
            NotPrimary: ask the one that it names.
            NoPrimary: there is none, and nothing was done.
            Unavailable: nobody can take it now; or whether it was taken is not known, in which
                case the message says so.
            TooLarge: it is beyond a bound; Full: that of the whole state.
        """
        until_s = time.monotonic() + timeout_s
        self._ledger.check(self._seat.replica.state, kind, key, value)
        if self._seat.handing_over:
            position = await passing.after_hand_over(
                self._party, (kind, key, value), until_s, passed=term > 0
            )
            if position is not None:
                return position
        self._refuse_unless_taking()
        if term and term != self.term:
            raise NoPrimary("the primary is another one by now: ask again", 0.2)
        if time.monotonic() >= until_s:
            raise Unavailable("the time of this change was over before it was taken: ask again")
        self._ledger.wrote(key, time.monotonic())
        sequence = self._party.put(kind, key, value).at.sequence
        waiting = self._puts[sequence] = asyncio.get_running_loop().create_future()
        self._party.advance()
        try:
            return await asyncio.wait_for(waiting, max(0.0, until_s - time.monotonic()))
        except asyncio.TimeoutError:
            raise Unavailable(
                f"the change was not acknowledged within {timeout_s:g} s, and whether it will be "
                "is not known"
            ) from None
        finally:
            if self._puts.get(sequence) is waiting:
                del self._puts[sequence]

    async def put_anywhere(
        self, kind: Kind, key: str, value: bytes | None, timeout_s: float = 5.0
    ) -> Position:
        """As ``put``, passed on to the primary if that is another replica, which is waited for."""
        return await passing.anywhere(self._party, self.put, (kind, key, value), timeout_s)

    async def delete(self, kind: Kind, key: str, timeout_s: float = 5.0) -> Position:
        """As ``put``; no error if there is no ``key``."""
        return await self.put(kind, key, None, timeout_s)

    def _refuse_unless_taking(self) -> None:
        primary, other = self._seat.primary, self.primary
        if primary is None:
            if other is not None and other.name != self.name:
                raise NotPrimary(other.name, endpoint(other.host, other.http_port))
            raise self._nobody()
        if not self._party.leads():
            raise NoPrimary("this primary cannot renew its lease, and takes no changes", 1.0)
        if not primary.accepts:
            raise Unavailable(
                f"{len(primary.recorded)} replicas are in sync and {self._settings.in_sync_min} "
                "must be: ask again",
                1.0,
            )
        waiting = primary.log.last.sequence - primary.acknowledged
        pending_bytes = self._seat.replica.pending_bytes
        if waiting >= PENDING_MAX or pending_bytes >= PENDING_BYTES_MAX:
            raise Unavailable(
                f"{waiting} changes of {pending_bytes} bytes wait already: ask again", 1.0
            )

    def _nobody(self) -> NoPrimary:
        in_sync = self.group.in_sync
        if in_sync is not None and not self.group.replicas.keys() & set(in_sync.names):
            return NoPrimary(
                "all replicas that had the state of the group are gone "
                f"({', '.join(in_sync.names)}): it begins anew once all their nodes are back, or "
                "promote another replica with --force",
                5.0,
            )
        return NoPrimary("there is no primary at the moment: ask again", 0.2)

    # ------------------------------------------------------------ reads

    async def get(
        self,
        kind: Kind,
        key: str,
        at_least: Position | None = None,
        timeout_s: float = 1.0,
    ) -> Held | None:
        """The value as this replica has it, once it has got to ``at_least``; None: there is none.

        Raises:
            Unavailable: it does not get there in time; another replica may be ahead.
            Lost: ``at_least`` is gone.
        """
        until_s, at_least = time.monotonic() + timeout_s, at_least or Position()
        inherited = self._seat.inherited()
        wanted = max(at_least.sequence, inherited)
        while (found := self._seat.answers(at_least, inherited)) == "wait":
            await self._reads.wait(wanted, max(0.0, until_s - time.monotonic()))
        if found == "lost":
            raise _lost(at_least)
        return self._seat.replica.state.items.get((kind, key))

    # ------------------------------------------------------------ promotion

    async def promote(self, target: str, force: bool = False, timeout_s: float = 5.0) -> str:
        """Makes ``target`` (a replica, or its node) the primary; gives its name.

        Can be called on any replica. ``force``: whoever the primary is, and even if changes that
        ``target`` has not got are lost.

        Raises NotPromoted; Unavailable if it has not come about in time, and will not.
        """
        return await promotion.promote(self._party, target, force, timeout_s)

    # ------------------------------------------------------------ as the participant's listener

    def acknowledged(self, entries: Sequence[Entry]) -> None:
        leads = self._party.leads()
        for entry in entries:
            waiting = self._puts.pop(entry.at.sequence, None)
            if waiting is None or waiting.done():
                continue
            if leads:
                waiting.set_result(entry.at)
            else:
                waiting.set_exception(_unknown("this primary cannot renew its lease"))

    def applied(self, entries: Iterator[Entry]) -> None:
        self._reads.reached(self._seat.replica.state.at.sequence)
        self._news.append(entries)
        if len(self._news) == 1:
            self._digest(PIECE_S)

    def _digest(self, most_s: float) -> None:
        """Tells of what has changed, in order, for at most about ``most_s`` now and the rest
        soon: of a large image it takes seconds."""
        until_s = time.monotonic() + most_s
        while self._news:
            for number, entry in enumerate(self._news[0], 1):
                self._tell_change(entry)
                if number % PIECE == 0 and time.monotonic() > until_s:
                    asyncio.get_running_loop().call_soon(self._digest, PIECE_S)
                    return
            self._news.popleft()

    def _tell_change(self, entry: Entry) -> None:
        self._ledger.took(entry, time.monotonic())
        if entry.kind == "state":
            return
        for callback in self._callbacks:
            try:
                callback(entry)
            except Exception:  # the broadcast must not end with it
                log.exception("what was to be done about %s %s failed", entry.kind, entry.key)

    def role_changed(self) -> None:
        """Whoever waited for this primary does not know."""
        self._digest(math.inf)  # a primary has to know how large sessions are
        puts, self._puts = self._puts, {}
        for waiting in puts.values():
            if not waiting.done():
                waiting.set_exception(_unknown("this replica is the primary no longer"))
        replica, now_s = self._seat.replica, time.monotonic()
        for entry in replica.log.after(replica.state.at.sequence, len(replica.log.entries)) or ():
            self._ledger.wrote(entry.key, now_s)

    # ------------------------------------------------------------ sessions

    async def _expire(self) -> None:
        ttl_s = self._settings.bounds.session_ttl_s
        while ttl_s:
            await asyncio.sleep(min(LOOK_S, ttl_s / 4))
            try:
                self._refuse_unless_taking()
            except ServeError:
                continue
            if not self._seat.handing_over:
                for name in self._ledger.due(time.monotonic(), EXPIRED_MAX):
                    self._party.put("state", name, None)
                self._party.advance()


def _lost(at: Position) -> Lost:
    return Lost(
        f"the change {at.term}.{at.sequence} is lost: a replica without it was made the primary by "
        "force; read without it, and make it again"
    )


def _unknown(why: str) -> Unavailable:
    return Unavailable(f"{why}, and whether the change was taken is not known: read it", 0.2)
