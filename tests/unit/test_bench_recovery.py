"""What the benchmark of recovery reads out of step logs."""

from __future__ import annotations

import pytest

from bench.recovery_analysis import (
    Applied,
    completed,
    growth_pause,
    intervals,
    latest,
    longest_pause,
    parse,
    percentile,
    resumption,
    slowest_calm,
    useful_share,
)
from bench.recovery_report import load_told, row_of
from bench.recovery_trials import Outcome, Resumption, first_again


def steps(begin_s: float, first: int, count: int, world: int, pid: int = 10) -> list[Applied]:
    """``count`` steps of 50 ms on ``world`` ranks; the later ranks have each a little later."""
    return [
        Applied(begin_s + 0.05 * i + 0.001 * rank, rank, world, first + i, pid + rank)
        for i in range(count)
        for rank in range(world)
    ]


def test_a_line_that_was_cut_short_is_left_out() -> None:
    assert parse("1.5 0 2 7 99\n1.6 0 2 8 9") == [Applied(1.5, 0, 2, 7, 99)]
    assert parse("1.5 0 2\n") == []


def test_in_place_the_first_new_step_counts_once_all_ranks_have_it() -> None:
    before = steps(0.0, 1, 10, 2)
    after = steps(0.7, 11, 5, 2, pid=20)
    found = resumption(before + after, 0.48)
    assert found is not None
    assert found.new_s == pytest.approx(0.701 - 0.48)
    assert found.full_s == pytest.approx(found.new_s)
    assert found.redone == 0


def test_a_step_that_only_one_rank_has_is_not_there_yet() -> None:
    lines = [*steps(0.0, 1, 10, 2), Applied(0.7, 0, 2, 11, 10)]
    assert resumption(lines, 0.48) is None


def test_a_step_that_the_last_ranks_finish_after_the_signal_is_not_new() -> None:
    lines = steps(0.0, 1, 10, 2)[:-1]  # rank 0 has applied step 10, rank 1 has not
    lines.append(Applied(0.47, 1, 2, 10, 11))
    assert resumption(lines, 0.46) is None


def test_steps_after_a_checkpoint_are_redone_and_the_old_ones_are_not_new() -> None:
    before = steps(0.0, 1, 10, 2)
    after = steps(3.0, 8, 6, 2, pid=20)  # steps 8, 9, 10 once more; 11 is new
    found = resumption(before + after, 0.48)
    assert found is not None
    assert found.redone == 3
    assert found.new_s == pytest.approx(3.151 - 0.48)
    assert found.again_s == pytest.approx(3.001 - 0.48)


def test_a_smaller_world_resumes_before_it_is_whole_again() -> None:
    before = steps(0.0, 1, 10, 3)
    smaller = steps(1.0, 11, 20, 2)
    whole = steps(5.0, 31, 5, 3)
    found = resumption(before + smaller, 0.48)
    assert found is not None
    assert found.full_s is None
    found = resumption(before + smaller + whole, 0.48)
    assert found is not None
    assert found.new_s == pytest.approx(1.001 - 0.48)
    assert found.full_s == pytest.approx(5.002 - 0.48)


def test_nothing_is_said_of_a_job_that_had_not_begun() -> None:
    assert resumption(steps(1.0, 1, 5, 2), 0.5) is None


def test_a_step_that_is_done_again_is_completed_twice() -> None:
    lines = [*steps(0.0, 1, 2, 2), *steps(1.0, 2, 1, 2)]
    assert [step for _, step, _ in completed(lines)] == [1, 2, 2]


def test_the_latest_process_of_a_rank_is_named_within_the_present_world() -> None:
    assert latest(steps(0.0, 1, 3, 3) + steps(1.0, 4, 2, 2, pid=20)) == {0: 20, 1: 21}
    assert latest([]) == {}


def test_intervals_are_between_steps_that_follow_each_other_on_one_process() -> None:
    lines = [
        Applied(0.00, 0, 2, 1, 10), Applied(0.05, 0, 2, 2, 10), Applied(0.35, 0, 2, 4, 10),
        Applied(0.06, 1, 2, 2, 11),
    ]  # fmt: skip
    assert intervals(lines) == pytest.approx([0.05])


def test_the_longest_pause_is_that_of_the_ones_who_were_there() -> None:
    lines = [*steps(0.0, 1, 3, 1), Applied(0.5, 0, 2, 4, 10), Applied(9.5, 0, 2, 5, 99)]
    assert longest_pause(lines, {10}, -1.0) == pytest.approx(0.4)
    assert longest_pause(lines, {10}, 0.2) == 0.0


def test_only_the_pause_in_which_the_world_grew_is_that_of_a_join() -> None:
    alone = [Applied(0.0, 0, 1, 1, 10), Applied(9.0, 0, 1, 2, 10), Applied(9.4, 0, 2, 3, 10)]
    lines = [*alone, Applied(12.0, 0, 2, 4, 10), Applied(13.0, 0, 1, 5, 10)]
    assert growth_pause(lines, {10}, -1.0) == pytest.approx(0.4)
    assert growth_pause(lines, {10}, 9.2) == growth_pause(lines, {11}, -1.0) == 0.0


def test_work_that_is_done_again_or_on_fewer_ranks_is_worth_less() -> None:
    whole = steps(0.01, 1, 20, 2)
    assert useful_share(whole, 0.0, 1.0, 0.05, 2) == pytest.approx(1.0)
    redone = steps(0.01, 1, 10, 2) + steps(0.51, 1, 10, 2)
    assert useful_share(redone, 0.0, 1.0, 0.05, 2) == pytest.approx(0.5)
    alone = steps(0.01, 1, 20, 1)
    assert useful_share(alone, 0.0, 1.0, 0.05, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(("share", "value"), [(0.5, 5.0), (0.99, 10.0), (0.1, 1.0), (0.0, 1.0)])
def test_percentiles_are_values_that_were_measured(share: float, value: float) -> None:
    assert percentile([float(x) for x in range(10, 0, -1)], share) == value


def outcome(new_s: list[float], redone: int = 0, failures: int = 0) -> Outcome:
    found = [Resumption(s, redone, s) for s in new_s]
    return Outcome("g", "paddle_ft", "s", 2, found, failures, 20.0, [0.05], goal_s=(0.15, 0.5))


def test_a_goal_is_of_the_time_beyond_a_step_and_without_loss() -> None:
    assert outcome([0.19] * 9 + [0.5]).reached is True
    assert outcome([0.21] * 10).reached is False
    assert outcome([0.19] * 9 + [0.6]).reached is False
    assert outcome([0.19] * 10, redone=1).reached is False
    assert outcome([0.19] * 10, failures=1).reached is False
    assert outcome([]).reached is None


def test_who_starts_anew_is_to_step_again_in_time_and_may_do_steps_again() -> None:
    found = [Resumption(0.7, 8, 0.7, again_s) for again_s in (0.2, 0.29, 0.9)]
    anew = Outcome("g", "paddle_ft", "s", 2, found, 0, 20.0, [0.05], goal_s=(0.3, 1.0), anew=True)
    assert anew.reached is True
    assert "p50 0.290 s" in first_again(anew)
    found[1] = Resumption(0.7, 8, 0.7, 0.31)
    assert anew.reached is False
    assert first_again(outcome([0.19])) == ""


def test_failures_stand_in_the_table() -> None:
    assert "| **2** (> 20 s) |" in row_of(outcome([0.2], failures=2))
    assert "| never |" in row_of(outcome([], failures=2))
    one = outcome([])
    one.not_run = "not run: no such thing"
    rows = {
        row_of(one).count("|"),
        row_of(outcome([])).count("|"),
        row_of(outcome([1.0])).count("|"),
    }
    assert len(rows) == 1
    assert "not run" in row_of(one)


def test_a_busy_machine_is_named() -> None:
    assert "say little" in load_told([9.0, 10.0, 8.0], 2, 100.0)
    assert "say little" not in load_told([1.0, 2.0, 1.5], 2, 100.0)


def test_the_slowest_step_is_that_of_all_undisturbed_ones() -> None:
    calm = steps(0.0, 1, 10, 2) + [Applied(0.6 + 0.001 * r, r, 2, 11, 10 + r) for r in (0, 1)]
    assert slowest_calm(calm, ()) == pytest.approx(0.15), "step 11, not the first ones"
    hurt = calm + [Applied(1.5, r, 2, 12, 10 + r) for r in (0, 1)]
    assert slowest_calm(hurt, ()) == pytest.approx(0.9)
    assert slowest_calm(hurt, [(0.7, 1.4)]) == pytest.approx(0.15)
    newcomer = [Applied(1.5 + 0.3 * i, r, 2, 12 + i, 10 + 5 * r) for i in (0, 1) for r in (0, 1)]
    assert slowest_calm(calm + newcomer, [(0.7, 1.4)]) == pytest.approx(0.15), "it warms up"
