"""What ranks that meet decide about where to go on."""

from __future__ import annotations

import pytest

from paddle_ft.meeting import NOTHING, Meeting, meet, standing, whose_own_state


def met(*steps: int) -> Meeting:
    """What ranks that stand at ``steps`` come to: their words summed up as an all-reduce does."""
    size = len(steps)
    words = [standing(rank, size, step) for rank, step in enumerate(steps)]
    return meet([sum(column) for column in zip(*words, strict=True)])


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ((7, 7, 7), Meeting(7, 0, ())),
        ((7, 8, 8), Meeting(8, 1, (0,))),
        ((8, 7, 8), Meeting(8, 0, (1,))),
        ((NOTHING, 8, 7), Meeting(8, 1, (0, 2))),
        ((NOTHING, NOTHING), Meeting(NOTHING, 0, ())),
        ((NOTHING, 0), Meeting(0, 1, (0,))),
        ((0,), Meeting(0, 0, ())),
    ],
)
def test_all_go_on_from_the_furthest(steps: tuple[int, ...], wanted: Meeting) -> None:
    assert met(*steps) == wanted


def test_who_gives_is_never_in_need() -> None:
    for steps in [(3, 4, 4, 3), (5, NOTHING, 5), (0, NOTHING)]:
        meeting = met(*steps)
        assert meeting.source not in meeting.in_need
        assert steps[meeting.source] == meeting.step == max(steps)


def test_own_states_are_those_of_the_same_number_as_far_as_there_are_any() -> None:
    assert [whose_own_state(rank, 2) for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [whose_own_state(rank, 4) for rank in range(2)] == [0, 1]
