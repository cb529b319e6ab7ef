"""A rank's board: what its agent reads is what the rank has written, whole or not at all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from paddle_ft.agent.beacon import Beacon
from paddle_ft.health import board as board_module
from paddle_ft.health.board import CALLS_MAX, STEPS_MAX, Board, BoardReader
from paddle_ft.health.phases import (
    COMPUTE,
    DATA,
    LOOSE,
    NAMES,
    NOTHING,
    OPTIMIZER,
    OUTSIDE,
    OVER,
    REDUCE,
    SAVING,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Beacon.create(tmp_path / "page")
    return tmp_path / "page"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose hand the test moves."""
    now = [100.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now[0])
    return now


def test_a_page_that_nobody_wrote_says_nothing(path: Path) -> None:
    reader = BoardReader(path)
    look = reader.look()
    assert (look.phase, look.entered, look.left, look.inside) == (NOTHING, 0, 0, False)
    assert reader.calls() == () and reader.new_steps() == ()
    assert len(NAMES) == OVER + 1


def test_times_of_a_step_are_told_apart(path: Path, clock: list[float]) -> None:
    board, reader = Board(path), BoardReader(path)
    board.loose = False

    def spend(phase: int, seconds: float) -> None:
        board.enter(phase)
        clock[0] += seconds

    spend(SAVING, 0.5)
    spend(DATA, 0.25)
    spend(COMPUTE, 1.0)
    spend(REDUCE, 0.125)  # fills its buckets
    for seconds in (2.0, 0.5):
        board.call()
        clock[0] += seconds
        board.called()
    spend(OPTIMIZER, 0.125)
    board.step(0.5)
    assert reader.look().phase == OUTSIDE
    (step,) = reader.new_steps()
    assert (step.total_s, step.busy_s, step.reduce_s) == (4.5, 1.5, 2.5)
    assert (step.data_s, step.outside_s, step.saving_s, step.share) == (0.25, 0.0, 0.5, 0.5)
    assert step.number == 3
    clock[0] += 7.0
    spend(COMPUTE, 1.0)
    board.step(0.5)
    (step,) = reader.new_steps()
    assert (step.total_s, step.busy_s, step.outside_s) == (8.0, 1.0, 7.0)


def test_it_is_seen_inside_of_the_collective_that_it_does_not_leave(
    path: Path, clock: list[float]
) -> None:
    board, reader = Board(path), BoardReader(path)
    board.enter(REDUCE)
    board.call()
    board.called()
    clock[0] += 1.0
    board.call()
    look = reader.look()
    assert (look.phase, look.entered, look.left, look.inside) == (REDUCE, 2, 1, True)
    one, two = reader.calls()
    assert (one.number, two.number, two.entered_s, two.left_s) == (1, 2, 101.0, 0.0)


def test_rings_keep_the_last_ones(path: Path) -> None:
    board, reader = Board(path), BoardReader(path)
    for _ in range(3 * CALLS_MAX):
        board.call()
        board.called()
    assert [c.number for c in reader.calls()] == list(range(2 * CALLS_MAX + 1, 3 * CALLS_MAX + 1))
    for _ in range(5):
        board.step(1.0)
    assert len(reader.new_steps()) == 5
    for _ in range(3 * STEPS_MAX):
        board.step(1.0)
    assert len(reader.new_steps()) == STEPS_MAX - 1
    assert reader.new_steps() == ()


def test_an_entry_that_is_being_written_is_left_out(path: Path) -> None:
    board, reader = Board(path), BoardReader(path)
    for _ in range(3):
        board.call()
        board.called()
    board._words[board_module._CALLS + 2 * board_module._CALL_WORDS] = 0.0
    assert [call.number for call in reader.calls()] == [1, 3]


def test_another_group_has_another_page(path: Path, tmp_path: Path) -> None:
    board = Board(path)
    board.call()
    Beacon.create(tmp_path / "next")
    board.move(tmp_path / "next")
    board.enter(COMPUTE)
    board.call()
    assert BoardReader(path).look().phase == NOTHING
    look = BoardReader(tmp_path / "next").look()
    assert (look.phase, look.entered, look.left) == (COMPUTE, 1, 0)


def test_without_a_launcher_it_is_kept_for_itself() -> None:
    board = Board()
    for phase in itertools.islice(itertools.cycle((DATA, COMPUTE)), 9):
        board.enter(phase)
    board.step(1.0)
    assert board.phase == LOOSE


def test_the_reader_cannot_write(path: Path) -> None:
    with pytest.raises(TypeError, match="read-only"):
        BoardReader(path)._words[0] = 1.0
