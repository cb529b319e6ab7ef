"""What a front and its workers tell each other: nothing is lost, and what is damaged is refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.serve import messages

sizes = st.integers(0, 2**40)
tensors = st.lists(
    st.tuples(
        st.text(max_size=8),
        st.sampled_from(["float32", "bytes"]),
        st.lists(sizes, max_size=4).map(tuple),
        sizes,
        sizes,
    ),
    max_size=4,
).map(tuple)
sent = st.one_of(
    st.fixed_dictionaries(
        {"run": sizes, "tensors": tensors, "nbytes": sizes, "session": st.booleans()}
    ),
    st.fixed_dictionaries({"done": tensors, "nbytes": sizes, "of": sizes}),
    st.fixed_dictionaries({"value": tensors, "nbytes": sizes}),
    st.fixed_dictionaries({"error": st.text(max_size=8), "text": st.text(), "of": sizes}),
    st.fixed_dictionaries({"get": st.text(max_size=8), "of": sizes}),
)


@given(sent)
def test_a_message_comes_as_it_was_sent(message: dict[str, Any]) -> None:
    assert messages.unpack(messages.pack(message)) == message


@given(sent, st.data())
def test_what_is_cut_off_or_changed_is_refused_or_is_a_message(
    message: dict[str, Any], data: st.DataObject
) -> None:
    whole = messages.pack(message)
    at = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError):
        messages.unpack(whole[:at])
    with suppress(ValueError):
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
        assert isinstance(messages.unpack(damaged), dict)


@pytest.mark.parametrize("header", [b"", b"7", b"[7]", b"[[1, 2]]", b'[["x", "f", 1, 2, 3]]'])
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    frame = messages.pack({"done": (), "nbytes": 1, "of": 1}).removesuffix(b"[]")
    with pytest.raises(ValueError):
        messages.unpack(frame + header)
