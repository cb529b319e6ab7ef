"""Membership, election, generations and commits, rule by rule (A2, A3, A7, A8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from paddle_ft.config import CheckpointConfig, Config, EtcdConfig, JobConfig
from paddle_ft.coordination.actions import (
    Action,
    Bar,
    Campaign,
    Commit,
    Decision,
    Finish,
    ImportHead,
    Propose,
    RequestPause,
    ScanStore,
)
from paddle_ft.coordination.decide import decide
from paddle_ft.coordination.grouping import arrange
from paddle_ft.coordination.schema import JobState
from paddle_ft.coordination.view import Marks, View, observe, who_marks
from paddle_ft.errors import (
    EXIT_CHECKPOINT,
    EXIT_COLLECTIVE,
    EXIT_COORDINATION,
    EXIT_DONE,
    EXIT_SAME_FAILURE,
    EXIT_STORE,
    EXIT_WORKER_FAILED,
)
from paddle_ft.health.judge import HealthRecord
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    Member,
    NodeRecord,
    NodeStatus,
    Outcome,
    Part,
    Pause,
    Stumble,
    Versioned,
)
from tests.unit.members import member as member_of

NOW_S = 1000.0
LONG_AGO_S = 100.0
WALL_S = 1_700_000_000.0


def member(name: str) -> Member:
    """``a1``: node a, incarnation 1."""
    return member_of(name[0], name[1:])


def record(name: str, came: int, **status: object) -> Versioned[NodeRecord]:
    leaving = bool(status.pop("leaving", False))
    return Versioned(NodeRecord(member(name), NodeStatus(**status), leaving), came, came)


def config(
    nodes: tuple[int, int] = (1, 2), max_restart: int = 3, keep_last: int = 3, **job: object
) -> Config:
    return Config(
        job=JobConfig(nodes_min=nodes[0], nodes_max=nodes[1], max_restart=max_restart, **job),
        etcd=EtcdConfig(lease_ttl_s=5),
        checkpoint=CheckpointConfig(keep_last=keep_last, persist_grace_s=5.0),
    )


def job(
    nodes: dict[str, dict[str, object]],
    members: Sequence[str] = (),
    number: int = 1,
    head: Head | None = None,
    parts: Sequence[Part] = (),
    leader: str = "a1",
    pause: bool = False,
    **generation: object,
) -> JobState:
    """Nodes in the order in which they came, and the generation of ``members``, if any."""
    made = Generation(number, tuple(member(m) for m in members), "host-a:7000", **generation)
    ids = {n: member(n).id for n in nodes}
    return JobState(
        nodes={ids[n]: record(n, at, **more) for at, (n, more) in enumerate(nodes.items(), 1)},
        leader=Versioned(member(leader).id, 20, 20) if leader else None,
        generation=Versioned(made, 30, 30) if members else None,
        head=Versioned(head, 40, 40) if head else None,
        pause=Versioned(Pause(number, "node c joins"), 50, 50) if pause else None,
        parts=tuple(parts),
    )


def running(number: int = 1) -> dict[str, object]:
    return {"state": "running", "generation": number}


def failed(reason: str = "rank 0 was killed by SIGKILL", **more: object) -> dict[str, object]:
    return {"state": "failed", "generation": 1, "reason": reason, **more}


def lost_a_peer() -> dict[str, object]:
    return failed("rank 1 lost a peer", collateral=True)


def commit(sequence: int, step: int, generation: int = 1) -> CommitRef:
    return CommitRef(sequence, step, generation, f"manifest-{step}", "digest")


def part(name: str, step: int, generation: int = 1) -> Part:
    return Part(generation, step, member(name).id, f"part-{name}-{step}", "digest")


def look(state: JobState, settings: Config, me: str = "a1", **view: object) -> Decision:
    """What ``me`` decides on a state that has long been so, unless ``marks`` says otherwise."""
    base = View(
        me=member(me).id,
        state=state,
        marks=observe(Marks(), state, LONG_AGO_S),
        acting_until_s=NOW_S + 3,
        wall_s=WALL_S,
        found=(),
        store="store",
    )
    return decide(replace(base, **view), NOW_S, settings)


def proposed(decision: Decision) -> Generation:
    assert isinstance(decision.action, Propose), decision
    return decision.action.generation


def names(generation: Generation) -> list[str]:
    return [m.node + m.incarnation for m in generation.members]


def since(state: JobState, **seconds_ago: float) -> Marks:
    """Marks as observed long ago, except what changed so many seconds ago."""
    marks = observe(Marks(), state, LONG_AGO_S)
    return replace(marks, **{k: NOW_S - s for k, s in seconds_ago.items()})


# ---------------------------------------------------------------- election


def test_without_a_leader_a_node_campaigns() -> None:
    state = job({"a1": {}, "b1": {}}, leader="")
    assert look(state, config()).action == Campaign()


def test_a_node_that_leaves_lets_others_lead() -> None:
    state = job({"a1": {"leaving": True}, "b1": {}}, leader="")
    assert look(state, config()).action is None


def test_a_node_that_leaves_last_leads_to_the_end() -> None:
    state = job({"a1": {"leaving": True}, "b1": {"leaving": True}}, leader="")
    assert look(state, config()).action == Campaign()


def test_who_does_not_lead_follows() -> None:
    assert look(job({"a1": {}, "b1": {}}), config(), me="b1").action is None


def test_nothing_is_decided_on_a_lease_that_may_have_ended() -> None:
    decision = look(job({"a1": {}}), config((1, 1)), acting_until_s=NOW_S)
    assert decision.action is None
    assert "lease" in decision.reason


def test_who_is_not_registered_decides_nothing() -> None:
    assert look(job({"b1": {}}, leader="a1"), config()).action is None


def test_after_the_end_nothing_is_decided() -> None:
    state = replace(job({"a1": {}}), outcome=Versioned(Outcome(0, "done"), 60, 60))
    assert look(state, config((1, 1))).action is None


# ---------------------------------------------------------------- what the store holds


def test_before_anything_else_the_store_is_looked_at() -> None:
    assert look(job({"a1": {}}), config((1, 1)), found=None).action == ScanStore()


def test_what_the_store_holds_is_told_to_etcd() -> None:
    found = (commit(9, 90), commit(8, 80), commit(7, 70), commit(6, 60))
    decision = look(job({"a1": {}}), config((1, 1), keep_last=3), found=found)
    assert isinstance(decision.action, ImportHead)
    assert decision.action.head.newest == found[0]
    assert decision.action.head.lineage == found[1:3]
    assert decision.action.head.store == "store"


# ---------------------------------------------------------------- formation


def test_a_generation_forms_when_the_maximum_is_here() -> None:
    state = job({"a1": {}, "b1": {}})
    generation = proposed(look(state, config((1, 2)), marks=since(state, members_since_s=0.0)))
    assert (generation.number, names(generation)) == (1, ["a1", "b1"])
    assert generation.endpoint == "host-a:7000"
    assert generation.restore is None
    assert generation.reason == "the job begins"


def test_below_the_maximum_others_are_waited_for() -> None:
    state = job({"a1": {}, "b1": {}})
    assert look(state, config((1, 3)), marks=since(state, members_since_s=0.5)).action is None
    assert names(proposed(look(state, config((1, 3))))) == ["a1", "b1"]


def test_below_the_minimum_nothing_forms() -> None:
    state = job({"a1": {}})
    decision = look(state, config((2, 3)), marks=since(state, members_since_s=10.0))
    assert decision.action is None
    assert "1 of at least 2" in decision.reason


def test_the_minimum_is_not_waited_for_for_ever() -> None:
    state = job({"a1": {}})
    settings = config((2, 3), members_timeout_s=60.0)
    assert look(state, settings, marks=since(state, members_since_s=59.0)).action is None
    action = look(state, settings, marks=since(state, members_since_s=60.0)).action
    assert isinstance(action, Finish)
    assert action.outcome.exit_code == EXIT_COORDINATION


def test_the_wait_begins_when_a_member_is_asked_to_leave() -> None:
    before = job({"a1": running(), "b1": running()}, ["a1", "b1"])
    after = job({"a1": running(), "b1": {**running(), "leaving": True}}, ["a1", "b1"])
    marks = observe(observe(Marks(), before, LONG_AGO_S), after, NOW_S)
    assert marks.members_since_s == NOW_S


def test_who_comes_first_is_in_and_the_others_are_spares() -> None:
    state = job({"c1": {}, "a1": {}, "b1": {}})
    assert names(proposed(look(state, config((1, 2))))) == ["c1", "a1"]


def test_quarantined_nodes_have_no_place() -> None:
    state = replace(job({"a1": {}, "b1": {}}), quarantine=frozenset({"b"}))
    state = replace(state)  # what is derived is derived anew
    assert names(proposed(look(state, config((1, 2))))) == ["a1"]


@pytest.mark.parametrize("bad", ["a1", "b1"], ids=["the leader's node", "another"])
def test_a_node_whose_workers_hang_again_and_again_is_barred(bad: str) -> None:
    """Before anything is done about the last hang: it would be given its place again."""
    nodes = {name: running() for name in ("a1", "b1", "c1")} | {bad: failed()}
    state = job(nodes, ["a1", "b1", "c1"])
    told = HealthRecord(1, blamed=(WALL_S - 30, WALL_S - 20, WALL_S - 10))
    state = replace(state, health={member(bad).id: Versioned(told, 60, 60)})
    action = look(state, config((2, 3))).action
    assert isinstance(action, Bar) and (action.node, action.fences) == (bad[0], state.fences())

    barred = replace(state, quarantine=frozenset({bad[0]}))
    decision = look(barred, config((2, 3)))
    assert bad not in names(proposed(decision)) and len(names(proposed(decision))) == 2
    assert f"node {bad[0]} is in quarantine" in decision.reason
    assert not isinstance(look(state, config((3, 3))).action, Bar), "all are needed"


def test_who_is_in_quarantine_does_not_become_leader_and_is_named_where_nodes_lack() -> None:
    state = replace(job({"a1": {}, "b1": {}}, leader=""), quarantine=frozenset({"a"}))
    assert look(state, config((1, 2))).action is None
    assert isinstance(look(state, config((1, 2)), me="b1").action, Campaign)
    state = replace(job({"a1": {}, "b1": {}}), quarantine=frozenset({"b"}))
    assert "b in quarantine" in look(state, config((2, 2))).reason


def test_a_generation_starts_where_head_stands() -> None:
    state = job({"a1": {}}, head=Head(commit(4, 40, generation=6)))
    generation = proposed(look(state, config((1, 1))))
    assert generation.restore == commit(4, 40, generation=6)
    assert generation.number == 7, "higher than that of any commit, even in a new etcd"


def test_a_proposal_carries_the_fences_of_its_view() -> None:
    state = job({"a1": {}}, head=Head(commit(4, 40)))
    action = look(state, config((1, 1))).action
    assert isinstance(action, Propose)
    assert action.fences == state.fences()
    assert (action.fences.leader, action.fences.generation, action.fences.head) == (20, 0, 40)


# ---------------------------------------------------------------- who takes which place


@pytest.mark.parametrize(
    ("before", "here", "most", "after"),
    [
        (["a1", "b1", "c1"], ["a1", "b1", "c1"], 3, ["a1", "b1", "c1"]),
        (["a1", "b1", "c1"], ["a1", "c1", "d1"], 3, ["a1", "d1", "c1"]),
        (["a1", "b1", "c1"], ["a1", "d1", "c1", "b2"], 3, ["a1", "b2", "c1"]),
        (["a1", "b1", "c1"], ["a1", "c1"], 3, ["a1", "c1"]),
        (["a1"], ["a1", "b1", "c1"], 2, ["a1", "b1"]),
        ([], ["b1", "a1"], 2, ["b1", "a1"]),
    ],
    ids=["stays", "a spare takes the place", "the same node first", "closes up", "grows", "forms"],
)
def test_places(before: list[str], here: list[str], most: int, after: list[str]) -> None:
    placed = arrange([member(m) for m in before], [member(m) for m in here], most)
    assert [m.node + m.incarnation for m in placed] == after


# ---------------------------------------------------------------- losses and failures


def test_nothing_is_done_while_all_is_well() -> None:
    state = job({"a1": running(), "b1": running()}, ["a1", "b1"])
    assert look(state, config()).action is None


def test_a_spare_takes_the_rank_of_the_lost() -> None:
    state = job({"b1": running(), "c1": {}}, ["a1", "b1"], leader="b1")
    generation = proposed(look(state, config((1, 2)), me="b1"))
    assert names(generation) == ["c1", "b1"]
    assert "node a is lost" in generation.reason
    assert generation.restarts == 1
    assert generation.failures == (), "losing a node is nobody's failure"


def test_a_node_that_comes_back_supersedes_its_old_lease() -> None:
    state = job({"a1": running(), "b1": running(), "b2": {}}, ["a1", "b1"])
    assert names(proposed(look(state, config((2, 2))))) == ["a1", "b2"]


def test_without_a_spare_the_job_shrinks() -> None:
    state = job({"a1": running()}, ["a1", "b1"])
    assert names(proposed(look(state, config((1, 2))))) == ["a1"]


def test_below_the_minimum_it_waits_for_somebody_to_come() -> None:
    state = job({"a1": running()}, ["a1", "b1"])
    decision = look(state, config((2, 2)), marks=since(state, members_since_s=10.0))
    assert decision.action is None


def test_a_failure_of_workers_is_counted() -> None:
    state = job({"a1": running(), "b1": failed()}, ["a1", "b1"])
    generation = proposed(look(state, config()))
    assert names(generation) == ["a1", "b1"]
    assert generation.failures == (WALL_S,)
    assert "node b: rank 0 was killed by SIGKILL" in generation.reason


def test_failures_of_earlier_generations_are_not_this_ones() -> None:
    state = job({"a1": running(2), "b1": failed()}, ["a1", "b1"], number=2)
    assert look(state, config()).action is None


def test_too_many_failures_end_the_job() -> None:
    recent = tuple(WALL_S - s for s in (200.0, 100.0, 10.0))
    state = job({"a1": failed()}, ["a1"], failures=recent)
    action = look(state, config((1, 1), max_restart=3)).action
    assert isinstance(action, Finish)
    assert action.outcome.exit_code == EXIT_WORKER_FAILED
    assert "SIGKILL" in action.outcome.reason


def test_failures_are_forgotten_after_a_while() -> None:
    old = tuple(WALL_S - s for s in (900.0, 800.0, 10.0))
    state = job({"a1": failed()}, ["a1"], failures=old)
    generation = proposed(look(state, config((1, 1), max_restart=3)))
    assert generation.failures == (WALL_S - 10.0, WALL_S)


def test_who_only_lost_a_peer_waits_for_the_culprit() -> None:
    state = job({"a1": lost_a_peer(), "b1": running()}, ["a1", "b1"])
    assert look(state, config(), marks=since(state, trouble_since_s=6.9)).action is None
    generation = proposed(look(state, config(), marks=since(state, trouble_since_s=7.1)))
    assert generation.failures == (WALL_S,), "nobody else was to blame"


def test_once_the_culprit_is_known_there_is_no_wait() -> None:
    state = job({"a1": lost_a_peer(), "b1": failed()}, ["a1", "b1"])
    generation = proposed(look(state, config(), marks=since(state, trouble_since_s=0.0)))
    assert "node b: rank 0 was killed" in generation.reason


def test_what_is_being_saved_is_waited_for() -> None:
    state = job(
        {"a1": lost_a_peer(), "b1": failed(pending_step=50)}, ["a1", "b1"], head=Head(commit(4, 40))
    )
    marks = since(state, trouble_since_s=4.9)
    assert look(state, config(), marks=marks).action is None
    assert proposed(look(state, config(), marks=since(state, trouble_since_s=5.0)))


def test_what_is_older_than_head_is_not_waited_for() -> None:
    state = job({"a1": failed(pending_step=40)}, ["a1"], head=Head(commit(4, 40)))
    assert proposed(look(state, config((1, 1)), marks=since(state, trouble_since_s=0.0)))


def test_a_fatal_failure_ends_the_job() -> None:
    state = job({"a1": running(), "b1": failed("another model", fatal=5)}, ["a1", "b1"])
    action = look(state, config()).action
    assert action == Finish(Outcome(5, "another model"), state.fences())


def test_another_run_begins_with_no_failures_counted() -> None:
    recent = tuple(WALL_S - s for s in (30.0, 20.0, 10.0))
    state = job({"a2": {}}, ["a1"], leader="a2", failures=recent, restarts=3)
    generation = proposed(look(state, config((1, 1)), me="a2"))
    assert (generation.number, generation.failures, generation.restarts) == (2, (), 0)


# ---------------------------------------------------------------- joining and leaving


def test_a_newcomer_makes_the_others_pause() -> None:
    state = job({"a1": running(), "b1": {}}, ["a1"])
    action = look(state, config((1, 2))).action
    assert action == RequestPause(Pause(1, "node b joins"), state.fences())


def test_newcomers_are_taken_in_together() -> None:
    state = job({"a1": running(), "b1": {}}, ["a1"])
    decision = look(state, config((1, 3)), marks=since(state, members_since_s=0.5))
    assert decision.action is None
    assert "node b has come" in decision.reason


def test_beyond_the_maximum_newcomers_are_spares() -> None:
    state = job({"a1": running(), "b1": {}}, ["a1"])
    decision = look(state, config((1, 1)))
    assert decision.action is None
    assert "1 in reserve" in decision.reason


def test_a_member_that_leaves_makes_the_others_pause() -> None:
    state = job({"a1": running(), "b1": {**running(), "leaving": True}}, ["a1", "b1"])
    action = look(state, config()).action
    assert action == RequestPause(Pause(1, "node b leaves"), state.fences())


def paused(step: int) -> dict[str, object]:
    return {"state": "paused", "generation": 1, "saved_step": step}


def test_a_pause_waits_for_all_to_save() -> None:
    nodes = {"a1": paused(7), "b1": running(), "c1": {}}
    state = job(nodes, ["a1", "b1"], pause=True)
    decision = look(state, config((1, 3)), marks=since(state, pause_since_s=1.0))
    assert decision.action is None


def test_a_pause_waits_for_the_commit() -> None:
    state = job({"a1": paused(7), "b1": paused(7), "c1": {}}, ["a1", "b1"], pause=True)
    decision = look(state, config((1, 3)), marks=since(state, pause_since_s=1.0))
    assert decision.action is None
    assert "step 7" in decision.reason


def test_after_the_commit_the_newcomer_is_in() -> None:
    head = Head(commit(1, 7))
    state = job({"a1": paused(7), "b1": paused(7), "c1": {}}, ["a1", "b1"], head=head, pause=True)
    generation = proposed(look(state, config((1, 3)), marks=since(state, pause_since_s=1.0)))
    assert names(generation) == ["a1", "b1", "c1"]
    assert generation.restore == head.newest
    assert generation.reason == "node c joins"
    assert (generation.failures, generation.restarts) == ((), 0)


def test_a_pause_does_not_last_for_ever() -> None:
    state = job({"a1": paused(7), "b1": running(), "c1": {}}, ["a1", "b1"], pause=True)
    marks = since(state, pause_since_s=60.0)
    assert names(proposed(look(state, config((1, 3)), marks=marks))) == ["a1", "b1", "c1"]


def test_a_pause_that_tears_the_group_is_nobodys_failure() -> None:
    state = job({"a1": paused(-1), "b1": lost_a_peer(), "c1": {}}, ["a1", "b1"], pause=True)
    generation = proposed(look(state, config((1, 3)), marks=since(state, pause_since_s=1.0)))
    assert (generation.failures, generation.restarts) == ((), 0)


# ---------------------------------------------------------------- commits


def test_a_step_that_all_have_written_is_committed() -> None:
    parts = [part("a1", 50), part("b1", 50)]
    head = Head(commit(4, 40), (commit(3, 30), commit(2, 20)))
    state = job({"a1": running(), "b1": running()}, ["a1", "b1"], head=head, parts=parts)
    action = look(state, config(keep_last=3)).action
    assert isinstance(action, Commit)
    assert (action.step, action.sequence) == (50, 5)
    assert [p.member for p in action.parts] == ["a.1", "b.1"]
    assert action.base == commit(4, 40)
    assert action.lineage == (commit(4, 40), commit(3, 30))
    assert action.head == head
    assert action.fences == state.fences()


def test_parts_come_in_the_order_of_ranks() -> None:
    parts = [part("a1", 5), part("b1", 5)]
    state = job({"a1": running(), "b1": running()}, ["b1", "a1"], parts=parts)
    action = look(state, config()).action
    assert isinstance(action, Commit)
    assert [p.member for p in action.parts] == ["b.1", "a.1"]


def test_the_newest_complete_step_is_taken_and_older_parts_have_served() -> None:
    parts = [part("a1", 5), part("b1", 5), part("a1", 6), part("b1", 6), part("a1", 7)]
    state = job({"a1": running(), "b1": running()}, ["a1", "b1"], parts=parts)
    action = look(state, config()).action
    assert isinstance(action, Commit)
    assert (action.step, action.sequence, action.base) == (6, 1, None)
    assert set(action.obsolete) == set(parts[:4])


def test_a_step_that_one_has_not_written_waits() -> None:
    state = job({"a1": running(), "b1": running()}, ["a1", "b1"], parts=[part("a1", 5)])
    assert look(state, config()).action is None


def test_head_does_not_go_back_within_a_generation() -> None:
    state = job({"a1": running()}, ["a1"], head=Head(commit(1, 5)), parts=[part("a1", 5)])
    assert look(state, config((1, 1))).action is None


def test_parts_of_an_earlier_generation_are_not_used() -> None:
    state = job({"a1": running(2)}, ["a1"], number=2, parts=[part("a1", 5, generation=1)])
    assert look(state, config((1, 1))).action is None


def test_one_commit_at_a_time() -> None:
    state = job({"a1": running()}, ["a1"], parts=[part("a1", 5)])
    assert look(state, config((1, 1)), commit_running=True).action is None


def test_a_commit_goes_before_recovery() -> None:
    parts = [part("a1", 5), part("b1", 5)]
    state = job({"a1": running()}, ["a1", "b1"], parts=parts)
    assert isinstance(look(state, config()).action, Commit)
    marks = since(state, trouble_since_s=1.0)
    assert look(state, config(), commit_running=True, marks=marks).action is None
    marks = since(state, trouble_since_s=5.0)
    assert proposed(look(state, config(), commit_running=True, marks=marks))


def test_parts_that_make_no_checkpoint_begin_a_generation() -> None:
    state = job({"a1": running()}, ["a1"], parts=[part("a1", 5)])
    told = (state.fences(), "step 5 cannot be committed")
    generation = proposed(look(state, config((1, 1)), commit_failed=told))
    assert generation.reason == "step 5 cannot be committed"
    assert generation.failures == (WALL_S,)


def test_what_failed_upon_an_earlier_head_says_nothing() -> None:
    before = job({"a1": running()}, ["a1"], parts=[part("a1", 5)])
    state = job({"a1": running()}, ["a1"], head=Head(commit(1, 4)), parts=[part("a1", 5)])
    told = (before.fences(), "step 5 cannot be committed")
    assert isinstance(look(state, config((1, 1)), commit_failed=told).action, Commit)


# ---------------------------------------------------------------- damage


HEAD = Head(commit(3, 30), (commit(2, 20), commit(1, 10)))


def damaged(*steps: int) -> dict[str, object]:
    return failed("a block is lost", damaged=tuple(f"manifest-{s}" for s in steps))


def test_a_damaged_checkpoint_is_passed_over() -> None:
    state = job({"a1": damaged(30), "b1": running()}, ["a1", "b1"], head=HEAD)
    generation = proposed(look(state, config(), marks=since(state, trouble_since_s=0.0)))
    assert generation.restore == commit(2, 20)
    assert generation.failures == (), "nobody's workers failed"


def test_several_nodes_can_know_of_damage() -> None:
    nodes = {"a1": damaged(30), "b1": {"damaged": ("manifest-20",)}}
    state = job(nodes, ["a1", "b1"], head=HEAD)
    assert proposed(look(state, config())).restore == commit(1, 10)


def test_what_was_passed_over_is_no_ancestor() -> None:
    state = job(
        {"a1": running(2)},
        ["a1"],
        number=2,
        restore=commit(2, 20),
        head=HEAD,
        parts=[part("a1", 25, generation=2)],
    )
    action = look(state, config((1, 1))).action
    assert isinstance(action, Commit)
    assert (action.sequence, action.step) == (4, 25)
    assert action.lineage == (commit(2, 20), commit(1, 10))


def test_when_all_are_damaged_the_job_ends() -> None:
    state = job({"a1": damaged(30, 20, 10)}, ["a1"], head=HEAD)
    action = look(state, config((1, 1))).action
    assert isinstance(action, Finish)
    assert action.outcome.exit_code == EXIT_CHECKPOINT


# ---------------------------------------------------------------- the end


def finished(step: int = -1, **more: object) -> dict[str, object]:
    return {"state": "finished", "generation": 1, "saved_step": step, **more}


def outcome(action: Action | None) -> Outcome:
    assert isinstance(action, Finish)
    return action.outcome


def test_the_job_ends_when_all_have_finished() -> None:
    head = Head(commit(1, 9))
    state = job({"a1": finished(9), "b1": running()}, ["a1", "b1"], head=head)
    assert look(state, config()).action is None
    state = job({"a1": finished(9), "b1": finished(9)}, ["a1", "b1"], head=head)
    assert outcome(look(state, config()).action).exit_code == EXIT_DONE


def test_a_script_that_saves_nothing_ends_too() -> None:
    state = job({"a1": finished()}, ["a1"])
    assert outcome(look(state, config((1, 1))).action).exit_code == EXIT_DONE


def test_the_last_checkpoint_is_committed_first() -> None:
    state = job({"a1": finished(9)}, ["a1"], parts=[part("a1", 9)])
    assert isinstance(look(state, config((1, 1))).action, Commit)
    assert look(state, config((1, 1)), commit_running=True).action is None


def test_the_last_checkpoint_is_waited_for_while_it_is_written() -> None:
    state = job({"a1": finished(9, pending_step=9)}, ["a1"])
    marks = since(state, finished_since_s=1e4)
    assert look(state, config((1, 1)), marks=marks).action is None


def test_a_last_checkpoint_that_does_not_come_is_told() -> None:
    state = job({"a1": finished(9)}, ["a1"])
    assert look(state, config((1, 1)), marks=since(state, finished_since_s=59.0)).action is None
    action = look(state, config((1, 1)), marks=since(state, finished_since_s=60.0)).action
    assert outcome(action).exit_code == EXIT_STORE


def test_a_node_lost_after_the_end_but_before_the_commit_is_made_up_for() -> None:
    state = job({"a1": finished(9)}, ["a1", "b1"])
    assert names(proposed(look(state, config()))) == ["a1"]


class TestVerdict:
    """A bug that ends every attempt at the same place is told apart from bad luck."""

    def decided(self, before: Stumble | None, step: int, exit_code: int) -> Decision:
        status = {"exit_code": exit_code, "failed_at": step, "reason": "r"}
        failed = record("a1", 1, state="failed", generation=1, **status)
        generation = Generation(1, (member("a1"),), "h:1", stumble=before)
        state = JobState(
            nodes={"a.1": failed},
            leader=Versioned("a.1", 5, 5),
            generation=Versioned(generation, 6, 6),
        )
        config = Config(job=JobConfig(max_restart=99))
        seen = View("a.1", state, Marks(trouble=1), NOW_S + 9, WALL_S, found=())
        return decide(seen, NOW_S, config)

    @pytest.mark.parametrize(
        ("before", "step", "exit_code", "ends"),
        [
            (None, 7, 1, False),
            (Stumble(7, 1, ("a",)), 7, 1, False),
            (Stumble(7, 1, ("a", "b")), 7, 1, True),
            (Stumble(6, 1, ("a", "b")), 7, 1, False),
            (Stumble(7, 2, ("a", "b")), 7, 1, False),
            (Stumble(7, -11, ("a", "b")), 7, -11, True),
            (Stumble(7, -9, ("a", "b")), 7, -9, False),
            (Stumble(0, 1, ("a",)), 0, 1, True),
        ],
    )
    def test_three_alike_or_two_before_the_first_step(
        self, before: Stumble | None, step: int, exit_code: int, ends: bool
    ) -> None:
        action = self.decided(before, step, exit_code).action
        if ends:
            assert isinstance(action, Finish)
            assert action.outcome.exit_code == EXIT_SAME_FAILURE
        else:
            assert isinstance(action, Propose)


class TestLostPeers:
    """Workers that lose each other although all of them live: in place that is cheap, up to ten."""

    def decided(self, failures: tuple[float, ...], before: Stumble | None) -> Decision:
        alive = {"generation": 1, "recovery": "in_place", "alive": 1}
        lost = {"state": "failed", "collateral": True, "failed_at": 4, "reason": "lost a peer"}
        nodes = {
            "a.1": record("a1", 1, **alive, **lost),
            "b.1": record("b1", 2, **alive, state="running"),
        }
        members = (member("a1"), member("b1"))
        generation = Generation(1, members, "h:1", failures=failures, stumble=before)
        state = JobState(
            nodes=nodes,
            leader=Versioned("a.1", 5, 5),
            generation=Versioned(generation, 6, 6),
        )
        config = Config(job=JobConfig(max_restart=1, nodes_min=2, nodes_max=2))
        marks = Marks(trouble=1, trouble_since_s=NOW_S - 1.0)
        seen = View("a.1", state, marks, NOW_S + 9, WALL_S, found=())
        return decide(seen, NOW_S, config)

    def test_they_form_a_group_again_and_nobody_has_failed(self) -> None:
        action = self.decided((WALL_S - 1,), None).action
        assert isinstance(action, Propose)
        generation = action.generation
        assert generation.since == (1, 1)
        assert not generation.planned
        assert generation.failures == (WALL_S - 1,)
        assert generation.stumble == Stumble(4, EXIT_COLLECTIVE, ("a",))

    def test_after_ten_times_at_one_step_the_network_is_named(self) -> None:
        action = self.decided((), Stumble(4, EXIT_COLLECTIVE, ("a",) * 9)).action
        assert isinstance(action, Finish)
        assert "look at the network between the nodes" in action.outcome.reason
        assert isinstance(self.decided((), Stumble(3, EXIT_COLLECTIVE, ("a",) * 9)).action, Propose)


def test_who_has_not_heard_of_the_end_of_its_own_lease_takes_nobody_for_another_leader() -> None:
    """Or it would tell its workers of a commit that only an etcd knows which dies with it."""
    state = job({"a1": {}, "b1": {}})
    assert state.leader is not None
    assert state.leader.value == "a.1"
    assert who_marks(state, "a.1") == "me"
    assert who_marks(state, "b.1") == "another"
    assert who_marks(state, "a.2") == ""
    assert who_marks(replace(state, leader=None), "a.1") == ""
