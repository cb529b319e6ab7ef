"""Where published files are cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.serve.cut import BLOCK_BYTES, GROUP_BYTES, cut


def record(values: int, fill: int = 0) -> bytes:
    """A tensor of ``values`` float32, as Paddle writes it."""
    size, varint = values, b""
    while size >= 128:
        varint += bytes([size & 127 | 128])
        size >>= 7
    text = b"\x08\x05\x10" + varint + bytes([size])
    header = struct.pack("<IQIi", 0, 0, 0, len(text))
    return header + text + bytes([fill]) * (4 * values)


def pieces(data: bytes, parameters: bool = True) -> list[bytes]:
    found, at = [], 0
    for size in cut(memoryview(data), parameters=parameters):
        found.append(data[at : at + size])
        at += size
    return found


@given(st.binary(max_size=400), st.booleans())
def test_blocks_put_together_are_the_file(data: bytes, parameters: bool) -> None:
    assert b"".join(pieces(data, parameters)) == data


@given(st.lists(st.integers(1, 300_000), max_size=8))
def test_tensors_are_cut_where_they_begin(sizes: list[int]) -> None:
    records = [record(size) for size in sizes]
    found = pieces(b"".join(records))
    assert b"".join(found) == b"".join(records)
    ends = {len(b"".join(records[: i + 1])) for i in range(len(records))}
    at = 0
    for piece in found:
        at += len(piece)
        assert at in ends or len(piece) == BLOCK_BYTES
        assert len(piece) <= BLOCK_BYTES


@pytest.mark.parametrize("head", [10, 5000])
def test_another_head_leaves_the_other_blocks_as_they_were(head: int) -> None:
    large = GROUP_BYTES // 4
    body = [record(large, 1), record(large, 2), record(large, 3)]
    before, after = pieces(b"".join([record(10), *body])), pieces(b"".join([record(head), *body]))
    assert before[1:] == after[1:]
    assert len(before) == 4
