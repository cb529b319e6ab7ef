"""Promotions as a replica sees them: one that somebody asks for, and the one before it leaves."""

from __future__ import annotations

import logging
import time

from paddle_ft.errors import PaddleFTError
from paddle_ft.serve import elect, registry
from paddle_ft.serve.participant import Participant
from paddle_ft.serve.registry import Promote
from paddle_ft.serve.types import NotPromoted, ServeError, Unavailable
from paddle_ft.serve.wish import Wish

log = logging.getLogger("paddle_ft")

TRY_S = 1.0
"""For one that can be the primary next, before another is asked."""
LOOK_S = 0.1


async def promote(party: Participant, target: str, force: bool, timeout_s: float) -> str:
    """Makes ``target`` (a replica, or its node) the primary; gives its name.

    Raises NotPromoted; Unavailable if it has not come about in time, and will not.
    """
    until_s = time.monotonic() + timeout_s
    name = registry.named(party.group, target)
    if name is None:
        there = ", ".join(party.group.replicas)
        raise NotPromoted(f"there is no replica {target}: there are {there}")
    if party.group.primary == name:
        return name
    member = party.member
    wish = Wish(member.coordinator, member.keys, Promote(name, force))
    try:
        try:
            await party.in_thread(wish.make, timeout_s)
        except PaddleFTError as error:
            raise Unavailable(f"etcd does not know that {name} is wanted: {error}", 1.0) from None
        while party.group.primary != name:
            if why := wish.refused(party.group):
                raise NotPromoted(why)
            if not await party.change(until_s):
                raise Unavailable(f"{name} was not promoted within {timeout_s:g} s", 1.0)
    finally:
        await party.in_thread(wish.take_back)
    return name


async def hand_over(party: Participant, timeout_s: float) -> bool:
    """Makes another replica the primary, whoever is best, the next one if that cannot be.

    One that is about to be in sync is waited for. False if this one is the primary still.
    """
    until_s = time.monotonic() + timeout_s
    refused: set[str] = set()
    while party.seat.primary is not None:
        left_s = until_s - time.monotonic()
        others = party.group.replicas.keys() - {party.seat.name} - party.seat.dead
        if left_s <= 0 or not others:
            return False
        name = elect.next_primary(party.group, refused | party.seat.dead)
        if name is None:
            refused.clear()
            await party.change(min(until_s, time.monotonic() + LOOK_S))
            continue
        try:
            await promote(party, name, False, min(left_s, TRY_S))
            # Its own steps follow as soon as it sees what etcd has.
            while party.seat.primary is not None and await party.change(until_s):
                pass
        except ServeError as error:
            log.info("another replica is asked to take over: %s", error)
            refused.add(name)
    return True


async def give_up(party: Participant, timeout_s: float) -> None:
    """The last one that has the state leaves: those that are there, or come, begin anew.

    Who has just fallen silent is in sync for another moment.
    """
    seat, member, until_s = party.seat, party.member, time.monotonic() + timeout_s
    while seat.primary is not None and seat.primary.recorded != {seat.name}:
        if time.monotonic() > until_s:
            return
        await party.change(time.monotonic() + LOOK_S)
    group = party.group
    if seat.primary is None:
        return
    txn = registry.forget(member.keys, group, seat.recorded_revision)
    if group.replicas.keys() - {seat.name} and seat.replica.state.items:
        log.warning("no other replica has got the state of the group: it ends with this one")
    await party.in_thread(member.transact, txn)
