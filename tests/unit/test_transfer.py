"""How a state is cut for its way from rank to rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.transfer import PIECE_BYTES, SMALL_BYTES, pieces

SIZES = st.one_of(
    st.integers(0, 64),
    st.integers(SMALL_BYTES - 2, SMALL_BYTES + 2),
    st.integers(PIECE_BYTES - 2, 2 * PIECE_BYTES + 2),
)


@given(st.lists(SIZES, max_size=60))
def test_each_byte_goes_once_in_pieces_of_bounded_size(sizes: list[int]) -> None:
    reached = [0] * len(sizes)
    for piece in pieces(sizes):
        assert 0 < sum(size for _, _, size in piece) <= PIECE_BYTES
        assert len(piece) == 1 or all(sizes[number] < SMALL_BYTES for number, _, _ in piece)
        for number, start, size in piece:
            assert start == reached[number]
            reached[number] += size
    assert reached == sizes


def test_small_tensors_share_a_piece_and_large_ones_do_not() -> None:
    assert list(pieces([10, PIECE_BYTES + 1, 20])) == [
        [(1, 0, PIECE_BYTES)],
        [(1, PIECE_BYTES, 1)],
        [(0, 0, 10), (2, 0, 20)],
    ]
