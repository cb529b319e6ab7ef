"""What is made of the steps that ranks were seen to make."""

from __future__ import annotations

from paddle_ft.chaos.report import (
    Result,
    Sample,
    Struck,
    as_record,
    judge,
    lines,
    quantile,
    summary,
)


def seen(group: int, start_s: float, begin: int, end: int, ranks: int = 2) -> list[Sample]:
    """A group that is made at ``start_s`` and makes a step every 0.1 s from 0.1 s later on."""
    found = []
    for rank in range(ranks):
        late_s = rank * 0.01
        found.append(Sample(start_s, (0, group), rank, -1))
        found.append(Sample(start_s + 0.05 + late_s, (0, group), rank, begin))
        for n, step in enumerate(range(begin + 1, end + 1)):
            found.append(Sample(start_s + 0.1 * (n + 1) + late_s, (0, group), rank, step))
    return found


KILL = Struck("kill-worker@1s", "rank 0", 1.05)


def test_recovery_in_place_does_no_step_again() -> None:
    samples = seen(1, 0.0, 0, 10) + seen(2, 1.15, 10, 20)
    (outcome,) = judge([KILL], samples)
    assert round(outcome.noticed_s or 0, 3) == 0.1
    assert round(outcome.recovered_s or 0, 3) == 0.21  # the slower of the two ranks
    assert outcome.redone_steps == 0


def test_recovery_from_a_checkpoint_does_steps_again() -> None:
    (outcome,) = judge([KILL], seen(1, 0.0, 0, 10) + seen(2, 4.0, 7, 20))
    assert outcome.redone_steps == 3
    assert round(outcome.recovered_s or 0, 2) == 3.06  # step 8 counts, though it is done again


def test_what_an_agent_wrote_down_is_a_notice() -> None:
    samples = seen(1, 0.0, 0, 10) + seen(2, 1.15, 10, 20)
    (outcome,) = judge([KILL], samples, [0.5, 1.06, 1.2])
    assert round(outcome.noticed_s or 0, 3) == 0.01


def test_one_rank_that_does_not_step_is_no_recovery() -> None:
    second = [s for s in seen(2, 1.15, 10, 20) if s.rank == 0 or s.step < 0]
    (outcome,) = judge([KILL], seen(1, 0.0, 0, 10) + second)
    assert outcome.recovered_s is None
    assert outcome.noticed_s is not None
    assert "| never |" in "\n".join(lines([outcome], 0.0, None))


def test_a_rank_that_has_not_come_to_its_group_is_no_recovery() -> None:
    second = [s for s in seen(2, 1.15, 10, 20) if s.rank == 0 or s.step < 0]
    third = seen(3, 9.0, 15, 20)
    (outcome,) = judge([KILL], seen(1, 0.0, 0, 10) + second + third)
    assert round(outcome.recovered_s or 0, 2) == 8.06


def test_a_fault_that_needs_no_new_group() -> None:
    stop = Struck("stop-worker@1s", "rank 0", 1.05)
    samples = seen(1, 0.0, 0, 10) + [
        Sample(3.0 + n / 10, (0, 1), rank, 11 + n) for n in range(3) for rank in (0, 1)
    ]
    (outcome,) = judge([stop], samples)
    assert outcome.noticed_s is None
    assert round(outcome.recovered_s or 0, 2) == 1.95
    assert outcome.redone_steps == 0
    assert "| no need |" in "\n".join(lines([outcome], 0.0, None))


def test_another_era_is_later_whatever_its_generation() -> None:
    again = [Sample(s.at_s, (1, s.group[1]), s.rank, s.step) for s in seen(1, 3.0, 9, 20)]
    (outcome,) = judge([KILL], seen(1, 0.0, 0, 10) + again)
    assert outcome.redone_steps == 1
    assert outcome.recovered_s is not None


def test_what_hit_nothing_is_not_counted() -> None:
    nothing = Struck("kill-worker@9s", "", 9.0, "the job had ended")
    outcomes = judge([KILL, nothing], seen(1, 0.0, 0, 10) + seen(2, 1.15, 10, 20))
    assert summary(outcomes) == "1 faults, 1 recovered: p50 0.21 s, p99 0.21 s; 0 steps redone"
    result = Result(0, 20, 12.0, "equal")
    told = list(lines(outcomes, 0.05, result))
    assert "nothing: the job had ended" in told[3]
    assert told[-1].endswith("weights: equal")
    assert as_record(outcomes, 0.05, result)["weights"] == "equal"


def test_quantiles() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert (quantile(ordered, 0.5), quantile(ordered, 0.99)) == (50.0, 99.0)
    assert quantile([3.0], 0.99) == 3.0
