"""Messages between replicas: what is encoded comes back, and no other bytes do harm."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.serve import frames
from paddle_ft.serve.broadcast import Answer, Append, Install
from paddle_ft.serve.frames import Joiner, Message
from paddle_ft.serve.log import Entry, Held, Image, Kind, Position, joined

NUMBERS = st.integers(0, 2**63)
TIMES = st.floats(allow_nan=False)
POSITIONS = st.builds(Position, NUMBERS, NUMBERS)
KINDS = st.sampled_from([kind for kind in frames.KINDS if kind != "states"])
TEXTS = st.text(max_size=20)
VALUES = st.binary(max_size=50)


@st.composite
def appends(draw: st.DrawFn) -> Append:
    before = draw(POSITIONS)
    entries = tuple(
        Entry(
            Position(draw(NUMBERS), before.sequence + number),
            draw(KINDS),
            draw(TEXTS),
            draw(st.none() | VALUES),
        )
        for number in range(1, draw(st.integers(0, 4)) + 1)
    )
    return Append(draw(NUMBERS), draw(TEXTS), before, entries, draw(NUMBERS), draw(TIMES))


IMAGES = st.builds(
    Image,
    POSITIONS,
    st.dictionaries(st.tuples(KINDS, TEXTS), st.builds(Held, VALUES, NUMBERS), max_size=4),
    st.lists(POSITIONS, max_size=3).map(lambda p: tuple(sorted(p, key=lambda f: f.sequence))),
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    appends(),
    st.builds(Install, NUMBERS, TEXTS, IMAGES, TIMES),
    st.builds(Answer, NUMBERS, TEXTS, st.booleans(), NUMBERS, TIMES),
)


@given(st.lists(MESSAGES, min_size=1, max_size=3))
def test_messages_come_back(messages: list[Message]) -> None:
    joiner = Joiner()
    taken = [joiner.take(frame) for message in messages for frame in frames.frames(message)]
    assert [message for message in taken if message is not None] == messages


@given(MESSAGES, st.data())
def test_other_bytes_are_refused(message: Message, data: st.DataObject) -> None:
    parts = list(frames.frames(message))
    changed = data.draw(st.integers(0, len(parts) - 1))

    def take(part: bytes) -> None:
        joiner = Joiner()
        for whole in parts[:changed]:
            joiner.take(whole)
        with pytest.raises(ValueError):
            joiner.take(part)

    if not changed:  # a slice that ends after one of its items is one
        take(parts[0][: data.draw(st.integers(0, len(parts[0]) - 1))])
    take(parts[changed] + b"\0")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    joiner = Joiner()
    for read in (frames.decode, frames.decode_put, frames.decode_position, joiner.take):
        try:
            read(data)
        except ValueError:
            pass


@given(KINDS, TEXTS, st.none() | VALUES)
def test_a_change_comes_back(kind: Kind, key: str, value: bytes | None) -> None:
    data = frames.encode_put(kind, key, value, 7, 0.25)
    assert frames.decode_put(data) == (kind, key, value, 7, 0.25)


@given(TEXTS, st.dictionaries(TEXTS, VALUES))
def test_joint_changes_come_back(session: str, changes: dict[str, bytes]) -> None:
    entry = Entry(Position(3, 4), "states", session, joined(changes))
    parts = [Entry(Position(3, 4), "state", key, value) for key, value in changes.items()]
    assert entry.parts() == parts


@given(VALUES.filter(len))
def test_bytes_that_are_no_joint_changes_are_refused(data: bytes) -> None:
    with suppress(ValueError):
        assert Entry(Position(), "states", "s", data).parts()
    with pytest.raises(ValueError, match="too early"):
        Entry(Position(), "states", "s", joined({"k": data})[:-1]).parts()


def test_a_large_image_comes_in_slices_made_one_by_one_and_not_without_end() -> None:
    items = {("state", f"k{n}"): Held(b"x" * 2**19, n) for n in range(5)}
    message = Install(3, "a.1", Image(Position(2, 9), items), 1.5)  # type: ignore[arg-type]
    parts = list(frames.frames(message))
    assert len(parts) == 6
    assert all(len(part) < frames.SLICE_BYTES + 2**19 + 100 for part in parts)
    joiner = Joiner()
    assert [joiner.take(part) for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert joiner.take(parts[-1]) == message

    small = Joiner(bytes_max=2**20)
    small.take(parts[0])
    small.take(parts[1])
    with pytest.raises(ValueError):
        small.take(parts[2])
    cut_short = Joiner()
    cut_short.take(parts[0])
    with pytest.raises(ValueError):
        cut_short.take(frames.encode(Answer(1, "b", True, 2)))
    too_many = Joiner()
    too_many.take(parts[0])
    too_many.take(parts[1])
    with pytest.raises(ValueError):
        too_many.take(parts[1] + frames.encode(Answer(1, "b", True, 2)))
