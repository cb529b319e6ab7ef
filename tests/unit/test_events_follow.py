"""``paddle-ft events --follow``: all events, also those around the change of the file."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.observe import cli
from paddle_ft.observe.events import FILE, OLDER, Event, EventLog


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "FOLLOW_S", 0.005)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path, "n0-1")
    yield log
    log.close()


def add(log: EventLog, *steps: int) -> None:
    for step in steps:
        log.add("progress", step=step)
    assert log.flush()


def take(events: Iterator[Event], count: int) -> list[int]:
    return [event.fields["step"] for event in itertools.islice(events, count)]


def test_it_tells_what_is_there_and_then_each_as_it_comes(tmp_path: Path, log: EventLog) -> None:
    add(log, 1, 2)
    with contextlib.closing(cli._follow(tmp_path / FILE)) as events:
        assert take(events, 2) == [1, 2]
        for step in (3, 4):
            add(log, step)
            assert take(events, 1) == [step]


def test_a_line_that_is_half_written_is_told_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / FILE
    one, two = (
        f'{{"run":"a","kind":"progress","wall_s":1,"at_s":1,"step":{n}}}\n'.encode() for n in (1, 2)
    )
    path.write_bytes(one + two[:20])
    with contextlib.closing(cli._follow(path)) as events:
        assert take(events, 1) == [1]
        with path.open("ab") as file:
            file.write(two[20:])
        assert take(events, 1) == [2]


def test_nothing_is_lost_when_the_file_becomes_the_older_one(tmp_path: Path, log: EventLog) -> None:
    add(log, 1)
    with contextlib.closing(cli._follow(tmp_path / FILE)) as events:
        assert take(events, 1) == [1]
        add(log, 2, 3)
        (tmp_path / FILE).rename(tmp_path / OLDER)
        add(log, 4)
        assert take(events, 3) == [2, 3, 4]


def test_it_waits_for_a_file_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts it before the launcher."""
    made: list[EventLog] = []

    def make(_: float) -> None:
        if not made:
            made.append(EventLog(tmp_path, "n0-1"))
            add(made[0], 1)

    monkeypatch.setattr(cli.time, "sleep", make)
    with contextlib.closing(cli._follow(tmp_path / FILE)) as events:
        assert take(events, 1) == [1]
    made[0].close()


def test_a_line_for_people(tmp_path: Path) -> None:
    told = {"number": 2, "members": ["a.1", "b.1"], "here": True, "reason": "node b joins"}
    line = cli.line_of(Event("a-1f", "generation", 1.25, 0.0, told))
    assert "a          generation     number 2, members a.1 b.1, here yes, node b joins" in line
