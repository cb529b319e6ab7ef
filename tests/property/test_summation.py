"""The sum of many terms has the same bits, however they are divided; shards are fixed, too."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft import sampling
from paddle_ft.sampling import Batch
from paddle_ft.summation import Partial, Span, cover, total

COUNTS = st.integers(1, 40)


def plus(a: str, b: str) -> str:
    """Tells every order of additions from every other."""
    return f"({a}{b})"


def in_order(count: int, runs: Iterable[range]) -> str:
    found: dict[Span, str] = {}
    for run in runs:
        partial: Partial[str] = Partial(count, plus, str)
        for index in run:
            partial.put(index, f"<{index}>")
        assert list(partial.sums) == cover(run.start, run.stop, count)
        found |= partial.sums
    return total(found, count, plus)


@given(COUNTS, st.integers(1, 9))
def test_the_order_does_not_depend_on_who_has_which_terms(count: int, world_size: int) -> None:
    runs = [sampling.spread(count, rank, world_size) for rank in range(world_size)]
    assert in_order(count, runs) == in_order(count, [range(count)])
    assert [i for run in runs for i in run] == list(range(count))


def test_a_rank_that_divides_the_terms_well_has_one_sum() -> None:
    for world_size in (1, 2, 4):
        assert [len(cover(run.start, run.stop, 8)) for run in runs_of(8, world_size)] == [
            1
        ] * world_size
    assert in_order(5, [range(5)]) == "((<0><1>)(<2>(<3><4>)))"


def runs_of(count: int, world_size: int) -> list[range]:
    return [sampling.spread(count, rank, world_size) for rank in range(world_size)]


def test_terms_come_one_after_another() -> None:
    partial: Partial[str] = Partial(4, plus, str)
    partial.put(1, "<1>")
    with pytest.raises(AssertionError, match="term 3 does not follow"):
        partial.put(3, "<3>")


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 20))
def test_shards_are_the_same_whoever_computes_them(size: int, world_size: int, shards: int) -> None:
    batch = Batch(0, 5, 5 + size, last=True)
    found = []
    for rank in range(world_size):
        items = sampling.items(3, batch, rank, world_size, shards)
        assert [i.first for i in items] == [True] + [False] * (len(items) - 1)
        assert [i.last for i in items] == [False] * (len(items) - 1) + [True]
        found += [(i.part, i.share) for i in items if i.share.weight]
    alone = [(i.part, i.share) for i in sampling.items(3, batch, 0, 1, shards)]
    assert found == alone
    assert [part for part, _ in alone] == list(range(sampling.shards_of(batch, shards)))
    covered = [p for _, share in alone for p in range(share.start, share.stop)]
    assert covered == list(range(5, 5 + size))
