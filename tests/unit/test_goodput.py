"""Where the time of a job went: histories made by hand, and what people see of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paddle_ft import cli
from paddle_ft.errors import EXIT_PAUSED, ConfigError
from paddle_ft.observe import goodput
from paddle_ft.observe.events import FILE
from paddle_ft.observe.goodput import Account, account
from paddle_ft.observe.story import last_job
from paddle_ft.types import Event

ZERO_S = 1_000_000.0


class Launcher:
    """Tells the events of one launcher; its clock began ``boot_s`` before the job."""

    def __init__(self, run: str = "n0-1", boot_s: float = 100.0, skew_s: float = 0.0) -> None:
        self.events: list[Event] = []
        self._generation = 0
        self._run, self._boot_s, self._skew_s = run, boot_s, skew_s

    def tell(self, s: float, kind: str, **fields: Any) -> Launcher:
        wall_s = ZERO_S + s + self._skew_s
        self.events.append(Event(self._run, kind, wall_s, s + self._boot_s, fields))
        return self

    def start(self, s: float = 0.0) -> Launcher:
        return self.tell(s, "started", job="j").tell(s, "members", live=1, needed=1)

    def generation(
        self, s: float, number: int, restarts: int = 0, planned: bool = False
    ) -> Launcher:
        told = {"number": number, "restarts": restarts, "planned": planned, "reason": "why"}
        self._generation = number
        return self.tell(s, "generation", **told)

    def steps(
        self,
        generation: int,
        start_s: float,
        first: int,
        stop_s: float,
        last: int,
        held_s: float = 0,
    ) -> Launcher:
        """From the first step of a generation to its last."""
        self.tell(start_s, "first_step", generation=generation, step=first)
        told = {"generation": generation, "step": last, "held_s": held_s}
        return self.tell(stop_s, "progress", step_s=stop_s + self._boot_s, **told)

    def killed(self, s: float, rank: int = 1) -> Launcher:
        told = {"rank": rank, "exit_code": -9, "signal": 9, "stopped": False}
        told["generation"] = self._generation
        return self.tell(s, "worker_ended", **told)

    def finish(self, s: float) -> Launcher:
        self.tell(s, "outcome", exit_code=0, reason="done")
        return self.tell(s, "ended", exit_code=0, reason="done")


def told(*launchers: Launcher) -> Account:
    """The account of them, which must cover all of the time."""
    result = account([event for launcher in launchers for event in launcher.events])
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s)
    assert all(s >= 0 for s in result.seconds.values())
    return result


def spent(result: Account) -> dict[str, float]:
    """What is not zero, rounded."""
    return {c: round(s, 3) for c, s in result.seconds.items() if round(s, 3)}


def test_a_job_in_which_nothing_happens() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101, held_s=0.5).finish(13)
    result = told(job)
    assert spent(result) == {"startup": 2, "useful": 9.5, "checkpoint": 1.5}
    assert (result.goodput, result.steps, result.steps_redone) == (pytest.approx(9.5 / 13), 101, 0)
    assert (result.ended, result.faults) == (True, ())
    assert result.goodput_from_first_step == pytest.approx(9.5 / 11)


def test_what_comes_after_the_last_checkpoint_is_no_stall() -> None:
    job = Launcher().start().steps(1, 2, 1, 12, 101).tell(12.4, "farewell", why="done", rank=0)
    job.tell(12.5, "farewell", why="done", rank=1).finish(14)
    assert spent(told(job)) == {"startup": 3.5, "useful": 10, "checkpoint": 0.5}


def test_a_recovery_in_place() -> None:
    """The step that ends it is useful, and so does not count as recovery."""
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.killed(12.3).generation(12.4, 2, restarts=1).steps(2, 13.3, 102, 23.3, 202).finish(23.3)
    result = told(job)
    assert spent(result) == {"startup": 2, "useful": 20.1, "detection": 0.3, "recovery": 0.9}
    (fault,) = result.faults
    assert fault.reason == "rank 1 ended with signal 9"
    assert fault.wall_s == pytest.approx(ZERO_S + 12.3)
    assert (fault.detection_s, fault.recovery_s) == (pytest.approx(0.3), pytest.approx(0.9))
    assert (fault.steps_redone, fault.over) == (0, True)


def test_a_hang_is_noticed_when_it_is_named_and_not_when_the_process_is_ended() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.tell(13.4, "hung", rank=1, pid=7, generation=1, reason="its process is stopped")
    job.killed(13.8).generation(13.9, 2, restarts=1).steps(2, 14.1, 102, 15.1, 112).finish(15.1)
    result = told(job)
    assert spent(result)["detection"] == 1.4
    assert [f.reason for f in result.faults] == ["rank 1 hung: its process is stopped"]


def test_who_loses_a_peer_may_be_first_to_notice() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.tell(12.1, "lost_peer", rank=0, generation=1, reason="gone")
    job.tell(12.2, "trouble", generation=1, lost=[], collateral=True, reason="rank 0 lost a peer")
    job.killed(12.3)
    job.generation(12.4, 2, restarts=1).steps(2, 13.1, 102, 14.1, 112).finish(14.1)
    result = told(job)
    assert spent(result)["detection"] == 0.1
    assert [f.reason for f in result.faults] == ["rank 1 ended with signal 9"]


def test_a_restart_does_steps_again() -> None:
    """Steps 91 to 101 are done again, in 2 s, and hold one checkpoint stall of 10 %."""
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.killed(12.5).generation(12.6, 2, restarts=1)
    job.steps(2, 16, 91, 20, 111, held_s=0.4).finish(20)
    result = told(job)
    assert result.steps_redone == 11
    step_s = 13.6 / 120
    assert spent(result) == {
        "startup": 2,
        "useful": 10 + 1.8,
        "redone": pytest.approx(1.8 + step_s, abs=1e-3),
        "checkpoint": 0.4,
        "detection": 0.5,
        "recovery": pytest.approx(3.5 - step_s, abs=1e-3),
    }


def test_a_fault_before_the_recovery_from_another_is_over() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.killed(12.5).generation(12.6, 2, restarts=1).killed(13).generation(13.1, 3, restarts=2)
    job.steps(3, 15, 102, 16, 112).finish(16)
    result = told(job)
    assert (len(result.faults), spent(result)["detection"]) == (1, 0.5)
    assert spent(result)["recovery"] == pytest.approx(2.4, abs=0.01)


def test_a_planned_change_is_waiting() -> None:
    """A second node joins: once in place, and once the workers save, leave, and start anew."""
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.generation(12, 2, planned=True).steps(2, 12.5, 102, 14, 120)
    job.tell(14, "pause", generation=2, reason="joins")
    ended = {"rank": 0, "exit_code": EXIT_PAUSED, "signal": 0, "stopped": False}
    job.tell(14.2, "worker_ended", **ended).generation(14.3, 3).steps(3, 16, 121, 17, 131)
    result = told(job.finish(17))
    assert spent(result) == {"startup": 2, "useful": 12.5, "waiting": 2.5}
    assert result.faults == ()


def test_a_fault_during_a_planned_change() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.generation(12, 2, planned=True).killed(14).generation(14.1, 3, restarts=1)
    result = told(job.steps(3, 15, 102, 16, 112).finish(16))
    assert (spent(result)["waiting"], spent(result).get("detection")) == (2, None)
    assert spent(result)["recovery"] == pytest.approx(0.9, abs=0.01)


def test_too_few_nodes_is_waiting_and_not_recovery() -> None:
    """Also before the first step."""
    job = Launcher().start().tell(0, "members", live=1, needed=2)
    job.tell(5, "members", live=2, needed=2).generation(5, 1).steps(1, 7, 1, 17, 101)
    job.tell(17.2, "trouble", generation=1, lost=["b"], reason="node b is lost")
    job.tell(17.2, "members", live=1, needed=2).tell(30, "members", live=2, needed=2)
    job.generation(30, 2, restarts=1).steps(2, 31.2, 102, 32.2, 112).finish(32.2)
    result = told(job)
    assert spent(result)["waiting"] == pytest.approx(17.8)
    assert (spent(result)["startup"], spent(result)["detection"]) == (2, 0.2)
    assert spent(result)["recovery"] == pytest.approx(1.1)
    assert result.faults[0].reason == "node b is lost"


def test_several_nodes_with_clocks_of_their_own() -> None:
    """One launcher is killed: its log just ends. The other one goes on, with a spare.

    The machines were booted at other times; steps that both tell of count once.
    """
    a, b = Launcher("a-1").start(), Launcher("b-1", boot_s=7000).start()
    for one in (a, b):
        one.generation(0.5, 1).steps(1, 2, 1, 11.8, 99)
    a.steps(1, 2.01, 1, 12, 101, held_s=1)
    a.tell(12.2, "trouble", generation=1, lost=["b"], reason="node b is lost")
    a.generation(12.3, 2, restarts=1).steps(2, 13.2, 102, 23.2, 202).finish(24)
    result = told(a, b)
    assert spent(result) == {
        "startup": 2,
        "useful": pytest.approx(19.1, abs=0.01),
        "checkpoint": 1.8,
        "detection": 0.2,
        "recovery": pytest.approx(0.9, abs=0.01),
    }
    assert result.ended


def test_a_clock_that_goes_ahead_a_little_loses_no_fault() -> None:
    """The other machine's clock is half a second late: it tells of the fault late."""
    a, b = Launcher("a-1").start(), Launcher("b-1", skew_s=0.5).start()
    a.generation(0.5, 1).steps(1, 2, 1, 12, 101)
    b.generation(0.5, 1).killed(12.1).tell(12.1, "lost_peer", rank=1, generation=1, reason="")
    a.generation(12.2, 2, restarts=1).steps(2, 12.3, 102, 22.3, 202)
    a.generation(22.3, 3, restarts=1, planned=True).steps(3, 23.3, 203, 24.3, 213).finish(24.3)
    result = told(a, b)
    assert len(result.faults) == 1
    assert spent(result)["waiting"] == 1


def test_a_launcher_that_was_killed_and_started_again() -> None:
    """Nobody was there from 13 to 20; the job goes on from the checkpoint of step 90."""
    first = Launcher("n-1").start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    first.steps(1, 2, 1, 12.5, 106).tell(13, "members", live=1, needed=1)
    again = Launcher("n-2").start(20).generation(20.5, 1).steps(1, 23, 91, 24.6, 107).finish(24.6)
    result = told(first, again)
    assert spent(result)["absent"] == 7
    assert spent(result)["detection"] == 0.5
    assert spent(result)["recovery"] == pytest.approx(2.9)
    assert (result.steps_redone, result.faults[0].reason) == (16, "the launchers had gone")


def test_a_job_that_rests_until_it_is_started_again() -> None:
    first = Launcher("n-1").start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    first.tell(12, "leaving").tell(12.1, "members", live=0, needed=1)
    first.tell(12.6, "farewell", why="paused", rank=0).tell(13, "ended", exit_code=1)
    again = Launcher("n-2").start(20).generation(20.5, 1).steps(1, 23, 102, 24, 112).finish(24)
    result = told(first, again)
    assert spent(result) == {"startup": 5.4, "useful": 11, "checkpoint": 0.6, "absent": 7}
    assert result.faults == ()


def test_a_log_that_just_ends() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    assert spent(told(job)) == {"startup": 2, "useful": 10}
    assert not told(job).ended
    job.tell(15, "leader", member="a")
    assert spent(told(job))["useful"] == 13
    job.killed(16).generation(16.1, 2, restarts=1).tell(18, "leader", member="b")
    result = told(job)
    assert spent(result) == {"startup": 2, "useful": 10, "detection": 4, "recovery": 2}
    assert [f.over for f in result.faults] == [False]


def test_a_job_without_steps_only_starts() -> None:
    assert spent(told(Launcher().start().generation(0.5, 1).finish(4))) == {"startup": 4}


def test_who_goes_after_the_end_is_not_missed() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.tell(12.5, "outcome", exit_code=0, reason="done")
    job.tell(12.6, "trouble", generation=1, lost=["b"], reason="node b is lost")
    assert told(job.tell(12.7, "ended", exit_code=0)).faults == ()


def test_processes_in_reserve_and_those_we_end_are_no_faults() -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.tell(5, "worker_ended", rank=None, exit_code=1, signal=0, stopped=False)
    job.tell(6, "worker_ended", rank=0, exit_code=-9, signal=9, stopped=True)
    assert told(job.finish(12)).faults == ()


def test_a_directory_that_is_used_again_tells_of_the_last_job() -> None:
    old = Launcher("n-1").start().steps(1, 2, 1, 12, 101).finish(12)
    new = Launcher("n-2").start(20).steps(1, 21, 1, 22, 11)
    other = Launcher("m-1").tell(30, "started", job="other").steps(1, 31, 1, 32, 11)
    assert {e.run for e in last_job(old.events + new.events)} == {"n-2"}
    assert {e.run for e in last_job(old.events + new.events + other.events)} == {"m-1"}
    assert {e.run for e in last_job(old.events)} == {"n-1"}


# ---------------------------------------------------------------- what people see


def write(directory: Path, *launchers: Launcher) -> None:
    lines = [
        {"run": e.run, "kind": e.kind, "wall_s": e.wall_s, "at_s": e.at_s, **e.fields}
        for launcher in launchers
        for e in launcher.events
    ]
    directory.mkdir(exist_ok=True)
    (directory / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_commands(tmp_path: Path) -> None:
    job = Launcher().start().generation(0.5, 1).steps(1, 2, 1, 12, 101)
    job.killed(12.3).generation(12.4, 2, restarts=1).steps(2, 13.3, 102, 23.3, 202).finish(23.3)
    write(tmp_path / "log", job)
    run = CliRunner().invoke(cli.app, ["goodput", str(tmp_path / "log"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output) == goodput.to_json(account(job.events))
    shown = CliRunner().invoke(cli.app, ["goodput", str(tmp_path / "log")]).output
    assert "goodput 86.3 % (start-up and end 8.6 %, recovery 3.9 %, detection 1.3 %)" in shown
    assert "rank 1 ended with signal 9" in shown
    for flag in ("--log_dir", "--log-dir"):
        again = CliRunner().invoke(cli.app, ["goodput", flag, str(tmp_path / "log")]).output
        assert again == shown
    shown = CliRunner().invoke(cli.app, ["events", "--log_dir", str(tmp_path / "log")]).output
    assert len(shown.splitlines()) == len(job.events)
    assert "n0         worker ended   rank 1, exit code -9, signal 9, stopped no" in shown


@pytest.mark.parametrize("command", [["goodput"], ["events", "--log_dir"]])
def test_a_directory_without_events_is_named(tmp_path: Path, command: list[str]) -> None:
    run = CliRunner().invoke(cli.app, [*command, str(tmp_path)])
    assert isinstance(run.exception, ConfigError)
    assert str(tmp_path) in str(run.exception)
