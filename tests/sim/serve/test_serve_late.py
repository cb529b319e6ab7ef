"""Requests to etcd that take effect late, or of which nobody hears: each fence is needed.

Random faults meet these moments too rarely, so they are arranged. Each scene is played with the
rule, when every promise must be kept, and without it, when one must break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from paddle_ft.coordination.kv import Transaction
from paddle_ft.serve import registry
from paddle_ft.serve.registry import InSync
from tests.sim.serve.group import Group
from tests.sim.serve.history import WISH_S
from tests.sim.serve.run import told
from tests.sim.serve.server import KEYS, Server

CUT_S, LATE_S, THAW_S = 5.0, 9.0, 13.0
WITHIN = 40


def roles(group: Group) -> tuple[Server, Server, Server]:
    """The primary, and the two others."""
    servers = list(group.servers.values())
    primary = next(s for s in servers if s.leads)
    first, second = (s for s in servers if s is not primary)
    return primary, first, second


def cut_off(group: Group, server: Server) -> None:
    """``server`` reaches etcd and no other replica."""
    for node in group.servers:
        if node != server.node:
            group.cut.add(frozenset({server.node, node}))


def only(group: Group, server: Server) -> None:
    """The primary dies, the third one is frozen: only ``server`` is left to stand."""
    group.cut.clear()
    for other in list(group.servers.values()):
        if other is server:
            continue
        if other.leads:
            other.process.kill()
            group.clock.after(1.0, group.restart, other)
            group.known_dead(other)
        else:
            other.process.freeze()
            group.clock.after(THAW_S - LATE_S, other.process.wake)


def weakened(txn: Transaction, left_out: str) -> Transaction:
    return replace(txn, compares=tuple(c for c in txn.compares if not c.key.endswith(left_out)))


def late_campaign(group: Group, without: bool) -> None:
    """A campaign takes effect after who sent it has been taken out of the record."""

    def begin() -> None:
        _, late, _ = roles(group)
        seen = replace(late.seat.group, primary=None, term=0)
        txn = registry.campaign(KEYS, seen, late.name, late.lease)
        cut_off(group, late)
        group.clock.after(LATE_S - CUT_S, end, late, weakened(txn, "insync") if without else txn)

    def end(late: Server, txn: Transaction) -> None:
        only(group, late)
        group.network.etcd.transact(txn)

    group.clock.after(CUT_S, begin)


def late_record(group: Group, without: bool) -> None:
    """A record takes effect after the primary has made another one."""

    def begin() -> None:
        primary, late, _ = roles(group)
        assert primary.seat.primary is not None
        names = InSync(primary.seat.primary.term, tuple(primary.seat.primary.recorded))
        assert late.name in names.names
        txn = registry.record(KEYS, names, primary.seat.recorded_revision)
        cut_off(group, late)
        group.clock.after(LATE_S - CUT_S, end, late, weakened(txn, "insync") if without else txn)

    def end(late: Server, txn: Transaction) -> None:
        group.network.etcd.transact(txn)
        only(group, late)

    group.clock.after(CUT_S, begin)


def unknown_record(group: Group, without: bool) -> None:
    """Nobody hears that a record has taken effect, and who came in with it falls behind."""
    if without:
        group.without = "unknown"

    def begin() -> None:
        primary, late, _ = roles(group)
        cut_off(group, late)
        group.clock.after(2.0, let_in, primary, late)

    def let_in(primary: Server, late: Server) -> None:
        group.network.traps["record"] = ("deaf", 0.0)
        group.on_sprung = lambda: group.clock.after(0.02, part, primary, late)
        group.cut.clear()

    def part(primary: Server, late: Server) -> None:
        cut_off(group, late)
        group.network.cut.add(primary.node)
        group.clock.after(1.9, group.network.cut.clear)
        group.clock.after(1.9, only, group, late)

    group.clock.after(CUT_S, begin)


def lease_without_death(group: Group, without: bool) -> None:
    """The lease of a primary ends that the others still answer; it stands still for a moment."""
    if without:
        group.without = "hold"

    def begin() -> None:
        primary, _, _ = roles(group)
        group.network.cut.add(primary.node)
        look(primary)

    def look(primary: Server) -> None:
        if group.network.etcd.get(KEYS.primary) is not None:
            group.clock.after(0.002, look, primary)
            return
        group.clock.after(group.clock.between(0.0, 0.15), primary.process.freeze)
        group.clock.after(0.35, primary.process.wake)
        group.clock.after(0.6, group.network.cut.clear)

    group.clock.after(CUT_S, begin)


def deposed_record(group: Group, without: bool) -> None:
    """A primary that does not know of its successor yet takes it out of the record."""
    if without:
        group.without = "record/primary"

    def begin() -> None:
        primary, successor, _ = roles(group)
        cut_off(group, successor)
        group.network.cut.add(primary.node)
        group.clock.after(0.1, group.network.etcd.revoke, primary.lease)
        group.clock.after(0.2, look, successor)
        group.clock.after(4.0, group.cut.clear)

    def look(successor: Server) -> None:
        kv = group.network.etcd.get(KEYS.primary)
        if kv is None or kv.value.decode() != successor.name:
            group.clock.after(0.01, look, successor)
        else:
            group.network.cut.clear()

    group.clock.after(CUT_S, begin)


def forgotten_wish(group: Group, without: bool) -> None:
    """Whoever is to be made the primary by force stands still until nobody wants that any more."""
    if without:
        group.without = "wish/lease"

    def begin() -> None:
        primary, target, other = roles(group)
        group.ask_for(target.name, force=True)
        target.process.freeze()
        for server in (primary, other):  # so that nobody refuses it
            group.restart(server)
        group.clock.after(WISH_S + 2.0, target.process.wake)

    group.clock.after(3.0, begin)


def silent_member(group: Group, without: bool) -> None:
    """The only one that has everything cannot reach etcd for a while: nobody may begin anew."""
    if without:
        group.without = "outlived"

    def begin() -> None:
        primary, first, second = roles(group)
        for server in (first, second):
            group.restart(server)
        group.network.cut.add(primary.node)
        group.clock.after(5.0, group.network.cut.clear)

    group.clock.after(CUT_S, begin)


def renewed_lease(group: Group, without: bool) -> None:
    """Who was cut off has a new lease before it sees that another one is the primary by now."""
    if without:
        group.without = "lease"

    def begin() -> None:
        primary, _, _ = roles(group)
        cut_off(group, primary)
        group.network.cut.add(primary.node)
        primary.watches = False
        group.clock.after(4.0, group.network.cut.clear)
        group.clock.after(7.0, see, primary)

    def see(primary: Server) -> None:
        primary.watches = True
        group.cut.clear()

    group.clock.after(CUT_S, begin)


def merely_behind(group: Group, without: bool) -> None:
    """Who does not know yet of a forced promotion is asked for a change that was made after it."""
    if without:
        group.without = "anew"

    def begin() -> None:
        primary, target, behind = roles(group)
        cut_off(group, target)
        group.clock.after(2.0, force, primary, target, behind)

    def force(primary: Server, target: Server, behind: Server) -> None:
        group.cut.clear()
        cut_off(group, behind)
        group.network.cut.add(behind.node)
        group.restart(primary)
        group.ask_for(target.name, force=True)
        group.clock.after(5.0, group.network.cut.clear)
        group.clock.after(5.0, group.cut.clear)

    group.clock.after(CUT_S, begin)


@pytest.mark.parametrize(
    ("scene", "likely"),
    [
        (late_campaign, 0),
        (late_record, 0),
        (unknown_record, 1),
        (lease_without_death, 6),
        (deposed_record, 0),
        (forgotten_wish, 0),
        (silent_member, 0),
        (renewed_lease, 2),
        (merely_behind, 0),
    ],
)
def test_a_late_request_needs_its_fence(scene: Callable[[Group, bool], None], likely: int) -> None:
    for seed in (likely, *range(WITHIN)):
        group = Group(seed, faults=False)
        scene(group, False)
        assert not (why := told(group)), f"seed {seed}: {why}"
        group = Group(seed, faults=False)
        scene(group, True)
        if told(group):
            return
    raise AssertionError("nothing has shown that the fence is needed")
