"""Each checker rejects a history in which its promise is broken, and no other.

``good`` is a short history that is all right; each test spoils one thing in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paddle_ft.types import CommitRef, Generation, Head, Member, Outcome
from tests.sim.checkers import (
    AskedTheBarred,
    BrokeChain,
    Broken,
    BrokeSampleAccounting,
    BrokeSingleWriter,
    GenerationWentBack,
    HeadWentBack,
    LostCheckpoint,
    LostStep,
    NoProgress,
    RedidCommitted,
    SteppedApart,
    WrongExitCode,
    check_all,
)
from tests.sim.history import (
    Acknowledged,
    Applied,
    Barred,
    Damaged,
    EtcdLost,
    Exited,
    Fact,
    Formed,
    Gone,
    History,
    Removed,
    Saved,
    Stored,
    Write,
)
from tests.sim.run import run
from tests.sim.training import State
from tests.sim.world import World, make_config

BATCH, STEPS = 8, 4
LEADER, TERM = "a.1", 3


def ref(sequence: int, step: int, generation: int = 1) -> CommitRef:
    return CommitRef(sequence, step, generation, f"manifest{sequence}", "digest")


def state(step: int, origin: str = "", run: int = 1) -> State:
    """By ``run`` from the beginning, or from ``FIRST`` on if that is its origin."""
    path = ((run, 1),) if not origin or step <= FIRST.step else ((1, 1), (run, FIRST.step + 1))
    return State(step, step * BATCH, ((0, step * BATCH),), origin, path)


def saved(commit: CommitRef, *states: State) -> Saved:
    return Saved(0.0, commit.manifest, commit.step, commit.step * BATCH, states)


def write(key: str, value: Any) -> Write:
    return Write(0.0, 1, key, value, LEADER, TERM, LEADER, TERM)


def generation(number: int, restore: CommitRef | None, since: tuple[int, ...] = ()) -> Write:
    member = Member("a", "1", "a", 2, (1, 2, 3))
    return write("generation", Generation(number, (member,), "a:1", restore, since=since))


FIRST, SECOND = ref(1, 2), ref(2, 4, generation=2)
FINISHED = write("outcome", Outcome(0, "training is complete"))


def good() -> list[Fact]:
    return [
        generation(1, None),
        Stored(0.0, "data1"),
        Stored(0.0, FIRST.manifest, ("data1",)),
        saved(FIRST, state(2)),
        write("head", Head(FIRST)),
        Acknowledged(0.0, FIRST),
        generation(2, FIRST),
        Stored(0.0, "data2"),
        Stored(0.0, SECOND.manifest, ("data1", "data2")),
        saved(SECOND, state(4, FIRST.manifest, run=2)),
        write("head", Head(SECOND, (FIRST,))),
        FINISHED,
        Exited(0.0, "a", 0, 0, 0.0),
    ]


def verdict(facts: list[Fact]) -> type[Broken] | None:
    try:
        check_all(History(BATCH, STEPS, facts=facts))
    except Broken as error:
        return type(error)
    return None


def spoiled(old: Fact, *new: Fact) -> list[Fact]:
    facts = good()
    at = facts.index(old)
    facts[at : at + 1] = new
    return facts


def test_a_good_history_is_accepted() -> None:
    assert verdict(good()) is None


@pytest.mark.parametrize("key", ["generation", "head", "outcome"])
@pytest.mark.parametrize(
    "change", [{"sender": "b.1"}, {"term": 2}, {"leader": "", "leader_term": 0}, {"sender": ""}]
)
def test_only_the_leader_of_the_term_writes(key: str, change: dict[str, Any]) -> None:
    old = next(f for f in good() if isinstance(f, Write) and f.key == key)
    assert verdict(spoiled(old, replace(old, **change))) is BrokeSingleWriter


def test_head_moves_by_one() -> None:
    old = write("head", Head(SECOND, (FIRST,)))
    skipped = replace(SECOND, sequence=3)
    assert verdict(spoiled(old, write("head", Head(skipped, (FIRST,))))) is HeadWentBack


def test_head_gains_steps() -> None:
    old = write("head", Head(SECOND, (FIRST,)))
    behind = replace(SECOND, step=2)
    assert verdict(spoiled(old, write("head", Head(behind, (FIRST,))))) is HeadWentBack


def test_an_intact_commit_is_not_dropped() -> None:
    old = write("head", Head(SECOND, (FIRST,)))
    assert verdict(spoiled(old, write("head", Head(SECOND)))) is HeadWentBack


def test_a_damaged_commit_may_be_dropped() -> None:
    facts = spoiled(generation(2, FIRST), Damaged(0.0, "data1"), generation(2, None))
    facts[facts.index(saved(SECOND, state(4, FIRST.manifest, run=2)))] = saved(
        SECOND, state(4, "", run=2)
    )
    facts[facts.index(write("head", Head(SECOND, (FIRST,))))] = write("head", Head(SECOND))
    # Nothing intact is left to begin from: that is a reason to give up, not to begin again.
    assert verdict(facts) is BrokeChain


def test_an_acknowledged_commit_is_found_in_a_new_etcd() -> None:
    third = ref(3, 4, generation=3)
    facts: list[Fact] = [
        *good()[:11],
        Acknowledged(0.0, SECOND),
        EtcdLost(0.0),
        write("head", Head(FIRST)),
        generation(3, FIRST),
        Stored(0.0, third.manifest),
    ]
    assert verdict(facts) is HeadWentBack


def test_numbers_of_generations_grow() -> None:
    assert verdict(spoiled(generation(2, FIRST), generation(1, FIRST))) is GenerationWentBack


def test_a_generation_starts_where_head_stands() -> None:
    assert verdict(spoiled(generation(2, FIRST), generation(2, None))) is BrokeChain


def test_a_commit_is_of_the_current_generation() -> None:
    facts = spoiled(generation(2, FIRST), generation(3, FIRST))
    assert verdict(facts) is BrokeChain


def test_a_commit_continues_what_its_generation_restored() -> None:
    old = saved(SECOND, state(4, FIRST.manifest, run=2))
    assert verdict(spoiled(old, saved(SECOND, state(4, "", run=2)))) is BrokeChain


def test_a_commit_is_not_put_together_from_two_groups() -> None:
    old = saved(SECOND, state(4, FIRST.manifest, run=2))
    mixed = saved(SECOND, state(4, FIRST.manifest, run=2), state(4, FIRST.manifest, run=3))
    assert verdict(spoiled(old, mixed)) is BrokeChain


def test_a_commit_continues_the_one_before_in_its_generation() -> None:
    commit = ref(2, 4)
    facts: list[Fact] = [
        *good()[:6],
        Stored(0.0, commit.manifest),
        saved(commit, state(4, "", run=2)),
        write("head", Head(commit, (FIRST,))),
    ]
    assert verdict(facts) is BrokeChain


@pytest.mark.parametrize(
    "used",
    [((0, 24),), ((0, 32), (24, 32)), ((0, 16), (20, 32)), ((0, 36),)],
    ids=["skipped at the end", "twice", "skipped", "beyond"],
)
def test_samples_are_used_exactly_once(used: tuple[tuple[int, int], ...]) -> None:
    old = saved(SECOND, state(4, FIRST.manifest, run=2))
    wrong = replace(state(4, FIRST.manifest, run=2), used=used)
    assert verdict(spoiled(old, saved(SECOND, wrong))) is BrokeSampleAccounting


def test_the_position_is_that_of_the_weights() -> None:
    old = saved(SECOND, state(4, FIRST.manifest, run=2))
    assert verdict(spoiled(old, replace(old, position=24))) is BrokeSampleAccounting


@pytest.mark.parametrize("name", [FIRST.manifest, SECOND.manifest, "data1", "data2"])
def test_what_head_keeps_stays_in_the_store(name: str) -> None:
    assert verdict([*good(), Removed(0.0, name)]) is LostCheckpoint


def test_what_a_fault_destroyed_is_excused() -> None:
    assert verdict([*good(), Damaged(0.0, "data2"), Removed(0.0, "data2")]) is None


def test_head_never_names_what_is_not_stored() -> None:
    assert verdict([f for f in good() if f != Stored(0.0, "data2")]) is LostCheckpoint


def test_complete_means_that_the_last_step_is_committed() -> None:
    facts = [*good()[:6], FINISHED, Exited(0.0, "a", 0, 0, 0.0)]
    assert verdict(facts) is NoProgress


def test_nobody_gives_up_while_a_checkpoint_is_intact() -> None:
    end = write("outcome", Outcome(5, "every checkpoint is damaged"))
    facts = [*good()[:11], end, Exited(0.0, "a", 5, 0, 0.0)]
    assert verdict(facts) is NoProgress


def test_launchers_end_with_the_outcome() -> None:
    assert verdict([*good(), Exited(0.0, "b", 1, 0, 0.0)]) is WrongExitCode


def test_launchers_may_end_with_the_code_of_their_signal() -> None:
    assert verdict([*good()[:11], Exited(0.0, "b", 143, 143, 0.0)]) is None


def test_a_job_that_stands_still_is_noticed() -> None:
    def more_nodes_than_there_are(world: World) -> None:
        world.config = make_config(9, 9, 1, 3, 1)

    assert isinstance(run(1, weaken=more_nodes_than_there_are).broken, NoProgress)


# ---------------------------------------------------------------- in memory

HERE = ("a.1", "a.1")


def formed(number: int, brought: tuple[State, ...], *states: State) -> Formed:
    """Processes 1 and 2 form a group."""
    return Formed(0.0, number, number, (1, 2), HERE, brought, states)


def applied(state: State, *workers: int) -> Applied:
    return Applied(0.0, 1, state, workers, HERE[: len(workers)])


BEGUN = state(0)
AHEAD, BEHIND = state(3), state(2)


def in_place(*facts: Fact, since: tuple[int, ...] = (1,)) -> type[Broken] | None:
    """Step 2 is committed, process 1 has applied step 3 and 2 has not; then ``facts`` happen."""
    return verdict(
        [
            generation(1, None),
            formed(1, (), BEGUN, BEGUN),
            applied(BEHIND, 1, 2),
            *good()[1:6],
            applied(AHEAD, 1),
            generation(2, FIRST, since),
            *facts,
        ]
    )


def test_all_may_go_on_from_the_furthest() -> None:
    assert in_place(formed(2, (AHEAD, BEHIND), AHEAD, AHEAD)) is None


def test_ranks_do_not_step_together_from_different_steps() -> None:
    assert in_place(formed(2, (AHEAD, BEHIND), AHEAD, BEHIND)) is SteppedApart


def test_ranks_do_not_step_together_from_states_of_different_groups() -> None:
    assert in_place(formed(2, (AHEAD,), AHEAD, state(3, run=9))) is SteppedApart


def test_nobody_goes_back_behind_what_a_rank_has_brought() -> None:
    assert in_place(formed(2, (AHEAD, BEHIND), BEHIND, BEHIND)) is LostStep


def test_what_a_living_process_had_applied_is_not_lost() -> None:
    assert in_place(formed(2, (BEHIND,), BEHIND, BEHIND)) is LostStep


def test_what_only_the_dead_had_applied_may_be_lost() -> None:
    assert in_place(Gone(0.0, 1, "killed"), formed(2, (BEHIND,), BEHIND, BEHIND)) is None


def test_workers_that_start_anew_may_go_back() -> None:
    back = replace(BEHIND, origin=FIRST.manifest)
    assert in_place(formed(2, (), back, back), since=()) is None


def test_what_is_committed_is_not_done_again_in_place() -> None:
    old, gone = state(1), (Gone(0.0, 1, "killed"), Gone(0.0, 2, "killed"))
    assert in_place(*gone, formed(2, (old,), old, old)) is RedidCommitted


def test_nobody_goes_on_beside_what_is_committed() -> None:
    beside = state(3, run=9)
    gone = (Gone(0.0, 1, "killed"), Gone(0.0, 2, "killed"))
    assert in_place(*gone, formed(2, (beside,), beside, beside)) is RedidCommitted


# ---------------------------------------------------------------- quarantine

BAR = Barred(1.0, 5, "a", "")
LIFT = replace(BAR, revision=6, lifted=True)


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ((BAR, replace(generation(3, SECOND), seen=5)), AskedTheBarred),
        ((BAR, replace(generation(3, SECOND), seen=4)), None),
        ((BAR, LIFT, replace(generation(3, SECOND), seen=6)), None),
        ((BAR, replace(applied(AHEAD, 1), at_s=30.0)), AskedTheBarred),
        ((BAR, replace(applied(AHEAD, 1), at_s=2.0)), None),
        ((BAR, LIFT, replace(applied(AHEAD, 1), at_s=30.0)), None),
    ],
    ids=["a place", "decided before", "lifted", "works on", "is about to stop", "works again"],
)
def test_who_is_in_quarantine_has_no_place_and_does_not_work(
    facts: tuple[Fact, ...], wanted: type[Broken] | None
) -> None:
    assert verdict([*good()[:11], *facts]) is wanted
