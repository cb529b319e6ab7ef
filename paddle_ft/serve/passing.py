"""Changes on their way to the primary, whichever replica was asked to make them.

Invariant: a change is given to another replica again only if it is known that the one before has
done nothing. So one that is answered with an error may have been made, once, and says so; nothing
is made after its time is over that a later change by the same client could be undone by. The time
counts from when it may have come in (``standstill``), and the primary, to which it is passed on,
goes by it, too, however long it was on its way. Who passes it on gives up as soon as that one is
the primary no longer; so it is made in the term in which it was passed on, or not at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from paddle_ft.agent.net import endpoint
from paddle_ft.serve.log import Kind, Position
from paddle_ft.serve.participant import Participant
from paddle_ft.serve.registry import ReplicaRecord
from paddle_ft.serve.types import NoPrimary, NotPrimary, Unavailable

Change = tuple[Kind, str, bytes | None]

PRIMARY_S = 1.0
"""How long a change waits for a primary."""
AFTER_S = 0.3
"""How long one that is the primary no longer may take to say what has become of a change."""
PAUSE_S = 0.005
LOOK_S = 0.05


async def anywhere(
    party: Participant,
    put: Callable[[Kind, str, bytes | None, float], Awaitable[Position]],
    change: Change,
    timeout_s: float,
) -> Position:
    """Where ``change`` stands, made by ``put`` on this replica, or by the primary.

    Raises NotPrimary, NoPrimary if within PRIMARY_S nobody takes it, and what ``put`` raises.
    """
    age_s = party.member.age_s()
    if age_s >= timeout_s > 0:
        raise Unavailable("this replica stood still until just now: ask again", 0.5)
    until_s = time.monotonic() + timeout_s - age_s
    patient_s = min(until_s, time.monotonic() + PRIMARY_S)
    while True:
        other, pause_s = primary_of(party), LOOK_S
        try:
            if party.seat.primary is not None or other is None or timeout_s <= 0:
                return await put(*change, max(0.0, until_s - time.monotonic()))
            position = await to(party, other, change, until_s)
            if position is not None:
                return position
            pause_s = PAUSE_S  # it does not know yet
            refused: Unavailable | NotPrimary = NotPrimary(
                other.name, endpoint(other.host, other.http_port)
            )
        except (NotPrimary, NoPrimary) as error:
            refused = error
        now_s = time.monotonic()
        if now_s >= patient_s:
            raise refused
        await party.change(min(patient_s, now_s + pause_s))


async def after_hand_over(
    party: Participant, change: Change, until_s: float, passed: bool = False
) -> Position | None:
    """Asks the new primary, unless another replica does that, which has ``passed`` it on; None if
    this replica still is the one, or has done nothing.

    Raises NoPrimary, Unavailable.
    """
    while party.seat.handing_over:
        if not await party.change(until_s):
            raise NoPrimary("a promotion takes too long: ask again", 0.2)
    if passed:
        return None
    until_s = min(until_s, time.monotonic() + PRIMARY_S)
    while party.seat.primary is None:
        other = primary_of(party)
        if other is not None:
            position = await to(party, other, change, until_s)
            if position is not None:
                return position
        now_s = time.monotonic()
        if now_s >= until_s:
            raise NoPrimary("there is no primary at the moment: ask again", 0.2)
        await party.change(min(until_s, now_s + (LOOK_S if other is None else PAUSE_S)))
    return None


def primary_of(party: Participant) -> ReplicaRecord | None:
    """Another replica that is the primary, as far as is known, and lives."""
    name = party.group.primary or ""
    if name == party.seat.name or name in party.seat.dead:
        return None
    return party.group.replicas.get(name)


async def to(
    party: Participant, other: ReplicaRecord, change: Change, until_s: float
) -> Position | None:
    """Where it stands, as ``other`` says; None if that has done nothing.

    Raises Unavailable if what it has done is not known: soon after it is the primary no longer.
    """
    left_s = until_s - time.monotonic()
    theirs_s, term = party.seat.at_primary(other.name, until_s), party.group.term
    if left_s <= 0 or theirs_s is None:
        return None
    address = endpoint(other.host, other.peer_port)
    asked = asyncio.ensure_future(
        party.peers.put(other.name, address, change, left_s, term, theirs_s)
    )
    try:
        while not asked.done():
            if party.group.primary != other.name:
                await asyncio.wait([asked], timeout=AFTER_S)
                break
            changed = asyncio.ensure_future(party.change(until_s))
            try:
                await asyncio.wait([asked, changed], return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
        if not asked.done():
            raise Unavailable(
                f"{other.name} is the primary no longer, and whether it made the change is not "
                "known: read it",
                0.2,
            )
        return asked.result()
    finally:
        asked.cancel()
