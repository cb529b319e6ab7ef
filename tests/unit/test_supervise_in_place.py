"""A node's workers from one generation into the next, and those in reserve, rule by rule (A8)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddle_ft.agent.reserve import spares_due
from paddle_ft.agent.supervise import (
    Dismiss,
    Group,
    LocalView,
    OrderWorkers,
    Publish,
    StartWorkers,
    StopWorkers,
    Worker,
    status_of,
    supervise,
)
from paddle_ft.config import JobConfig
from paddle_ft.coordination.schema import JobState
from paddle_ft.types import Generation, Member, NodeRecord, NodeStatus, Outcome, Versioned
from tests.unit.members import member

ME, OTHER = (member(node, slots=2) for node in "ab")
CONFIG = JobConfig(nproc_per_node=2, spares=1)
RUNS = NodeStatus("running", 1, recovery="in_place", alive=2)
WORKERS = tuple(Worker(rank, session=True, recovery="in_place") for rank in (0, 1))
NOW_S = 100.0


def state(generation: Generation | None, other: NodeStatus = RUNS, **more: object) -> JobState:
    nodes = {
        ME.id: Versioned(NodeRecord(ME, RUNS), 1, 1),
        OTHER.id: Versioned(NodeRecord(OTHER, other), 2, 2),
    }
    base = JobState(nodes=nodes, generation=Versioned(generation, 9, 9) if generation else None)
    return replace(base, **more)


def generation(
    number: int = 2, members: tuple[Member, ...] = (ME, OTHER), **more: object
) -> Generation:
    return Generation(number, members, "127.0.0.1:1", **more)


def view(state: JobState, workers: tuple[Worker, ...] = WORKERS, **more: object) -> LocalView:
    """With the workers of generation 1."""
    group = Group(1, workers) if workers else None
    return replace(LocalView(ME.id, state, group, launched=1), **more)


def acts(local: LocalView, now_s: float = NOW_S) -> tuple[object, ...]:
    status = status_of(local, CONFIG.nproc_per_node)
    published = Publish(status, local.leaving_since_s is not None)
    return supervise(local, published, now_s, CONFIG)


class TestIntoTheNext:
    @pytest.mark.parametrize("planned", [True, False])
    def test_workers_that_have_seen_everything_go_on(self, planned: bool) -> None:
        following = generation(since=(1, 1), planned=planned)
        assert acts(view(state(following))) == (OrderWorkers(following),)

    def test_workers_that_have_missed_a_generation_end(self) -> None:
        (stop,) = acts(view(state(generation(3, since=(2, 1)))))
        assert isinstance(stop, StopWorkers)

    def test_where_nobody_goes_on_they_end(self) -> None:
        (stop,) = acts(view(state(generation())))
        assert isinstance(stop, StopWorkers)

    def test_workers_that_cannot_go_on_end(self) -> None:
        workers = (WORKERS[0], replace(WORKERS[1], recovery="restart"))
        (stop,) = acts(view(state(generation(since=(1, 1))), workers))
        assert isinstance(stop, StopWorkers)

    def test_one_that_died_is_replaced_with_the_order(self) -> None:
        workers = (WORKERS[0], replace(WORKERS[1], exit_code=-9))
        following = generation(since=(1, 1))
        assert acts(view(state(following), workers)) == (OrderWorkers(following),)

    def test_with_all_dead_they_are_started(self) -> None:
        workers = tuple(replace(w, exit_code=-9) for w in WORKERS)
        following = generation(since=(1, 1))
        assert acts(view(state(following), workers)) == (StartWorkers(following),)

    def test_a_generation_is_never_gone_back_to(self) -> None:
        local = view(state(generation(1, since=(1, 1))))
        later = replace(local, group=Group(2, WORKERS), launched=2)
        (stop,) = acts(later)
        assert isinstance(stop, StopWorkers)


class TestWithoutAPlace:
    def test_a_planned_change_dismisses_them(self) -> None:
        local = view(state(generation(members=(OTHER,), since=(1,), planned=True)))
        assert acts(local) == (Dismiss(2),)

    def test_they_are_told_once_and_given_time(self) -> None:
        local = view(state(generation(members=(OTHER,), since=(1,), planned=True)))
        told = replace(local, group=Group(1, WORKERS, dismissed_s=NOW_S))
        assert acts(told, NOW_S + CONFIG.stop_grace_s - 1) == ()
        (stop,) = acts(told, NOW_S + CONFIG.stop_grace_s)
        assert isinstance(stop, StopWorkers)

    def test_after_a_failure_they_end(self) -> None:
        (stop,) = acts(view(state(generation(members=(OTHER,), since=(1,)))))
        assert isinstance(stop, StopWorkers)

    def test_a_node_that_leaves_stays_until_its_workers_have_left(self) -> None:
        local = view(state(generation(members=(OTHER,), since=(1,), planned=True)))
        leaves = replace(local, leaving_since_s=NOW_S - 1)
        assert acts(leaves) == (Dismiss(2),)
        gone = tuple(replace(w, exit_code=0, kind="paused") for w in WORKERS)
        (end,) = acts(replace(leaves, group=Group(1, gone)))
        assert type(end).__name__ == "Leave"


class TestALostPeer:
    def test_it_is_published_while_the_worker_waits(self) -> None:
        alarmed = (WORKERS[0], replace(WORKERS[1], lost_peer="broken"))
        status = status_of(view(state(generation(1)), alarmed), 2)
        assert (status.state, status.collateral, status.alive) == ("failed", True, 2)
        assert status.reason == "rank 1 lost a peer"

    def test_the_news_waits_a_moment_for_the_culprit(self) -> None:
        alarmed = (WORKERS[0], replace(WORKERS[1], lost_peer="broken", lost_s=NOW_S - 0.01))
        seen = view(state(generation(1)), alarmed)
        assert supervise(seen, Publish(RUNS, False), NOW_S, CONFIG) == ()
        (told,) = supervise(seen, Publish(RUNS, False), NOW_S + 0.1, CONFIG)
        assert isinstance(told, Publish)
        assert told.status.collateral

    def test_nobody_is_stopped_for_it(self) -> None:
        alarmed = (WORKERS[0], replace(WORKERS[1], lost_peer="broken"))
        assert acts(view(state(generation(1)), alarmed)) == ()

    def test_a_death_here_is_the_cause(self) -> None:
        workers = (replace(WORKERS[0], lost_peer="broken"), replace(WORKERS[1], exit_code=-9))
        status = status_of(view(state(generation(1)), workers), 2)
        assert (status.collateral, status.alive) == (False, 1)
        assert status.reason == "rank 1 was killed by SIGKILL"

    def test_who_is_left_is_not_stopped_for_a_death_here(self) -> None:
        workers = (WORKERS[0], replace(WORKERS[1], exit_code=-9))
        assert acts(view(state(generation(1)), workers)) == ()

    def test_who_has_said_farewell_is_not_counted_on(self) -> None:
        workers = (WORKERS[0], replace(WORKERS[1], kind="done"))
        assert status_of(view(state(generation(1)), workers), 2).alive == 1

    def test_a_checkpoint_that_cannot_be_loaded_asks_for_a_restart(self) -> None:
        local = view(state(generation(1)), restore_failed="bytes are lost")
        assert status_of(local, 2).recovery == "restart"


class TestReserve:
    def test_none_before_anybody_says_that_it_can_go_on(self) -> None:
        silent = replace(RUNS, recovery="")
        nodes = state(generation(1, (OTHER,)), silent)
        assert spares_due(view(nodes, ()), CONFIG) == (1, 0)
        assert spares_due(view(state(None), ()), CONFIG) == (1, 0)

    def test_a_member_keeps_so_many_as_it_was_told(self) -> None:
        assert spares_due(view(state(generation(1))), CONFIG) == (0, 1)

    def test_a_node_without_a_place_prepares_all_its_workers(self) -> None:
        assert spares_due(view(state(generation(1, (OTHER,))), ()), CONFIG) == (0, 2)

    def test_who_has_to_start_anew_does_so_from_the_reserve_too(self) -> None:
        cannot = replace(RUNS, recovery="restart")
        assert spares_due(view(state(generation(1), cannot)), CONFIG) == (0, 1)

    def test_imported_only_where_the_rank_decides_on_the_device(self) -> None:
        with_devices = CONFIG.model_copy(update={"devices": ("0", "1")})
        assert spares_due(view(state(generation(1))), with_devices) == (1, 0)

    def test_it_is_left_alone_until_workers_that_were_started_step(self) -> None:
        silent = tuple(Worker(rank) for rank in (0, 1))
        for recovery in ("restart", "in_place"):
            started = Group(1, silent, told=recovery, stepping=False)
            local = replace(view(state(generation(1))), group=started)
            assert spares_due(local, CONFIG) is None
            assert spares_due(replace(local, group=replace(started, stepping=True)), CONFIG)

    def test_none_when_it_ends(self) -> None:
        here = state(generation(1))
        assert spares_due(view(here, leaving_since_s=NOW_S), CONFIG) == (1, 0)
        over = replace(here, outcome=Versioned(Outcome(0, "done"), 5, 5))
        assert spares_due(view(over), CONFIG) == (1, 0)

    def test_ready_is_who_is_no_member_and_has_everything_prepared(self) -> None:
        waits = state(generation(1, (OTHER,)))
        assert status_of(view(waits, (), at_the_door=2), 2).ready
        assert not status_of(view(waits, (), at_the_door=1), 2).ready
        assert not status_of(view(state(generation(1)), at_the_door=2), 2).ready
