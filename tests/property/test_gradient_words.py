"""Words that ride with the gradients: their sums are exact, of any values and on many ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paddle_ft.gradients import RANKS_MAX, of_pieces, to_pieces

WORDS = st.integers(-(2**63), 2**63 - 1)


@given(arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(0, 5)), elements=WORDS))
def test_sums_of_words_are_those_of_integers(ranks: np.ndarray) -> None:  # type: ignore[type-arg]
    pieces = sum(to_pieces(words).astype(np.float32) for words in ranks)
    assert of_pieces(np.asarray(pieces)).tolist() == ranks.sum(axis=0, dtype=np.int64).tolist()


def test_the_most_ranks_with_the_greatest_pieces() -> None:
    words = np.array([-1, 2**63 - 1], dtype=np.int64)
    pieces = np.zeros((2, to_pieces(words).shape[1]), dtype=np.float32)
    for _ in range(RANKS_MAX):
        pieces += to_pieces(words).astype(np.float32)
    assert of_pieces(pieces).tolist() == [-RANKS_MAX, -RANKS_MAX]
