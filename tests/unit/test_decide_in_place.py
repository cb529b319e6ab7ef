"""Recovery in place and planned changes, as the leader decides them, rule by rule (A8)."""

from __future__ import annotations

from paddle_ft.coordination.actions import Finish, RequestPause
from paddle_ft.coordination.grouping import LOST_PEER_PATIENCE_S
from paddle_ft.coordination.schema import JobState
from paddle_ft.types import Head
from tests.unit.test_decide import (
    commit,
    config,
    job,
    look,
    names,
    part,
    proposed,
    since,
)

TWO, HEAD = ("a1", "b1"), Head(commit(2, 8), (commit(1, 4),))


def runs(**more: object) -> dict[str, object]:
    return {"state": "running", "generation": 1, "recovery": "in_place", "alive": 1, **more}


def died(**more: object) -> dict[str, object]:
    return runs(state="failed", reason="rank 0 was killed by SIGKILL", alive=0, **more)


def lost_a_peer() -> dict[str, object]:
    return runs(state="failed", reason="rank 1 lost a peer", collateral=True)


def here(**nodes: dict[str, object]) -> JobState:
    """Generation 1 of a and b, from head, and these nodes."""
    return job(nodes, TWO, head=HEAD, restore=HEAD.newest)


class TestFailure:
    def test_who_is_left_goes_on_at_once(self) -> None:
        state = here(a1=runs(), b1=died())
        generation = proposed(look(state, config(), marks=since(state, trouble_since_s=0.0)))
        assert names(generation) == ["a1", "b1"]
        assert generation.since == (1, 1)
        assert generation.in_place
        assert not generation.planned
        assert generation.restarts == 1
        assert len(generation.failures) == 1

    def test_nobody_waits_for_what_is_being_saved(self) -> None:
        state = here(a1=runs(), b1=died(pending_step=12))
        assert proposed(look(state, config(), marks=since(state, trouble_since_s=0.0))).in_place

    def test_what_all_have_written_is_committed_first(self) -> None:
        state = job(
            {"a1": runs(), "b1": died()}, TWO, head=HEAD, parts=[part("a1", 12), part("b1", 12)]
        )
        assert type(look(state, config()).action).__name__ == "Commit"
        again = proposed(look(state, config(), commit_running=True))
        assert again.in_place  # and a commit that lasts does not hold it up

    def test_it_starts_where_head_stands_for_those_without_a_state(self) -> None:
        assert proposed(look(here(a1=runs(), b1=died()), config())).restore == HEAD.newest

    def test_when_all_workers_are_dead_they_start_anew(self) -> None:
        generation = proposed(look(here(a1=died(), b1=died()), config()))
        assert generation.since == ()
        assert not generation.in_place

    def test_the_node_in_a_lost_ones_place_brings_nothing(self) -> None:
        generation = proposed(look(here(a1=runs(), c1={"ready": True}), config()))
        assert names(generation) == ["a1", "c1"]
        assert generation.since == (1, 2)

    def test_a_node_that_is_not_ready_comes_later(self) -> None:
        assert names(proposed(look(here(a1=runs(), c1={}), config()))) == ["a1"]

    def test_a_node_without_which_it_cannot_go_on_is_taken_as_it_is(self) -> None:
        assert names(proposed(look(here(a1=runs(), c1={}), config((2, 2))))) == ["a1", "c1"]

    def test_below_the_minimum_nobody_goes_on(self) -> None:
        state = here(a1=runs())
        decision = look(state, config((2, 2)), marks=since(state, members_since_s=1.0))
        assert decision.action is None


class TestFalseAlarm:
    def test_the_culprit_is_waited_for_a_moment(self) -> None:
        state = here(a1=runs(), b1=lost_a_peer())
        patience_s = LOST_PEER_PATIENCE_S
        early = since(state, trouble_since_s=patience_s - 0.1)
        assert look(state, config(), marks=early).action is None
        late = since(state, trouble_since_s=patience_s + 0.1)
        generation = proposed(look(state, config(), marks=late))
        assert generation.since == (1, 1)

    def test_with_workers_that_cannot_go_on_the_lease_of_the_lost_is_waited_for(self) -> None:
        state = here(a1=runs(recovery="restart"), b1=lost_a_peer())
        late = since(state, trouble_since_s=LOST_PEER_PATIENCE_S + 0.1)
        assert look(state, config(), marks=late).action is None


class TestPlanned:
    def test_a_node_that_is_ready_joins_without_a_pause(self) -> None:
        state = here(a1=runs(), b1=runs(), c1={"ready": True})
        generation = proposed(look(state, config((1, 3)), marks=since(state, members_since_s=0.0)))
        assert names(generation) == ["a1", "b1", "c1"]
        assert generation.since == (1, 1, 2)
        assert generation.planned
        assert generation.restarts == 0
        assert generation.failures == ()

    def test_a_node_that_prepares_its_workers_is_waited_for(self) -> None:
        state = here(a1=runs(), b1=runs(), c1={})
        assert look(state, config((1, 3))).action is None

    def test_beyond_the_maximum_it_stays_in_reserve(self) -> None:
        state = here(a1=runs(), b1=runs(), c1={"ready": True})
        assert look(state, config((1, 2))).action is None

    def test_a_node_leaves_without_a_pause(self) -> None:
        generation = proposed(look(here(a1=runs(), b1=runs(leaving=True)), config()))
        assert names(generation) == ["a1"]
        assert generation.planned
        assert generation.in_place

    def test_a_node_in_reserve_takes_the_place_of_one_that_leaves(self) -> None:
        state = here(a1=runs(), b1=runs(leaving=True), c1={"ready": True})
        generation = proposed(look(state, config()))
        assert names(generation) == ["a1", "c1"]
        assert generation.since == (1, 2)

    def test_when_all_leave_their_state_is_saved(self) -> None:
        state = here(a1=runs(leaving=True), b1=runs(leaving=True))
        assert isinstance(look(state, config()).action, RequestPause)

    def test_when_too_few_would_be_left_their_state_is_saved(self) -> None:
        state = here(a1=runs(), b1=runs(leaving=True))
        assert isinstance(look(state, config((2, 2))).action, RequestPause)

    def test_workers_that_cannot_go_on_save_and_leave(self) -> None:
        cannot = runs(recovery="restart")
        state = here(a1=runs(), b1=cannot, c1={"ready": True})
        assert isinstance(look(state, config((1, 3))).action, RequestPause)

    def test_only_running_workers_can_change(self) -> None:
        late = {"state": "idle", "generation": 0}
        state = here(a1=runs(), b1=late, c1={"ready": True})
        assert look(state, config((1, 3))).action is None

    def test_nobody_joins_while_no_checkpoint_is_intact(self) -> None:
        damaged = ("manifest-8", "manifest-4")
        state = here(a1=runs(damaged=damaged), b1=runs(), c1={"ready": True})
        decision = look(state, config((1, 3)))
        assert decision.action is None
        assert "not damaged" in decision.reason


def test_what_went_on_to_the_end_was_not_nothing() -> None:
    done = {"state": "finished", "generation": 2, "saved_step": 8}
    state = job(
        {"a1": done, "b1": done}, TWO, number=2, head=HEAD, restore=HEAD.newest, since=(1, 2)
    )
    action = look(state, config()).action
    assert isinstance(action, Finish)
    assert action.outcome.reason == "training is complete, step 8 is saved"
