"""Messages between replicas: what is encoded comes back, and no other bytes do harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.serve import frames
from paddle_ft.serve.broadcast import Answer, Append, Install
from paddle_ft.serve.frames import Joiner, Message
from paddle_ft.serve.log import Entry, Held, Image, Position

NUMBERS = st.integers(0, 2**63)
TIMES = st.floats(allow_nan=False)
POSITIONS = st.builds(Position, NUMBERS, NUMBERS)
KINDS = st.sampled_from(frames.KINDS)
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
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    appends(),
    st.builds(Install, NUMBERS, TEXTS, IMAGES, TIMES),
    st.builds(Answer, NUMBERS, TEXTS, st.booleans(), NUMBERS, TIMES),
)


@given(MESSAGES)
def test_a_message_comes_back(message: Message) -> None:
    assert frames.decode(frames.encode(message)) == message


@given(MESSAGES, st.data())
def test_other_bytes_are_refused(message: Message, data: st.DataObject) -> None:
    whole = frames.encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError):
        frames.decode(whole[:cut])
    with pytest.raises(ValueError):
        frames.decode(whole + b"\0")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    joiner = Joiner()
    for read in (frames.decode, frames.decode_put, frames.decode_position, joiner.take):
        try:
            read(data)
        except ValueError:
            pass


@given(KINDS, TEXTS, st.none() | VALUES)
def test_a_change_comes_back(kind: frames.Kind, key: str, value: bytes | None) -> None:
    assert frames.decode_put(frames.encode_put(kind, key, value)) == (kind, key, value)


def test_a_large_message_comes_in_parts_and_not_without_end() -> None:
    items = {("state", f"k{n}"): Held(b"x" * 2**19, n) for n in range(5)}
    message = Install(3, "a.1", Image(Position(2, 9), items), 1.5)  # type: ignore[arg-type]
    parts = list(frames.frames(message))
    assert len(parts) > 2
    assert all(len(part) <= frames.FRAME_BYTES_MAX + 1 for part in parts)
    joiner = Joiner()
    assert [joiner.take(part) for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert joiner.take(parts[-1]) == message

    small = Joiner(bytes_max=2**20)
    small.take(parts[0])
    with pytest.raises(ValueError):
        small.take(parts[1])
    cut_short = Joiner()
    cut_short.take(parts[0])
    with pytest.raises(ValueError):
        cut_short.take(frames.encode(Answer(1, "b", True, 2)))
