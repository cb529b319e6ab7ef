"""A launcher in odd surroundings: terminals that went, names and paths nobody expected (A1)."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from paddle_ft.agent.beacon import Reading
from paddle_ft.agent.console import Console, Progress
from tests.integration.jobs import FAST_ETCD, TINY, Launcher

pytestmark = [pytest.mark.timeout(120)]

LEAVES_A_CHILD_AND_GOES = """
import os
import sys
import time
import paddle
import paddle_ft as ft

model = paddle.nn.Linear(2, 1)
optimizer = paddle.optimizer.SGD(parameters=model.parameters())
assert "MASTER_ADDR" not in os.environ
assert os.environ["GLOO_SOCKET_IFNAME"] == "lo", "where gloo listens is left to the host's name"
with ft.session(model=model, optimizer=optimizer) as s:
    if s.restarts == 0:
        if os.fork() == 0:
            os.setsid()  # away from its group; it holds the socket to the agent
            open(sys.argv[1], "w").write(str(os.getpid()))
            time.sleep(60)
        while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
            time.sleep(0.01)
        os._exit(0)
print("done after", s.restarts, "restart", flush=True)
"""


@pytest.mark.etcd
@pytest.mark.paddle
def test_a_script_that_leaves_without_a_word_in_odd_surroundings(tmp_path: Path) -> None:
    """A long TMPDIR, a name beyond ASCII, marks of an outer launcher, a child with the socket."""
    place = tmp_path / ("long-" * 20)
    place.mkdir()
    script = tmp_path / "обучение модели.py"
    script.write_text(LEAVES_A_CHILD_AND_GOES)
    child = tmp_path / "child"
    outer = {"TMPDIR": str(place), "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    launcher = Launcher(tmp_path / "run", (str(script), str(child)), {**FAST_ETCD, **outer})
    try:
        assert launcher.wait(60) == 0, launcher.output
    finally:
        launcher.close()
        os.kill(int(child.read_text()), signal.SIGKILL)
    assert "rank 0 ended with exit code 0 in the middle of its session" in launcher.output
    assert "done after 1 restart" in launcher.output
    assert not list(place.iterdir()), "it takes its temporary files away"


def test_a_stop_before_it_began_undoes_what_was_made(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as place,
        socket.create_server(("127.0.0.1", 0)) as silent,  # an etcd that never answers
    ):
        launcher = Launcher(
            tmp_path / "run",
            ("--etcd", f"127.0.0.1:{silent.getsockname()[1]}", str(TINY)),
            {"TMPDIR": place, "PADDLE_FT_ETCD__CALL_TIMEOUT_S": "60"},
        )
        try:
            silent.settimeout(30)
            with silent.accept()[0]:
                assert list(Path(place).glob("paddle_ft-*-run-*"))
                launcher.send(signal.SIGTERM)
                assert launcher.wait(20) == 143, launcher.output
        finally:
            launcher.close()
        assert launcher.output == "paddle_ft: stopped by SIGTERM before it began\n"
        assert not os.listdir(place)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_matter(tmp_path: Path, closed: str) -> None:
    """As a service manager or a shell in the background may leave them."""
    command = f"exec '{sys.executable}' -m paddle_ft.launch --nosuch x.py {closed}"
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr


class TestConsole:
    """What is said where nobody listens any more is lost, and nothing else is."""

    def test_a_terminal_that_was_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, theirs = os.openpty()
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            monkeypatch.setattr(sys, "stdout", terminal)
            console = Console("node")
            try:
                os.close(ours)  # the window is gone: EIO from here on
                console.say("a word")
                console.worker_line(0, b"a line\n")
                console._next_s = 0.0
                console.progress(Progress(Reading(1, 0.5, 1.0, 0, 8, 0), 1, 1, -1, "", ""))
                console._next_s = 0.0
                console.progress(Progress(Reading(2, 0.5, 2.0, 0, 8, 0), 1, 1, -1, "", ""))
            finally:
                console.close()
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                terminal.close()

    def test_before_the_first_step_there_is_no_loss(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        console = Console("node")
        try:
            for step, loss in ((0, math.nan), (1, 0.5)):
                console._next_s = 0.0
                console.progress(Progress(Reading(step, loss, 1.0, 0, 8, 0), 1, 1, -1, "", ""))
        finally:
            console.close()
        first, second = capsys.readouterr().err.splitlines()
        assert "step 0 · world 1" in first
        assert "step 1 · " in second
        assert "loss 0.5000 · world 1" in second

    def test_a_reader_that_went(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        pipe = os.fdopen(writer, "w")
        monkeypatch.setattr(sys, "stdout", pipe)
        console = Console("node")
        try:
            console.worker_line(0, b"a line\n")
        finally:
            console.close()
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                pipe.close()
