"""Who goes on with what, in the next generation: grouping, rule by rule (A8)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddle_ft.coordination.grouping import goes_on, in_time, since_of
from paddle_ft.coordination.schema import JobState
from paddle_ft.coordination.view import Trouble
from paddle_ft.types import Generation, Member, NodeRecord, NodeStatus, Pause, Versioned
from tests.unit.members import member

RUNS = NodeStatus("running", 3, recovery="in_place", alive=1)


A, B, C = (member(name) for name in "abc")
OLD = Generation(3, (A, B), "a:1", since=(1, 2))


def state(*statuses: NodeStatus, members: tuple[Member, ...] = (A, B, C)) -> JobState:
    """Generation 3 of a and b, and nodes with these statuses in the order of ``members``."""
    nodes = {
        m.id: Versioned(NodeRecord(m, s), at, at)
        for at, (m, s) in enumerate(zip(members, statuses, strict=False), 1)
    }
    return JobState(nodes=nodes, generation=Versioned(OLD, 9, 9))


class TestGoesOn:
    def test_with_living_workers_that_can(self) -> None:
        assert goes_on(state(RUNS, RUNS), (A, B), None)

    def test_one_of_them_is_enough(self) -> None:
        dead = replace(RUNS, state="failed", alive=0)
        assert goes_on(state(RUNS, dead), (A, B), Trouble(failed=()))

    def test_not_once_all_are_dead(self) -> None:
        dead = replace(RUNS, state="failed", alive=0)
        assert not goes_on(state(dead, dead), (A, B), Trouble())

    def test_one_that_cannot_speaks_for_all(self) -> None:
        assert not goes_on(state(RUNS, replace(RUNS, recovery="restart")), (A, B), None)

    def test_not_before_anybody_has_said_that_it_can(self) -> None:
        silent = replace(RUNS, recovery="")
        assert not goes_on(state(silent, silent), (A, B), None)
        assert goes_on(state(silent, RUNS), (A, B), None)

    def test_what_was_said_of_another_generation_does_not_count(self) -> None:
        earlier = replace(RUNS, generation=2)
        assert not goes_on(state(earlier, earlier), (A, B), None)

    def test_who_is_not_chosen_has_no_say(self) -> None:
        cannot = replace(RUNS, recovery="restart")
        assert goes_on(state(RUNS, cannot), (A, C), None)
        assert not goes_on(state(RUNS, cannot), (B, C), None)

    def test_not_after_the_workers_were_told_to_save_and_leave(self) -> None:
        here = state(RUNS, RUNS)
        paused = Versioned(Pause(3, "c joins"), 5, 5)
        assert not goes_on(replace(here, pause=paused), (A, B), None)
        earlier = Versioned(Pause(2, "c joins"), 5, 5)
        assert goes_on(replace(here, pause=earlier), (A, B), None)

    def test_not_from_states_that_make_no_checkpoint(self) -> None:
        assert not goes_on(state(RUNS, RUNS), (A, B), Trouble(uncommittable="apart"))

    def test_not_without_a_generation(self) -> None:
        assert not goes_on(replace(state(RUNS, RUNS), generation=None), (A, B), None)


def test_members_keep_the_date_since_which_they_have_seen_everything() -> None:
    assert since_of(OLD, (A, B, C), 4) == (1, 2, 4)
    assert since_of(OLD, (C, B), 4) == (4, 2)


def test_workers_that_were_started_anew_are_as_old_as_their_generation() -> None:
    anew = replace(OLD, since=())
    assert since_of(anew, (A, B, C), 4) == (3, 3, 4)
    assert since_of(None, (A,), 4) == (4,)


@pytest.mark.parametrize(
    ("ready", "nodes_min", "wanted"), [(True, 1, [A, B, C]), (False, 2, [A, B])]
)
def test_who_is_not_ready_does_not_keep_others_waiting(
    ready: bool, nodes_min: int, wanted: list[Member]
) -> None:
    here = state(RUNS, RUNS, NodeStatus(ready=ready))
    assert in_time(here, [A, B, C], nodes_min) == wanted


def test_who_is_needed_is_waited_for() -> None:
    assert in_time(state(RUNS, RUNS, NodeStatus()), [A, B, C], 3) == [A, B, C]
