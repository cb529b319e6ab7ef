"""When a checkpoint is due, what a vote decides, and where the data stands."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paddle_ft import sampling
from paddle_ft.errors import CheckpointMismatch, ConfigError
from paddle_ft.policies import NEVER, EveryNSteps, EverySeconds
from paddle_ft.progress import Ballot, Position, Schedule, Verdict


def verdict(*ballots: Ballot) -> Verdict:
    sums = np.sum([ballot.to_numbers() for ballot in ballots], axis=0).tolist()
    return Verdict.of(sums, len(ballots), ballots[0].step)


def test_by_steps_a_checkpoint_stays_due_until_one_is_taken() -> None:
    schedule = Schedule(EveryNSteps(3))
    assert [schedule.due(step, 0.0) for step in range(1, 6)] == [False, False, True, True, True]
    schedule.saved(4, 0.0)
    assert [schedule.due(step, 0.0) for step in range(5, 8)] == [False, True, True]


def test_by_time() -> None:
    schedule = Schedule(EverySeconds(10.0), saved_at_s=100.0)
    assert not schedule.due(5, 109.9)
    assert schedule.due(5, 110.0)
    schedule.saved(5, 111.0)
    assert not schedule.due(6, 120.0)


def test_nothing_is_due_without_a_rule() -> None:
    assert not Schedule(NEVER).due(10**6, 1e9)


def test_one_rank_that_wants_to_save_is_enough_and_one_without_a_buffer_prevents_it() -> None:
    assert verdict(Ballot(4, due=True), Ballot(4)).save
    assert not verdict(Ballot(4, due=True), Ballot(4, busy=True)).save
    assert not verdict(Ballot(4), Ballot(4)).save


def test_one_rank_that_is_asked_to_pause_is_enough_even_without_a_buffer() -> None:
    assert verdict(Ballot(4, busy=True), Ballot(4, pause=True)).pause


def test_gradients_are_counted() -> None:
    assert verdict(Ballot(1, present=(1, 0)), Ballot(1, present=(1, 1))).present == (2, 1)


@pytest.mark.parametrize("other", [Ballot(5), Ballot(3)])
def test_ranks_out_of_step_are_an_error(other: Ballot) -> None:
    with pytest.raises(ConfigError, match="different steps"):
        verdict(Ballot(4), other)


def test_a_position_survives_json() -> None:
    position = Position(step=3)
    position.plan = sampling.Stream(10, 4, 2, True, 7)
    position.advance(sampling.Batch(0, 0, 4, False))
    meta = json.loads(json.dumps(position.to_meta()))
    assert Position.from_meta(meta, 3) == position
    assert position.steps_total() == 3 + 5


@pytest.mark.parametrize("meta", [{}, {"step": 4}, {"step": 3, "huh": 1}, {"step": 3, "plan": [1]}])
def test_a_checkpoint_without_a_position_is_refused(meta: dict[str, object]) -> None:
    with pytest.raises(CheckpointMismatch, match="step 3 does not say where in the data"):
        Position.from_meta(meta, 3)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (sampling.Stream(11, 4, 2, True, 7), "10 samples, and now it is 11"),
        (sampling.Stream(10, 4, 2, True, 8), "7 as seed, and now it is 8"),
        (sampling.Stream(10, 4, 2, False, 7), "True as shuffle, and now it is False"),
    ],
)
def test_another_dataset_seed_or_shuffle_is_refused(plan: sampling.Stream, said: str) -> None:
    position = Position(step=3, plan=sampling.Stream(10, 4, 2, True, 7))
    with pytest.raises(CheckpointMismatch, match=said):
        position.check(plan)


def test_another_batch_size_and_more_epochs_are_welcome() -> None:
    position = Position(step=3, plan=sampling.Stream(10, 4, 2, True, 7))
    position.check(sampling.Stream(10, 5, 20, True, 7))


def test_the_end_is_told_in_steps_when_batches_are_accumulated() -> None:
    """30 batches, three to a step, of which two steps are done."""
    position = Position(step=2, batch=6, epoch=0, offset=24)
    position.plan = sampling.Stream(120, 4, 1, False, 0)
    assert position.steps_total() == 10
    begun = Position(plan=position.plan)
    assert begun.steps_total() == 30, "not known yet"


def test_the_number_of_logical_shards_stays_what_it_was() -> None:
    position = Position()
    position.divide(4)
    position.step = 3
    position.divide(4)
    again = Position.from_meta(json.loads(json.dumps(position.to_meta())), 3)
    for other, told in ((6, "with reproducible=4, .* has reproducible=6"), (0, "has it off")):
        with pytest.raises(CheckpointMismatch, match=told):
            again.divide(other)
    with pytest.raises(CheckpointMismatch, match="step 1 with it off, .* reproducible=2"):
        Position(step=1).divide(2)
