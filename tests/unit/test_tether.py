"""A tethered child is the program itself, and dies with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import psutil

from paddle_ft.agent.tether import EXIT_CANNOT_EXEC, tethered


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(tethered(argv), capture_output=True, text=True, timeout=20)


def test_it_becomes_the_program_with_its_arguments_environment_and_exit_code() -> None:
    code = "import os, sys; print(os.getpid(), sys.argv[1:], os.environ['X']); sys.exit(7)"
    arguments = ["-W", "a b", "--", "-c"]
    child = subprocess.Popen(
        tethered([sys.executable, "-c", code, *arguments]),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "X": "y"},
    )
    out, _ = child.communicate(timeout=20)
    assert child.returncode == 7
    assert out == f"{child.pid} {arguments} y\n"


def test_it_ignores_no_signal_that_a_program_started_plainly_would_not() -> None:
    script = ["sh", "-c", "grep -E 'SigIgn|SigBlk' /proc/self/status"]
    plain = subprocess.run(script, capture_output=True, text=True, timeout=20, check=True)
    assert run(*script).stdout == plain.stdout


def test_a_program_that_is_not_there_is_named_in_one_sentence() -> None:
    result = run("no-such-program-of-paddle-ft", "x")
    assert result.returncode == EXIT_CANNOT_EXEC
    assert result.stderr == (
        "no-such-program-of-paddle-ft cannot be started: No such file or directory\n"
    )


def test_it_dies_when_the_parent_is_killed(wait_for: Callable[..., None]) -> None:
    script = textwrap.dedent("""
        import subprocess, time
        from paddle_ft.agent.tether import tethered
        child = subprocess.Popen(tethered(["sleep", "600"]))
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_for(lambda: child.name() == "sleep")
        parent.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_it_does_not_start_for_another_parent() -> None:
    """As when the parent ended before the child could ask to be told."""
    argv = tethered(["echo", "started"])
    between = [
        sys.executable,
        "-c",
        "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))",
    ]
    result = subprocess.run([*between, *argv], capture_output=True, text=True, timeout=20)
    assert result.stdout == ""
    assert result.returncode == 128 + signal.SIGKILL
