"""A round of the loop whose step was not applied is handed out again, also to other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paddle_ft.collective import Collective
from paddle_ft.progress import Position
from paddle_ft.streams import Streams

pytestmark = pytest.mark.paddle


class Numbers:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        return np.int64(i)


def loop(streams: Streams, between: Callable[[], bool]) -> Iterator[list[int]]:
    number, feed = streams.open(Numbers(), 4, 1, True, 3)
    for ids in streams.run(number, feed, between):
        yield ids.numpy().tolist()


def test_the_batch_is_handed_out_again() -> None:
    plain = list(loop(Streams(Collective(0, 2), True, Position()), lambda: False))
    streams = Streams(Collective(0, 2), True, Position())
    again = iter([False, True, True, False, False, False, False])

    def between() -> bool:
        if next(again):
            streams.rewind()
            return True
        streams.applied()
        return False

    seen = []
    for ids in loop(streams, between):
        seen.append(ids)
        streams.close_round()
    assert seen == [plain[0], plain[1], plain[1], *plain[1:]]
    assert streams.position.samples == 20


def test_what_was_accumulated_is_handed_out_again_as_a_whole() -> None:
    """Two batches make one step; the group breaks after the first of the second two."""
    streams = Streams(Collective(0, 1), True, Position())
    seen: list[list[int]] = []
    broken = []

    def between() -> bool:
        if len(seen) % 2 == 0:
            streams.close_round()
            streams.applied()
        elif len(seen) == 3 and not broken:
            broken.append(replace(streams.position))
            streams.rewind()
            seen.pop()
            return True
        return False

    for ids in loop(streams, between):
        seen.append(ids)
        if len(seen) == 4:
            break
    assert broken[0].batch == 3
    assert sorted(i for ids in seen for i in ids) == sorted({i for ids in seen for i in ids})
    assert streams.position.batch == 4


def test_other_ranks_take_up_the_same_batch() -> None:
    alone = list(loop(Streams(Collective(0, 1), True, Position()), lambda: False))
    streams = Streams(Collective(1, 2), True, Position())
    again = iter([True])

    def between() -> bool:
        if next(again, False):
            streams.rewind()
            streams.resize(0, 1)
            return True
        return False

    seen = list(loop(streams, between))
    assert seen[0] == alone[0][2:]
    assert seen[1:] == alone


def test_a_rank_that_is_behind_goes_on_where_the_others_are() -> None:
    plain = list(loop(Streams(Collective(0, 1), True, Position()), lambda: False))
    ahead = Streams(Collective(0, 1), True, Position())
    begun = loop(ahead, lambda: False)
    for _ in range(3):
        next(begun)
    streams = Streams(Collective(0, 1), True, Position())
    moves = iter([True])

    def between() -> bool:
        if next(moves, False):
            streams.move_to(ahead.position)
            return True
        return False

    assert list(loop(streams, between)) == [plain[0], *plain[3:]]
