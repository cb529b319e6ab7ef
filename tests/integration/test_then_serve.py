"""``--then-serve``: nodes that have trained serve what they have published."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.errors import EXIT_CONFIG, EXIT_STORE, EXIT_WORKER_FAILED
from paddle_ft.serve import registry
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.jobs import FAST_ETCD, Launcher
from tests.integration.replica_world import TIMES
from tests.test_tidy import ROOT

pytestmark = [pytest.mark.etcd, pytest.mark.slow, pytest.mark.timeout(300)]

PUBLISHES = """
import sys
from paddle_ft.serve.publish import publish
publish(sys.argv[1], "times", sys.argv[2])
"""
DIGITS = ROOT / "examples" / "digits"

Start = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(name, then, *flags)`` starts a launcher that serves on free ports afterwards."""
    launchers: list[Launcher] = []
    (tmp_path / "tmp").mkdir()

    def start(name: str, then: str, *flags: str) -> Launcher:
        place = ["--cache", str(tmp_path / f"cache-{name}")]
        serve = " ".join(["--http_port 0 --grpc_port 0", *place, then])
        environ = FAST_ETCD | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
        made = Launcher(tmp_path / name, ("--then-serve", serve, *flags), environ)
        launchers.append(made)
        return made

    yield start
    for launcher in launchers:
        launcher.close()


@pytest.fixture
def script(tmp_path: Path) -> tuple[str, ...]:
    """A script that publishes a pipeline, and its arguments."""
    (tmp_path / "pipeline").mkdir()
    source = TIMES.format(gate="/", seconds=0.0, factor=2)
    (tmp_path / "pipeline/pipeline.py").write_text(source)
    (tmp_path / "publishes.py").write_text(PUBLISHES)
    store = str(tmp_path / "store")
    return (str(tmp_path / "publishes.py"), str(tmp_path / "pipeline"), store)


def address(launcher: Launcher) -> str:
    """host:port of its replica; "" before it listens."""
    assert launcher.process.poll() is None, launcher.output
    found = re.search(r"serving on (\S+): HTTP (\d+)", launcher.output)
    return f"{found[1]}:{found[2]}" if found else ""


def is_ready(launcher: Launcher) -> bool:
    if not (where := address(launcher)):
        return False
    connection = http.client.HTTPConnection(where, timeout=10)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def replicas(launcher: Launcher) -> list[int]:
    told = Path(f"/proc/{launcher.process.pid}/task").glob("*/children")
    pids = [int(pid) for path in told for pid in path.read_text().split()]
    return [p for p in pids if b"paddle_ft.serve" in Path(f"/proc/{p}/cmdline").read_bytes()]


def test_a_node_serves_with_the_private_etcd_of_its_job_until_it_is_stopped(
    start: Start, script: tuple[str, ...], tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    launcher = start("a", f"--model times --store {script[2]} --spares 0", *script)
    wait_for(lambda: is_ready(launcher), 90)
    found = re.search(r"etcd (\S+) \(private\)", launcher.output)
    assert found
    wait_for(lambda: "is the primary, term" in launcher.output)
    launcher.send(signal.SIGINT)
    assert launcher.wait() == 0, launcher.output
    assert "training has ended, now serving: " in launcher.output
    assert re.search(r"serving times version 1 at http://127.0.0.1:\d+\n", launcher.output)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_replica_that_was_killed_gives_its_code_and_one_without_a_model_its_sentence(
    start: Start, script: tuple[str, ...], wait_for: Callable[..., None]
) -> None:
    launcher = start("a", f"--model times --store {script[2]} --spares 0", *script)
    wait_for(lambda: is_ready(launcher), 90)
    (replica,) = replicas(launcher)
    os.kill(replica, signal.SIGKILL)
    assert launcher.wait() == 128 + signal.SIGKILL
    assert "the replica of this node was ended by SIGKILL" in launcher.output

    other = start("b", f"--model other --store {script[2]}", *script)
    assert other.wait() == EXIT_STORE, other.output
    assert "holds no model other" in other.output


def test_nothing_is_served_of_a_training_that_failed_or_a_flag_that_is_wrong(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(3)\n")
    failed = start("a", "--model times", "--max_restart", "0", str(tmp_path / "fails.py"))
    assert failed.wait() == EXIT_WORKER_FAILED, failed.output
    assert "now serving" not in failed.output
    wrong = start("b", "--modle times", str(tmp_path / "fails.py"))
    assert wrong.wait() == EXIT_CONFIG
    assert "--then-serve: there is no flag --modle: did you mean --model?" in wrong.output


@pytest.mark.paddle
def test_two_nodes_train_digits_and_serve_them(
    start: Start, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    with EtcdCluster(1) as etcd:
        flags = ["--nnodes", "2", "--etcd", ",".join(etcd.config().endpoints), "--job_id", "digits"]
        flags += ["--checkpoint", str(tmp_path / "store")]
        train = [str(DIGITS / "train.py"), "--epochs", "4", "--publish", "digits"]
        made = [start(name, "--model digits --spares 0", *flags, *train) for name in "ab"]
        for launcher in made:
            wait_for(lambda launcher=launcher: is_ready(launcher), 200)
        coordinator = EtcdCoordinator(etcd.config())
        try:
            keys = registry.Keys("digits")
            group = registry.parse(keys, coordinator.read(keys.prefix).kvs)
        finally:
            coordinator.close()
        assert len(group.replicas) == 2
        assert group.published["digits"].version == 1

        for launcher in made:
            told = subprocess.run(
                [sys.executable, str(DIGITS / "ask.py"), f"http://{address(launcher)}"],
                capture_output=True,
                text=True,
                timeout=100,
                check=True,
            ).stdout
            found = re.search(r"right=(\d+) of=360 version=1", told)
            assert found
            assert int(found[1]) > 270

        (replica,) = replicas(made[0])
        made[0].process.kill()  # its replica leaves, the other one goes on
        wait_for(lambda: not Path(f"/proc/{replica}").exists(), 60)
        assert is_ready(made[1])
        made[1].send(signal.SIGTERM)
        assert made[1].wait() == 0, made[1].output
