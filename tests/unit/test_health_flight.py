"""Stacks of living and stopped processes are had before they are ended, and told to people."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.health import flight
from paddle_ft.health.flight import Subject, kernel_view, process_state, save
from paddle_ft.health.judge import Row, Verdict
from paddle_ft.health.phases import COMPUTE, REDUCE, Call
from paddle_ft.health.stacks import path_of

SLEEPER = """
import sys, time
from pathlib import Path
from paddle_ft.health.stacks import install

def waits_for_ever():
    print("ready", flush=True)
    time.sleep(600)

if sys.argv[1]:
    install(Path(sys.argv[1]))
waits_for_ever()
"""


@pytest.fixture
def sleeper() -> Iterator[Callable[[str], int]]:
    """``sleeper(directory)``: pid of a process that hangs; "": it was never told of stacks."""
    started: list[subprocess.Popen[bytes]] = []

    def start(directory: str) -> int:
        command = [sys.executable, "-c", SLEEPER, directory]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


HUNG = [Verdict("hung", 1, 7, 2.0, "it has not come to collective 7, computes since 2.0 s")]


def test_stacks_of_who_waits_and_of_who_was_stopped(
    sleeper: Callable[[str], int], tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    pids = [sleeper(str(tmp_path)), sleeper(str(tmp_path))]
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: process_state(pids[1]) is not None and process_state(pids[1])[0] == "T")
    subjects = [
        Subject(Row(0, REDUCE, 7, True, 2.0, "idle"), pids[0], (Call(6, 1.0, 1.5), Call(7, 2, 0))),
        Subject(Row(1, COMPUTE, 6, False, 2.0, "stopped"), pids[1]),
    ]
    at = save(tmp_path / "log", tmp_path, "a/b", 3, subjects, HUNG)
    assert at.parent == tmp_path / "log" / "flight" and at.name.endswith("-gen3-a_b")
    for rank in (0, 1):
        assert "waits_for_ever" in (at / f"rank{rank}.stacks.txt").read_text()
    summary = (at / "summary.txt").read_text()
    assert "rank 1: hung; it has not come to collective 7" in summary
    assert "rank 0" in summary and "in collective 7" in summary and "not left" in summary
    whole = json.loads((at / "flight.json").read_text())
    assert whole["generation"] == 3 and "stopped" in whole["ranks"][1]["kernel"]["State"]


def test_a_process_that_cannot_be_asked_is_left_alone(
    sleeper: Callable[[str], int], tmp_path: Path
) -> None:
    """The signal would end it."""
    pid = sleeper("")
    at = save(tmp_path, tmp_path, "a", 1, [Subject(Row(1, COMPUTE), pid)], HUNG)
    assert process_state(pid) is not None
    assert "no Python stacks" in (at / "summary.txt").read_text()
    assert kernel_view(pid)["threads"][0]["name"]


def test_who_only_waits_stays_stopped_if_it_was(
    sleeper: Callable[[str], int], tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    pid = sleeper(str(tmp_path))
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: (process_state(pid) or ("",))[0] == "T")
    save(tmp_path, tmp_path, "a", 1, [Subject(Row(0, REDUCE, evidence="stopped"), pid)], HUNG)
    assert (process_state(pid) or ("",))[0] == "T"


def test_a_process_that_has_gone_costs_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert process_state(process.pid) is None
    path_of(tmp_path, process.pid).touch()
    at = save(tmp_path, tmp_path, "a", 1, [Subject(Row(1, COMPUTE), process.pid)], HUNG)
    assert (at / "flight.json").exists()


def test_only_the_last_records_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "RECORDS_MAX", 3)
    made = [save(tmp_path, tmp_path, "a", n, [], []) for n in range(10, 15)]
    assert sorted((tmp_path / "flight").iterdir()) == sorted(made)[-3:]


def test_processor_time_is_told(sleeper: Callable[[str], int], tmp_path: Path) -> None:
    state = process_state(os.getpid())
    assert state is not None and state[0] in "RS" and state[1] > 0
