"""A script without the launcher: it saves, resumes and stops on its own (A4, A8)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddle_ft import checkpoint
from tests.integration.session_world import ROOT, TRAIN, Result, Workers, succeeded

pytestmark = pytest.mark.paddle
Wait = Callable[..., None]
PLAIN = [sys.executable, "-u", str(TRAIN)]


def options(directory: Path, save: str = "never", **more: Any) -> dict[str, Any]:
    return {"session": {"checkpoint": str(directory), "save": save}, **more}


def alone(world_size: int = 1, **more: Any) -> list[Result]:
    with Workers(world_size, command=PLAIN, **more) as workers:
        return workers.results()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the script ended without {text}")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_when_stopped_it_saves_and_goes_on_from_there(tmp_path: Path, number: int) -> None:
    undisturbed = succeeded(alone())
    with Workers(1, command=PLAIN, **options(tmp_path, step_s=0.1)) as workers:
        read_until(workers.processes[0], '"step": 4')
        workers.processes[0].send_signal(number)
        (stopped,) = workers.results()
    assert stopped.code == 128 + number
    assert "Traceback" not in stopped.errors
    (step,) = checkpoint.steps(str(tmp_path))
    assert 4 <= step < 14
    (resumed,) = succeeded(alone(**options(tmp_path)))
    assert resumed.events("begin")[0]["step"] == step
    assert resumed.end["all"] == undisturbed[0].end["all"]
    assert checkpoint.steps(str(tmp_path))[-1] == 14


def test_it_saves_by_its_rule_and_when_asked(tmp_path: Path, wait_for: Wait) -> None:
    more = options(tmp_path, save="SIGUSR1", step_s=0.1, epochs=20)
    with Workers(1, command=PLAIN, **more) as workers:
        read_until(workers.processes[0], '"step": 2')
        workers.processes[0].send_signal(signal.SIGUSR1)
        wait_for(lambda: checkpoint.steps(str(tmp_path)))


def test_ctrl_c_twice_ends_at_once_without_saving(tmp_path: Path, wait_for: Wait) -> None:
    with Workers(1, command=PLAIN, **options(tmp_path, step_s=5.0)) as workers:
        read_until(workers.processes[0], '"step": 1')
        process = workers.processes[0]
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        while "once more Ctrl-C" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        (result,) = workers.results()
    assert result.code in (130, -signal.SIGINT)
    assert checkpoint.steps(str(tmp_path)) == []


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    (result,) = alone(**options(blocked / "below"))
    assert result.code in (2, 4)
    assert "Traceback" not in result.errors
    said = [line for line in result.errors.splitlines() if line.startswith("paddle_ft: ")]
    assert len(said) == 1
    assert str(blocked) in said[0]


@pytest.mark.slow
def test_two_ranks_save_once_and_both_resume(tmp_path: Path) -> None:
    """As under ``paddle.distributed.launch``; rank 0 saves for both."""
    more = options(tmp_path, save="3 steps", epochs=1)
    succeeded(alone(2, **more))
    assert checkpoint.steps(str(tmp_path))[-1] == 7
    resumed = succeeded(alone(2, **options(tmp_path)))
    assert [result.events("begin")[0]["step"] for result in resumed] == [7, 7]
    assert [result.end["step"] for result in resumed] == [14, 14]


def test_under_paddles_own_launcher(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"),
        *("--log_dir", str(tmp_path / "log"), str(TRAIN)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PFT_TEST": '{"epochs": 1}'}
    done = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = "".join(p.read_text() for p in (tmp_path / "log").glob("workerlog.*"))
    assert logs.count('"event": "end"') == 2
    assert logs.count('"world": 2') == 2
