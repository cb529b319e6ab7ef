"""What the monitor learns from boards, and from whom it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paddle_ft.agent.beacon import Beacon
from paddle_ft.health import board as board_module
from paddle_ft.health.board import Board
from paddle_ft.health.judge import Usual
from paddle_ft.health.monitor import _GroupWatch, _Known
from paddle_ft.health.phases import COMPUTE


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: now[0])
    return now


class Pair:
    """Two ranks of this node that step together."""

    def __init__(self, directory: Path, clock: list[float]) -> None:
        paths = {rank: directory / f"page-{rank}" for rank in (0, 1)}
        for path in paths.values():
            Beacon.create(path)
        self.boards = [Board(path) for path in paths.values()]
        self.known = _Known(1, dict.fromkeys(paths, os.getpid()), paths)
        self.usual = Usual(1.0, 600.0)
        self.watch = _GroupWatch(self.known, self.usual)
        self.clock = clock

    def step(self, seconds: float, slower: float = 1.0) -> None:
        for board in self.boards:
            board.loose = False
            board.enter(COMPUTE)
        self.clock[0] += seconds
        self.boards[0].call()
        self.clock[0] += seconds * (slower - 1.0)
        self.boards[1].call()
        for board in self.boards:
            board.called()
            board.step(0.5)
        self.watch.look(self.known, 0.1)


@pytest.fixture
def pair(tmp_path: Path, clock: list[float]) -> Pair:
    return Pair(tmp_path, clock)


def test_it_learns_what_a_step_takes_and_who_is_slow(pair: Pair) -> None:
    for _ in range(25):
        pair.step(0.1)
    assert pair.usual.slowest_s == pytest.approx(0.1)
    assert pair.watch.changes() == []
    for _ in range(20):
        pair.step(0.1, slower=1.3)
    ((text, fields),) = pair.watch.changes()
    assert fields == {"rank": 1, "slower": 0.3} and "rank 1 is slow" in text
    assert [(v.kind, v.rank) for v in pair.watch.slow_verdicts()] == [("slow", 1)]
    for _ in range(20):
        pair.step(0.1)
    ((text, fields),) = pair.watch.changes()
    assert fields["slower"] == 0 and "keeps up again" in text


def test_nothing_is_learnt_of_a_step_in_which_a_rank_hung(pair: Pair) -> None:
    for _ in range(10):
        pair.step(0.1)
    pair.watch.accused = True
    pair.step(30.0)
    assert pair.usual.slowest_s == pytest.approx(0.1)


def test_a_rank_is_still_since_it_wrote_last_not_since_it_was_looked_at(pair: Pair) -> None:
    pair.step(0.1)
    pair.boards[0].enter(COMPUTE)
    pair.clock[0] += 0.07
    pair.watch.look(pair.known, 0.1)
    assert pair.watch.ranks[0].row.still_s == pytest.approx(0.07)
    pair.boards[0].call()
    pair.clock[0] += 60.0  # the machine slept
    pair.watch.look(pair.known, 0.3)
    assert pair.watch.ranks[0].row.still_s == pytest.approx(0.3)


def test_a_rank_is_still_only_while_it_is_looked_at(pair: Pair) -> None:
    pair.step(0.1)
    for _ in range(10):
        pair.watch.look(pair.known, 0.1)
    row = pair.watch.ranks[0].row
    assert row.still_s == pytest.approx(1.0) and row.evidence == "busy" and row.alive
    pair.step(0.1)
    assert pair.watch.ranks[0].row.still_s == 0.0 and pair.watch.ranks[0].row.evidence == ""
