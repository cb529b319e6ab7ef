"""A worker process starts as ``python script.py`` would, ends as documented, and never outlives its
parent (A1, A7)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.agent.bootstrap import LAUNCHER_VARIABLE
from tests.integration.session_world import ROOT

BOOTSTRAP = [sys.executable, "-u", "-m", "paddle_ft.agent.bootstrap"]
Wait = Callable[..., None]

TELL = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "cwd": os.getcwd(),
                  "file": __file__, "main": sys.modules["__main__"].__dict__ is globals(),
                  "mine": os.environ.get("MINE")}))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def bootstrap(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BOOTSTRAP, *arguments],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def script(directory: Path, text: str, name: str = "script.py") -> str:
    (directory / name).write_text(text)
    return str(directory / name)


def test_a_script_finds_what_python_would_give_it(tmp_path: Path) -> None:
    path = script(tmp_path, TELL)
    told = json.loads(bootstrap(path, "--a", "b c").stdout)
    plain = subprocess.run(
        [sys.executable, path, "--a", "b c"], capture_output=True, check=True, timeout=30
    )
    assert told == json.loads(plain.stdout)
    assert told["argv"] == [path, "--a", "b c"]


def test_a_module_too(tmp_path: Path) -> None:
    script(tmp_path, TELL, "a_module.py")
    told = json.loads(bootstrap("-m", "a_module", "x", cwd=tmp_path).stdout)
    assert told["name"] == "__main__"
    assert told["path"] == told["cwd"] == str(tmp_path)
    assert told["argv"] == [str(tmp_path / "a_module.py"), "x"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('so')", 1, "so"),
        ("raise KeyboardInterrupt", 130, ""),
        ("import paddle_ft as f; raise f.ConfigError('No.')", 2, "paddle_ft: No."),
        ("import paddle_ft as f; raise f.StoreFull('Full.')", 4, "paddle_ft: Full."),
        ("from paddle_ft.exits import Leave; raise Leave(76)", 76, ""),
        ("import os; os._exit(9)", 9, ""),
    ],
)
def test_exit_codes(tmp_path: Path, text: str, code: int, said: str) -> None:
    done = bootstrap(script(tmp_path, text))
    assert (done.returncode, done.stderr.strip()) == (code, said)


def test_an_exception_shows_the_scripts_lines_alone(tmp_path: Path) -> None:
    path = script(tmp_path, "def f():\n    1 / 0\n\nf()\n")
    done = bootstrap(path)
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert done.returncode == plain.returncode == 1
    assert done.stderr == plain.stderr


def test_output_and_clean_up_of_the_script_come_through_when_it_leaves(tmp_path: Path) -> None:
    text = (
        "import atexit, sys\nfrom paddle_ft.exits import Leave\n"
        "atexit.register(lambda: print('cleaned up'))\n"
        "sys.stdout.write('no newline')\nraise Leave(76)\n"
    )
    assert bootstrap(script(tmp_path, text)).stdout == "no newlinecleaned up\n"


@pytest.mark.parametrize("arguments", [[], ["--what"], ["-m"], ["/nonexistent/train.py"]], ids=str)
def test_what_cannot_be_run_is_told_in_one_line(arguments: list[str]) -> None:
    done = bootstrap(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("paddle_ft: ")


def test_a_worker_dies_with_its_parent(tmp_path: Path, wait_for: Wait) -> None:
    path = script(
        tmp_path,
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(100)\n",
    )
    starter = f"import subprocess, time; subprocess.Popen({[*BOOTSTRAP, path]!r}); time.sleep(100)"
    parent = subprocess.Popen([sys.executable, "-c", starter], env=environment())
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        worker = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{worker}").exists()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not running(worker))


def test_a_worker_whose_launcher_was_killed_before_it_ran_does_not_begin(tmp_path: Path) -> None:
    """By then its parent is another process, which would never end."""
    path = script(tmp_path, "print('it runs')\n")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid, said in ((gone.pid, ""), (os.getpid(), "it runs\n")):
        done = subprocess.run(
            [*BOOTSTRAP, path],
            env={**environment(), LAUNCHER_VARIABLE: str(pid)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode == 0, done.stdout) == (bool(said), said)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- warm spares


def order(tmp_path: Path) -> bytes:
    what = {"env": {"MINE": "yes"}, "argv": [script(tmp_path, TELL), "x"], "cwd": str(tmp_path)}
    return json.dumps(what).encode() + b"\n"


def spare(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*BOOTSTRAP, "--spare", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        **options,
    )


def check(told: dict[str, Any], tmp_path: Path) -> None:
    assert told["argv"] == [str(tmp_path / "script.py"), "x"]
    assert (told["mine"], told["cwd"], told["name"]) == ("yes", str(tmp_path), "__main__")
    assert told["path"] == str(tmp_path)


@pytest.mark.paddle
def test_a_spare_becomes_the_worker_it_is_told_to_be(tmp_path: Path) -> None:
    process = spare(stdin=subprocess.PIPE)
    output, _ = process.communicate(order(tmp_path), timeout=60)
    assert process.returncode == 0
    check(json.loads(output), tmp_path)


@pytest.mark.paddle
def test_a_spare_on_a_socket_says_when_it_is_ready_and_starts_at_once(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = spare(str(theirs.fileno()), pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(60)
        assert ours.recv(100) == b"ready\n"
        begun_s = time.monotonic()
        ours.sendall(order(tmp_path))
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - begun_s < 20  # it did not import paddle again
    assert process.returncode == 0
    check(json.loads(output), tmp_path)


@pytest.mark.paddle
def test_a_spare_that_is_not_needed_ends() -> None:
    process = spare(stdin=subprocess.PIPE)
    process.communicate(timeout=60)
    assert process.returncode == 0
