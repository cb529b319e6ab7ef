"""Who is blamed for a hang, and who never is (A6)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from paddle_ft.health.judge import (
    ASIDE_MIN_S,
    BUSY_PATIENCE,
    DOUBT_PATIENCE,
    IDLE_MORE_S,
    Row,
    Usual,
    Waiting,
    find_hung,
    missing_at,
    next_bound_s,
    patience_after,
)
from paddle_ft.health.phases import (
    COMPUTE,
    DATA,
    JOINING,
    LOADING,
    NOTHING,
    OPTIMIZER,
    OUTSIDE,
    OVER,
    REDUCE,
    SAVING,
    Step,
)

TIGHT_S = 3 * 0.1 + 1.0


def step(total_s: float = 0.1, **times: float) -> Step:
    zero = dict.fromkeys(("busy_s", "reduce_s", "data_s", "outside_s", "saving_s"), 0.0)
    return Step(number=1, total_s=total_s, share=0.5, **{**zero, **times})


@pytest.fixture
def usual() -> Usual:
    usual = Usual(floor_s=1.0, cap_s=600.0)
    for ordinal, total_s in enumerate([9.0, 2.0, 0.05, 0.1, 0.07, 0.06, 0.08]):
        usual.learn(step(total_s), ordinal)
    return usual


WAITS = Row(0, REDUCE, entered=7, inside=True, still_s=5.0)
MISSES = Row(1, COMPUTE, entered=6, still_s=5.0, evidence="idle")


def test_the_bound_is_learnt_without_the_first_steps(usual: Usual) -> None:
    assert usual.slowest_s == 0.1
    assert usual.tight_s == pytest.approx(TIGHT_S)
    assert Usual(1.0, 600.0).tight_s == 600.0
    usual.learn(step(50.0, outside_s=49.95), 8)  # it evaluated
    assert usual.tight_s == pytest.approx(TIGHT_S)
    usual.learn(step(1000.0), 9)
    assert usual.tight_s == 600.0


def test_who_did_not_arrive_is_blamed_and_who_waits_is_not(usual: Usual) -> None:
    (verdict,) = find_hung([WAITS, MISSES], [], usual)
    assert (verdict.kind, verdict.rank, verdict.collective) == ("hung", 1, 7)
    assert "not come to collective 7" in verdict.reason and "computes" in verdict.reason


@pytest.mark.parametrize(
    ("evidence", "bound_s"),
    [
        ("stopped", TIGHT_S),
        ("idle", TIGHT_S + IDLE_MORE_S),
        ("busy", BUSY_PATIENCE * (TIGHT_S + IDLE_MORE_S)),
    ],
)
def test_nobody_is_blamed_before_its_time(usual: Usual, evidence: str, bound_s: float) -> None:
    row = replace(MISSES, evidence=evidence)
    assert not find_hung([WAITS, replace(row, still_s=bound_s - 0.01)], [], usual)
    assert find_hung([WAITS, replace(row, still_s=bound_s + 0.01)], [], usual)


def test_a_stopped_process_is_blamed_wherever_it_stopped(usual: Usual) -> None:
    for phase in (NOTHING, JOINING, LOADING, DATA, REDUCE, OPTIMIZER, OUTSIDE, SAVING):
        row = Row(1, phase, entered=7, inside=phase == REDUCE, still_s=2.0, evidence="stopped")
        (verdict,) = find_hung([WAITS, row], [], usual)
        assert verdict.rank == 1 and "stopped" in verdict.reason
    assert not find_hung([Row(1, OVER, still_s=1e6, evidence="stopped")], [], usual)


def test_before_anything_is_learnt_a_stopped_process_gets_some_seconds() -> None:
    usual, row = Usual(1.0, 600.0), Row(0, NOTHING, evidence="stopped")
    assert not find_hung([replace(row, still_s=9.0)], [], usual)
    assert find_hung([replace(row, still_s=11.0)], [], usual)


def test_all_in_one_collective_blames_nobody(usual: Usual) -> None:
    rows = [replace(WAITS, rank=r, still_s=1e6, evidence="idle") for r in range(3)]
    assert not find_hung(rows, [], usual)


def test_evaluation_and_data_have_bounds_of_their_own(usual: Usual) -> None:
    for phase in (DATA, OUTSIDE, SAVING):
        row = Row(1, phase, entered=6, still_s=599.0, evidence="idle")
        assert not find_hung([WAITS, row], [], usual), "nothing was seen of it yet"
        assert find_hung([WAITS, replace(row, still_s=600.0)], [], usual)
    for ordinal in range(5):
        usual.learn(step(20.0, outside_s=19.0), 10 + ordinal)
    bound_s = 3 * 19.0 + 1.0
    row = Row(1, OUTSIDE, entered=6, still_s=bound_s - 0.1, evidence="idle")
    assert not find_hung([WAITS, row], [], usual)
    assert find_hung([WAITS, replace(row, still_s=bound_s + 0.1)], [], usual)
    for ordinal in range(5):
        usual.learn(step(data_s=0.01), 20 + ordinal)
    row = Row(1, DATA, entered=6, still_s=ASIDE_MIN_S - 0.1, evidence="idle")
    assert not find_hung([WAITS, row], [], usual)


def test_who_is_slow_to_start_is_given_time(usual: Usual) -> None:
    joins = Row(0, JOINING, still_s=60.0)
    assert not find_hung([joins, Row(1, NOTHING, still_s=60.0, evidence="idle")], [], usual)
    assert missing_at([joins, Row(1, NOTHING, still_s=60.0)], []) != []


def test_a_node_hears_that_others_wait_for_its_rank(usual: Usual) -> None:
    assert not find_hung([MISSES], [], usual)
    (verdict,) = find_hung([MISSES], [Waiting(7, 1.0)], usual)
    assert (verdict.rank, verdict.collective) == (1, 7)
    assert not find_hung([MISSES], [Waiting(6, 1.0)], usual), "it was there"


def test_two_that_do_not_come_get_more_time_unless_one_is_stopped(usual: Usual) -> None:
    two = [WAITS, MISSES, replace(MISSES, rank=2)]
    assert not find_hung(two, [], usual)
    late = [replace(r, still_s=DOUBT_PATIENCE * TIGHT_S + 0.1) for r in two]
    assert {v.rank for v in find_hung(late, [], usual)} == {1, 2}
    late[2] = replace(late[2], evidence="stopped", still_s=0.5)
    assert not find_hung(late, [], usual)
    late[2] = replace(late[2], still_s=TIGHT_S + 0.1)
    assert {v.rank for v in find_hung(late, [], usual)} == {2}


def test_the_dead_are_not_ended_again(usual: Usual) -> None:
    assert not find_hung([WAITS, replace(MISSES, alive=False)], [], usual)
    assert not find_hung([replace(MISSES, evidence="stopped", alive=False)], [], usual)


def test_patience_grows_when_somebody_was_ended_who_might_have_come(usual: Usual) -> None:
    assert patience_after(usual, [replace(MISSES, evidence="stopped")]) == 1.0
    usual.patience = patience_after(usual, [MISSES])
    assert usual.patience == 2.0
    assert not find_hung([WAITS, replace(MISSES, still_s=TIGHT_S * 1.9)], [], usual)
    for ordinal in range(600):
        usual.learn(step(), 10 + ordinal)
    assert usual.patience == 1.0


def test_a_hundred_hangs_at_random_places_name_the_right_rank(usual: Usual) -> None:
    for seed in range(100):
        chance = random.Random(seed)
        world, number = chance.randrange(2, 9), chance.randrange(1, 1000)
        culprit = chance.randrange(world)
        rows = []
        for rank in range(world):
            if rank == culprit:
                inside = chance.random() < 0.3
                phase = REDUCE if inside else chance.choice([DATA, COMPUTE, OPTIMIZER, OUTSIDE])
                entered = number if inside else number - 1
                row = Row(rank, phase, entered, inside, evidence="stopped")
            else:
                row = Row(rank, REDUCE, number, True, evidence="idle")
            rows.append(replace(row, still_s=TIGHT_S + chance.random()))
        assert [v.rank for v in find_hung(rows, [], usual)] == [culprit], seed


def test_the_next_look_comes_when_the_next_bound_is_over(usual: Usual) -> None:
    rows = [Row(0, REDUCE, 7, True, 0.2), Row(1, COMPUTE, 6, still_s=TIGHT_S - 0.03)]
    assert next_bound_s(rows, usual) == pytest.approx(0.03)
    over = Row(1, COMPUTE, 6, still_s=TIGHT_S + 0.01, evidence="idle")
    assert next_bound_s([over], usual) == pytest.approx(IDLE_MORE_S - 0.01), "it may be about to"
    assert next_bound_s([replace(over, still_s=1e9)], usual) == float("inf")
