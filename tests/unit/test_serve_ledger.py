"""Sessions of a group: room, age, and names."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paddle_ft.config import EtcdConfig
from paddle_ft.serve import replicated
from paddle_ft.serve.broadcast import Append, Install, Primary
from paddle_ft.serve.http_paths import find
from paddle_ft.serve.ledger import Bounds, Ledger, name_of, session_of
from paddle_ft.serve.log import Entry, Log, Position, State, size_of
from paddle_ft.serve.participant import GroupSettings
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import Full, TooLarge

VALUE = b"x" * 1000
SIZE = size_of(name_of("a", "0"), VALUE)


class Group:
    """A state and its ledger, to which things are written one by one."""

    def __init__(self, **bounds: float) -> None:
        self.log, self.state = Log(), State()
        self.ledger = Ledger(Bounds(**bounds))  # type: ignore[arg-type]

    def put(self, name: str, value: bytes | None, now_s: float = 0.0) -> None:
        self.ledger.check(self.state, "state", name, value)
        self.log.append(1, "state", name, value)
        for entry in self.state.apply(self.log, self.log.last.sequence):
            self.ledger.took(entry, now_s)


def test_a_session_and_the_whole_have_bounds_and_what_grows_nothing_is_taken() -> None:
    group = Group(session_bytes=2 * SIZE, state_bytes=3 * SIZE)
    a0, a1, a2, b0, b1 = (name_of(*s) for s in ("a0", "a1", "a2", "b0", "b1"))
    group.put(a0, VALUE)
    group.put(a1, VALUE)
    with pytest.raises(TooLarge, match="session_bytes_max") as caught:
        group.put(a2, b"")
    assert caught.value.status == 413
    group.put(a0, VALUE)  # as large as before
    group.put(b0, VALUE)
    with pytest.raises(Full, match="session_ttl_s") as full:
        group.put(b1, b"")
    assert full.value.status == 507
    with pytest.raises(TooLarge):
        group.put(a0, VALUE + b"x")
    group.put(a0, VALUE[:-1])
    group.put(a0, None)
    group.put(b1, VALUE)
    with pytest.raises(TooLarge, match="a value"):
        group.put(a0, b"x" * (2**21 + 1))
    with pytest.raises(TooLarge, match="a key"):
        group.put(name_of("a", "k" * 511), b"")


def test_a_session_is_as_old_as_its_last_change() -> None:
    group = Group(session_ttl_s=10.0)
    for number, name in enumerate((name_of("a", "0"), name_of("a", "1"), name_of("b", "0"))):
        group.put(name, VALUE, float(number))
    assert group.ledger.due(11.0, 9) == []
    group.put(name_of("a", "0"), VALUE, 11.5)  # and all of it is young again
    assert group.ledger.due(12.5, 9) == [name_of("b", "0")]
    assert group.ledger.due(12.6, 9) == []  # on its way
    assert set(group.ledger.due(22.0, 1)) == {name_of("a", "0"), name_of("a", "1")}
    assert group.ledger.due(23.0, 9) == [name_of("b", "0")]  # nobody has deleted it
    group.put(name_of("b", "0"), None, 24.0)
    group.ledger.wrote(name_of("a", "0"), 30.0)  # a change that is not acknowledged yet
    assert group.ledger.due(35.0, 9) == []
    assert Group(session_ttl_s=0).ledger.due(1e9, 9) == []


def test_an_image_is_taken_like_changes() -> None:
    group, newcomer = Group(), Group(session_bytes=SIZE)
    group.put(name_of("a", "0"), VALUE)
    for entry in newcomer.state.changes(group.state.image()):
        newcomer.ledger.took(entry, 5.0)
    newcomer.state = State.of(group.state.image())
    with pytest.raises(TooLarge):
        newcomer.put(name_of("a", "1"), b"")
    newcomer.ledger.took(Entry(Position(), "state", name_of("a", "0"), None), 6.0)
    assert newcomer.ledger.size_bytes(name_of("a", "0")) == 0


def test_a_large_image_is_told_of_in_pieces_and_whole_to_a_primary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = 2_000
    monkeypatch.setattr(replicated, "PIECE_S", 0.0)

    async def work() -> None:
        group = Replicated(GroupSettings(EtcdConfig(endpoints=("127.0.0.1:1",)), "g", "n0"))
        settings: list[str] = []
        group.on_applied(lambda entry: settings.append(entry.key))
        replica, other = group._seat.replica, Log()
        for number in range(many):
            other.append(1, "state", name_of("s", str(number)), VALUE)
        other.append(1, "setting", "x", VALUE)
        state = State()
        state.apply(other, many)
        size_bytes = state.size_bytes
        state.apply(other, many + 1)
        replica.hear(Install(1, "a.1", state.image()))
        group.applied(replica.fresh())
        assert 0 < group._ledger.size_bytes(name_of("s", "x")) < 100 * SIZE
        assert not settings and not group.told
        later = Entry(Position(1, many + 2), "setting", "y", VALUE)
        replica.hear(Append(1, "a.1", Position(1, many + 1), (later,), many + 2))
        group.applied(replica.fresh())
        before = group._ledger.size_bytes(name_of("s", "x"))
        await asyncio.sleep(0)
        assert before < group._ledger.size_bytes(name_of("s", "x")) and not settings
        group.role_changed()
        assert group.told and settings == ["x", "y"]
        assert group._ledger.size_bytes(name_of("s", "x")) == size_bytes
        await asyncio.sleep(0)  # what was put off finds nothing to do

    asyncio.run(work())


def test_a_new_primary_deletes_nothing_that_its_predecessor_has_just_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The change may have been acknowledged, though that is not known here yet."""
    now_s = 0.0
    monkeypatch.setattr(replicated, "time", SimpleNamespace(monotonic=lambda: now_s))
    etcd, bounds = EtcdConfig(endpoints=("127.0.0.1:1",)), Bounds(session_ttl_s=10.0)
    group = Replicated(GroupSettings(etcd, "g", "n0", bounds=bounds))
    replica, names = group._seat.replica, [name_of("s", "k"), name_of("t", "k")]

    def hear(number: int, name: str, acknowledged: int) -> None:
        entry = Entry(Position(1, number), "state", name, b"%d" % number)
        before = Position(1, number - 1) if number > 1 else Position()
        replica.hear(Append(1, "a.1", before, (entry,), acknowledged))
        group.applied(replica.fresh())

    hear(1, names[0], 1)
    hear(2, names[1], 2)
    now_s = 11.0
    hear(3, names[0], 2)
    assert replica.state.at == Position(1, 2)
    group._seat.primary = Primary(replica, 2, [group.name], 1, now_s)
    group.role_changed()
    assert group._ledger.due(now_s, 9) == [names[1]]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("kl"), st.none() | st.binary())))
def test_the_ledger_agrees_with_the_state(changes: list[tuple[str, str, bytes | None]]) -> None:
    group = Group()
    for session, key, value in changes:
        group.put(name_of(session, key), value)
    for session in "ab":
        held = group.state.items.items()
        sizes = [size_of(n, h.value) for (_, n), h in held if session_of(n) == session]
        assert group.ledger.size_bytes(name_of(session, "k")) == sum(sizes)
    left = {name for _, name in group.state.items}
    assert set(group.ledger.due(1e9, 99)) == left


SESSIONS = st.text("ab/%.", min_size=1, max_size=3)
NAMES = st.text("ab/%.é ", min_size=1, max_size=3)


@given(SESSIONS, NAMES, SESSIONS, NAMES)
def test_names_are_told_apart_also_in_paths(a: str, b: str, c: str, d: str) -> None:
    assume(not {a, b, c, d} & {".", ".."})
    one, other = name_of(a, b), name_of(c, d)
    assert (one == other) == ((a, b) == (c, d))
    assert session_of(one) == a
    route, names = find("PUT", f"/v2/state/{quote(a, safe='')}/{quote(b, safe='')}")
    assert route.operation == "state_put"
    assert (names["session"], names["key"]) == (a, b)


@given(st.text(st.characters(max_codepoint=0x17F)), st.text())
def test_any_text_is_a_name_or_refused(session: str, key: str) -> None:
    with suppress(BadRequest):
        assert session_of(name_of(session, key)) == session
    with suppress(BadRequest):
        find("GET", f"/v2/state/{session}/{key}")


@pytest.mark.parametrize(
    ("session", "key"),
    [
        ("", "k"),
        ("s", ""),
        ("s s", "k"),
        ("s\0", "k"),
        ("s", "k\0"),
        ("\xe9", "k"),
        ("s", "\ud800"),
        ("s", ".."),
    ],
)
def test_what_is_no_name_is_refused(session: str, key: str) -> None:
    with pytest.raises(BadRequest):
        name_of(session, key)
