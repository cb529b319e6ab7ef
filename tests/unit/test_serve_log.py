"""The log of a group and its state: bounds in bytes, and which changes are lost."""

from __future__ import annotations

import asyncio

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.serve.broadcast import Append, Install, Primary, Replica
from paddle_ft.serve.log import Entry, Log, Position, State, size_of
from paddle_ft.serve.participant import GroupSettings
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.types import NoPrimary, Unavailable

VALUE = b"x" * 1000


def entries(term: int, first: int, last: int) -> tuple[Entry, ...]:
    return tuple(Entry(Position(term, n), "state", f"k{n}", VALUE) for n in range(first, last + 1))


def measured(log: Log) -> int:
    return sum(entry.size_bytes for entry in log.entries)


def test_what_a_log_holds_is_counted_whatever_becomes_of_it() -> None:
    replica = Replica("b.1")
    replica.hear(Append(1, "a.1", Position(), entries(1, 1, 9), 4))
    assert replica.log.size_bytes == measured(replica.log) == 9 * size_of("k1", VALUE)
    assert replica.pending_bytes == 5 * size_of("k1", VALUE)
    short = (Entry(Position(2, 6), "state", "k", None),)  # another primary, which lacks 6 to 9
    replica.hear(Append(2, "c.1", Position(1, 5), short, 5))
    assert replica.log.last == Position(2, 6)
    assert replica.log.size_bytes == measured(replica.log)
    assert replica.pending_bytes == short[0].size_bytes
    assert replica.log.forget(3) == 3 * size_of("k1", VALUE)
    assert replica.log.size_bytes == measured(replica.log)
    newer = Replica("c.1")
    newer.hear(Append(3, "a.1", Position(), entries(3, 1, 9), 9))
    fresh = Replica("d.1")
    fresh.hear(Append(2, "a.1", Position(), entries(2, 1, 3), 0))
    fresh.hear(Install(3, "c.1", newer.state.image()))
    assert (fresh.log.size_bytes, fresh.pending_bytes) == (0, 0)


def test_what_is_kept_is_bounded_in_bytes_and_what_is_pending_stays() -> None:
    replica = Replica("a.1", kept_bytes=5 * size_of("k10", VALUE))
    primary = Primary(replica, 3, ["a.1"], 1, 0.0)
    for number in range(10, 60):
        primary.put("state", f"k{number}", VALUE)
        primary.advance()
        assert replica.log.size_bytes <= 2 * replica.kept_bytes
    assert len(replica.log.entries) >= 5
    primary.recorded = frozenset(("a.1", "b.1"))  # who does not answer
    for number in range(10, 60):
        primary.put("state", f"k{number}", VALUE)
        primary.advance()
    assert replica.pending_bytes == 50 * size_of("k10", VALUE)
    assert primary.log.holds(Position(3, 51))


def test_a_position_is_lost_if_another_entry_is_in_its_place_or_can_only_come_there() -> None:
    log = Log()
    log.entries += [*entries(2, 1, 4), *entries(5, 5, 7)]
    state = State()
    state.apply(log, 7)
    log.forget(7)

    def told(*positions: tuple[int, int], of: State = state) -> set[str]:
        return {of.answers(Position(*position)) for position in positions}

    assert told((0, 0), (2, 1), (2, 4), (5, 5), (5, 7)) == {"yes"}
    assert told((1, 2), (2, 5), (5, 4), (2, 9)) == {"lost"}
    assert told((5, 9), (6, 8)) == {"wait"}  # not there yet
    assert told((6, 3), (6, 7)) == {"wait"}  # a forced primary's, whom this replica is to follow
    again = State.of(state.image())
    assert told((2, 5), of=again) == {"lost"} and told((2, 4), of=again) == {"yes"}
    assert again.size_bytes == state.size_bytes


def test_a_new_primary_answers_reads_once_it_knows_what_was_acknowledged() -> None:
    """Its predecessor had acknowledged the third change, and said so to nobody here."""

    async def work() -> None:
        group = Replicated(GroupSettings(EtcdConfig(endpoints=("127.0.0.1:1",)), "g", "n0"))
        seat, other = group._seat, Replica("b.1")
        seat.hear(Append(1, "a.1", Position(), entries(1, 1, 3), 2), 0.0)
        assert await group.get("state", "k3") is None  # a replica: what it has
        seat.primary = Primary(seat.replica, 2, [seat.name, "b.1"], 2, 0.0)
        group.role_changed()
        with pytest.raises(Unavailable, match="has not got to 3"):
            await group.get("state", "k2", timeout_s=0.01)
        reading = asyncio.ensure_future(group.get("state", "k3", timeout_s=20.0))
        await asyncio.sleep(0)
        while not reading.done():
            seat.primary.hear(other.hear(seat.primary.message("b.1", 0.0)), 0.0)
            group.applied(iter(()))
            await asyncio.sleep(0)
        held = reading.result()
        assert held is not None and held.value == VALUE

    asyncio.run(work())


def test_a_change_that_was_passed_on_is_made_in_its_term_and_time_or_not_at_all() -> None:
    async def work() -> None:
        group = Replicated(GroupSettings(EtcdConfig(endpoints=("127.0.0.1:1",)), "g", "n0"))
        seat = group._seat
        seat.primary = Primary(seat.replica, 7, [seat.name], 1, 0.0)
        group._party.leads = lambda: True  # type: ignore[method-assign]
        with pytest.raises(NoPrimary, match="another one"):
            await group.put("state", "k", b"v", term=6)
        with pytest.raises(Unavailable, match="time of this change"):
            await group.put("state", "k", b"v", timeout_s=0.0, term=7)
        assert seat.replica.log.last == Position()
        assert await group.put("state", "k", b"v", term=7) == Position(7, 1)

    asyncio.run(work())
