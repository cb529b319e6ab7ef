"""Faults that a launcher does to its own job, and hands that refuse what would hurt others."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from paddle_ft.agent.tether import tethered
from paddle_ft.chaos import run
from paddle_ft.chaos.plan import EtcdMember, Plan, parse
from paddle_ft.chaos.proxy import StoreProxy
from paddle_ft.chaos.strike import Hands, NoVictim
from paddle_ft.chaos.watch import Launcher as Running
from paddle_ft.errors import ConfigError
from tests.integration.jobs import TINY, Launcher, final

pytestmark = pytest.mark.timeout(120)
FLAGS = ("--nproc_per_node", "2", "--max_restart", "9", "--quiet")


@pytest.mark.slow
@pytest.mark.paddle
@pytest.mark.etcd
def test_a_launcher_kills_its_workers_and_the_weights_are_the_same(tmp_path: Path) -> None:
    told = {}
    launchers = {}
    for name, flags in (("calm", ()), ("chaos", ("--chaos", "kill-worker@100ms,kill-worker@1s"))):
        script = (str(TINY), "--record", str(tmp_path / name), "--delay", "0.04")
        launchers[name] = Launcher(tmp_path / f"of-{name}", (*FLAGS, *flags, *script))
    try:
        for name, launcher in launchers.items():
            assert launcher.wait() == 0, launcher.output
            told[name] = final(launcher.output)
    finally:
        for launcher in launchers.values():
            launcher.close()
    assert told["calm"]["weights"] == told["chaos"]["weights"]
    assert int(told["chaos"]["restarts"]) >= 1
    rows = [line for line in launcher.output.splitlines() if "| kill-worker@" in line]
    assert len(rows) == 2
    assert "never" not in rows[0], launcher.output
    assert "| rank " in rows[0], launcher.output


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A child that is no worker of anybody."""
    process = subprocess.Popen(tethered([sys.executable, "-c", "import time; time.sleep(99)"]))
    yield process
    process.kill()
    process.wait()


def tell(log_dir: Path, process: subprocess.Popen[bytes]) -> None:
    """As a launcher tells of its workers."""
    told = {"generation": 1, "workers": [{"rank": 0, "pid": process.pid}], "ready": []}
    (log_dir / "workers.json").write_text(json.dumps(told))


def test_a_process_that_is_no_worker_is_not_hit(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """A list of workers may be of yesterday, and the process id somebody else's by now."""
    tell(tmp_path, sleeper)
    plan = parse("kill-worker@1s")
    with pytest.raises(NoVictim):
        Hands(plan, lambda: [Running("", 1, tmp_path)]).strike(plan.faults[0])
    assert sleeper.poll() is None
    mine = Hands(plan, lambda: [Running("", os.getpid(), tmp_path)])
    assert mine.strike(plan.faults[0]).victim == "rank 0"
    assert sleeper.wait(10) == -signal.SIGKILL


def test_a_stopped_worker_goes_on_at_the_end_at_the_latest(
    tmp_path: Path,
    sleeper: subprocess.Popen[bytes],
    wait_for: Callable[..., None],
) -> None:
    tell(tmp_path, sleeper)
    plan = parse("stop-worker@1s:for=1h")
    hands = Hands(plan, lambda: [Running("", os.getpid(), tmp_path)])

    def state() -> str:
        return Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[0]

    assert hands.strike(plan.faults[0]).victim
    wait_for(lambda: state() == "T")
    hands.tend()
    assert state() == "T"
    hands.close()
    wait_for(lambda: state() != "T")


def test_a_disk_that_others_need_is_not_filled(tmp_path: Path) -> None:
    plan = parse(f"full-disk@1s:dir={tmp_path}")
    struck = Hands(plan, list).strike(plan.faults[0])
    assert not struck.victim
    assert "others need" in struck.note
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_no_etcd_is_not_killed(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paddle_ft.chaos.strike.leads", lambda _endpoint: True)
    plan = Plan(parse("kill-etcd-leader@1s").faults, etcd=(EtcdMember("a:1", sleeper.pid),))
    assert "is not the etcd of a:1" in Hands(plan, list).strike(plan.faults[0]).note
    assert sleeper.poll() is None


def test_what_cannot_be_run_is_told_before_anything_starts(tmp_path: Path) -> None:
    given = [*FLAGS[:2], str(TINY), "--record", str(tmp_path)]
    with pytest.raises(ConfigError, match="--max_restart 4 or more"):
        run.run(parse("random:seed=1,faults=4,over=9s,kinds=kill-worker"), given)
    with pytest.raises(ConfigError, match="cannot be read"):
        run.read_plan(tmp_path / "none.toml")


class _Store(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_proxy_fails_on_demand_and_passes_else(store: str) -> None:
    broken = (OSError, http.client.HTTPException)
    with StoreProxy(store) as proxy:
        with connected(proxy) as standing:
            assert ask(standing) == (200, b"ok")
            proxy.fail("503")
            with pytest.raises(broken):
                ask(standing)
        with connected(proxy) as anew:
            assert ask(anew)[0] == 503
        proxy.fail("reset")
        with connected(proxy) as anew, pytest.raises(broken):
            ask(anew)
        proxy.fail("stall")
        with connected(proxy, timeout_s=0.3) as anew, pytest.raises(socket.timeout):
            ask(anew)
        proxy.fail("")
        with connected(proxy) as anew:
            assert ask(anew) == (200, b"ok")
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 5


@contextlib.contextmanager
def connected(proxy: StoreProxy, timeout_s: float = 5.0) -> Iterator[http.client.HTTPConnection]:
    host, _, port = proxy.endpoint.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    yield connection
    connection.close()


def ask(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    connection.request("GET", "/")
    answer = connection.getresponse()
    return answer.status, answer.read()
