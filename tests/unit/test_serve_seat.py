"""One replica's next step where the simulator does not go: force, images, wishes that cannot be."""

from __future__ import annotations

from dataclasses import replace

from paddle_ft.coordination.kv import Put, Transaction
from paddle_ft.serve.broadcast import FRESH_S, HOLD_S, Append, Install, Primary, Replica
from paddle_ft.serve.log import Entry, Position, size_of
from paddle_ft.serve.registry import Group, InSync, Keys, Promote, ReplicaRecord
from paddle_ft.serve.seat import HAND_OVER_S, Deed, Seat

KEYS = Keys("g")


def group(**fields: object) -> Group:
    replicas = {n: ReplicaRecord(n, "h", 1, 2, 3, condition="ready") for n in ("a.1", "b.1")}
    base = Group(
        replicas=replicas,
        leases=dict.fromkeys(replicas, 7),
        in_sync=InSync(0, ("a.1", "b.1")),
        in_sync_revision=3,
        revision=10,
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def primary_seat() -> Seat:
    seat = Seat("a.1", KEYS)
    seat.saw(group(primary="a.1", term=5), 0.0)
    assert seat.primary is not None
    return seat


def catch_up(seat: Seat, other: Replica, now_s: float) -> None:
    """What the stream does, until nothing is left to say."""
    assert seat.primary is not None
    for _ in range(10):
        message = seat.primary.message(other.name, now_s)
        seat.answered(other.hear(message), now_s)


def written(txn: Transaction) -> set[str]:
    return {o.key for o in txn.operations if isinstance(o, Put)}


def kind(deed: Deed | None) -> str:
    return deed.kind if deed is not None else ""


def test_a_promotion_waits_until_its_target_has_everything() -> None:
    seat, other = primary_seat(), Replica("b.1")
    catch_up(seat, other, 0.0)
    seat.put("state", "k", b"v")
    wish = {"promote": Promote("b.1"), "promote_revision": 11, "revision": 11}
    seat.saw(group(primary="a.1", term=5, **wish), 0.1)
    assert seat.due(0.1, 7) is None
    assert seat.handing_over  # changes wait
    catch_up(seat, other, 0.15)
    deed = seat.due(0.16, 7)
    assert deed is not None and deed.kind == "hand_over"
    assert deed.transaction.operations[0] == Put(KEYS.primary, b"b.1", 7)

    seat.saw(group(primary="b.1", term=12, revision=12), 0.2)
    assert seat.primary is None and not seat.handing_over


def test_a_promotion_is_called_off_in_time() -> None:
    seat = primary_seat()
    seat.put("state", "k", b"v")
    wish = {"promote": Promote("b.1"), "promote_revision": 11, "revision": 11}
    seen = group(primary="a.1", term=5, **wish)
    seat.saw(seen, 0.1)
    assert seat.due(0.1, 7) is None
    deed = seat.due(0.2 + HAND_OVER_S, 7)
    assert kind(deed) == "refuse"
    assert not seat.handing_over
    assert kind(seat.due(0.3 + HAND_OVER_S, 7)) == "refuse"  # until it is seen to be refused
    assert not seat.handing_over

    seat = primary_seat()
    seat.saw(replace(seen, promote=Promote("c.1")), 0.1)
    assert kind(seat.due(0.1, 7)) == "refuse"


def test_a_hand_over_that_may_have_happened_keeps_changes_waiting() -> None:
    seat, other = primary_seat(), Replica("b.1")
    catch_up(seat, other, 0.0)
    wish = {"promote": Promote("b.1"), "promote_revision": 11, "revision": 11}
    seat.saw(group(primary="a.1", term=5, **wish), 0.1)
    deed = seat.due(0.1, 7)
    assert deed is not None and deed.kind == "hand_over"
    seat.ended(deed, None, 0)
    assert kind(seat.due(0.2 + HAND_OVER_S, 7)) == "refuse"
    assert seat.handing_over
    refused = {"promote": Promote("b.1", refused="no"), "promote_revision": 12, "revision": 12}
    seat.saw(group(primary="a.1", term=5, **refused), 1.0)
    seat.due(1.0, 7)
    assert not seat.handing_over


def test_force_takes_the_key_from_whoever_has_it() -> None:
    seat = Seat("b.1", KEYS)
    wish = {"promote": Promote("b.1", force=True), "promote_revision": 11}
    seat.saw(group(primary="a.1", term=5, **wish), 0.0)
    assert seat.due(0.0, 0) is None  # without a lease of its own
    deed = seat.due(0.0, 7)
    assert deed is not None and deed.kind == "force"
    assert written(deed.transaction) == {KEYS.primary}  # it is in sync: nobody goes out

    seat.saw(group(primary="a.1", term=5, in_sync=InSync(5, ("a.1",)), **wish), 0.0)
    deed = seat.due(0.0, 7)
    assert deed is not None and written(deed.transaction) == {KEYS.primary, KEYS.in_sync, KEYS.lost}


def test_a_living_primary_does_not_refuse_force() -> None:
    """Its target is loading, and not in sync: a planned promotion would be refused."""
    seat = primary_seat()
    seen = group(primary="a.1", term=5, in_sync=InSync(5, ("a.1",)), promote_revision=11)
    loading = replace(seen.replicas["b.1"], condition="loading")
    seen = replace(seen, replicas={**seen.replicas, "b.1": loading})
    seat.saw(replace(seen, promote=Promote("b.1", force=True), revision=11), 0.1)
    deed = seat.due(0.1, 7)
    assert kind(deed) != "refuse" and not seat.handing_over
    seat.saw(replace(seen, promote=Promote("c.1", force=True), revision=12), 0.2)
    assert kind(seat.due(0.2, 7)) == "refuse"  # nobody is there to do it


def test_who_is_back_is_not_dead() -> None:
    seat = primary_seat()
    seat.saw(group(primary="a.1", term=5, since={"b.1": 4}, revision=11), 0.1)
    seat.died("b.1")
    seat.saw(group(primary="a.1", term=5, since={"b.1": 4}, revision=12), 0.2)
    assert seat.dead == {"b.1"}
    seat.saw(group(primary="a.1", term=5, since={"b.1": 13}, revision=13), 0.3)
    assert not seat.dead


def test_a_group_begins_anew_only_when_all_have_ended() -> None:
    def record(name: str, *outlived: str) -> ReplicaRecord:
        return ReplicaRecord(name, "h", 1, 2, 3, condition="ready", outlived=outlived)

    in_sync = InSync(9, ("a.x-1", "b.x-1"))
    here = Seat("a.x-2", KEYS)
    seen = group(in_sync=in_sync, in_sync_revision=20, revision=30)
    seen = replace(seen, replicas={"a.x-2": record("a.x-2", "a.x-1")})
    here.saw(seen, 0.0)
    assert here.outlived == ("a.x-1",)
    assert here.due(9.0, 7) is None  # b.x-1 may live
    other = record("b.y-2")  # the same name of a node, on another machine
    here.saw(replace(seen, replicas={**seen.replicas, "b.y-2": other}, revision=31), 9.0)
    assert here.due(19.0, 7) is None
    back = record("b.x-2", "b.x-1")
    here.saw(replace(seen, replicas={**seen.replicas, "b.x-2": back}, revision=32), 19.0)
    deed = here.due(29.0, 7, unix_s=1e9)
    assert deed is not None and deed.kind == "begin" and deed.in_sync == set(in_sync.names)
    assert written(deed.transaction) == {KEYS.primary, KEYS.in_sync, KEYS.lost}


def test_who_still_hears_from_the_primary_does_not_stand() -> None:
    seat = Seat("b.1", KEYS)
    seat.saw(group(primary="a.1", term=5), 0.0)
    seat.hear(Append(5, "a.1", Position(), (), 0, 1.0), 1.0)
    seat.saw(group(revision=11), 1.1)
    assert seat.due(1.0 + HOLD_S, 7) is None
    assert kind(seat.due(1.3 + HOLD_S, 7)) == "campaign"
    seat.died("a.1")
    assert kind(seat.due(1.3, 7)) == "campaign"  # known to be dead


def test_who_stands_promises_nothing() -> None:
    seat = Seat("b.1", KEYS)
    seat.saw(group(), 0.0)
    append = Append(5, "a.1", Position(), (), 0, 1.0)
    deed = seat.due(1.0, 7)
    assert deed is not None and deed.kind == "campaign"
    seat.ended(deed, None, 0)  # it may be the primary in a moment
    answer = seat.hear(append, 1.1)
    assert answer.agrees and answer.sent_s != append.sent_s
    seat.saw(group(primary="a.1", term=12, in_sync_revision=13, revision=13), 1.2)
    assert seat.hear(append, 1.3).sent_s == append.sent_s


def test_a_primary_without_a_lease_goes_by_the_answers_of_all() -> None:
    seat, other = primary_seat(), Replica("b.1")
    assert seat.leads(0.0, deadline_s=1.0)
    assert not seat.leads(0.0, deadline_s=-1.0)
    catch_up(seat, other, 10.0)
    assert seat.leads(10.1, deadline_s=-1.0)
    assert not seat.leads(10.1 + FRESH_S, deadline_s=-1.0)
    alone = Seat("a.1", KEYS)
    alone.saw(group(primary="a.1", term=5, in_sync=InSync(0, ("a.1",))), 0.0)
    assert not alone.leads(0.0, deadline_s=-1.0)


def follower(count: int, kept: int = 1000) -> Replica:
    """Has ``count`` acknowledged entries of term 1."""
    replica = Replica("b.1", kept=kept)
    entries = tuple(Entry(Position(1, n), "state", f"k{n}", b"v") for n in range(1, count + 1))
    replica.hear(Append(1, "a.1", Position(), entries, count))
    assert len(replica.state.items) == count
    return replica


def test_what_a_forced_primary_lacks_is_noticed() -> None:
    """Wherever it shows: in the log, at its base, below it, in an image."""
    entry = Entry(Position(9, 5), "state", "x", b"")
    for replica in (follower(8), follower(8, kept=0)):
        assert replica.hear(Append(9, "c.1", Position(1, 4), (), 4)).agrees  # nothing shows yet
        assert not replica.hear(Append(9, "c.1", Position(1, 4), (entry,), 5)).agrees
        assert replica.undone
    for before in (Position(9, 8), Position(9, 3)):
        replica = follower(8, kept=0)
        replica.hear(Append(9, "c.1", before, (), 5))
        assert replica.undone
    replica, forced = follower(8), follower(3)
    forced.term = 8
    forced.log.append(9, "state", "y", b"")
    forced.apply(4)
    replica.hear(Install(9, "c.1", forced.state.image()))
    assert replica.undone


def test_what_has_changed_is_told_also_where_an_image_came() -> None:
    replica, primary = follower(2), follower(6, kept=0)
    primary.log.append(1, "state", "k1", None)
    primary.apply(7)
    replica.fresh()
    answer = replica.hear(Install(2, "c.1", primary.state.image()))
    assert answer.agrees and answer.sequence == 7
    changed = {entry.key: entry.value for entry in replica.fresh()}
    assert changed == {"k1": None, "k3": b"v", "k4": b"v", "k5": b"v", "k6": b"v"}


def test_a_late_message_from_below_the_base_acknowledges_nothing() -> None:
    """It acknowledges less than the state holds; seed 3062 of the simulator."""
    replica = follower(20, kept=2)
    assert replica.log.base.sequence == 18
    entries = tuple(Entry(Position(1, n), "state", "new", b"") for n in (21, 22, 23))
    replica.hear(Append(1, "a.1", Position(1, 20), entries, 20))
    late = Entry(Position(1, 17), "state", "k17", b"v")
    replica.hear(Append(1, "a.1", Position(1, 16), (late,), 17))
    assert replica.state.at.sequence == 20


def test_messages_are_bounded_and_a_log_is_kept_short() -> None:
    replica = Replica("a.1", kept=10)
    primary = Primary(replica, 3, ["a.1"], 1, 0.0)
    for _ in range(60):
        primary.put("state", "k", b"x" * 2**16)
        primary.advance()
    assert len(replica.log.entries) <= 21
    sent = primary.message("b.1", 0.0)
    assert isinstance(sent, Append) and not sent.entries
    primary.hear(Replica("b.1").hear(sent), 0.0)
    assert isinstance(primary.message("b.1", 0.0), Install)
    at = replica.log.base.sequence
    entries = replica.log.after(at, 256, 2**17)
    assert entries is not None and len(entries) == 1
    assert replica.state.size_bytes == size_of("k", b"x" * 2**16)
