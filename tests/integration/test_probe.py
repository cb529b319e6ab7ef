"""A node whose processors are rationed is named before it joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.config import Config, JobConfig
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdConfig, EtcdCoordinator
from paddle_ft.errors import EXIT_UNFIT
from paddle_ft.health.probe import admit
from tests.integration.jobs import TINY

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.slow, pytest.mark.timeout(240)]

QUOTA_US, PERIOD_US = 4_000, 100_000
END_S = 150.0


@pytest.fixture
def ration() -> Iterator[Path]:
    """A control group that gets a small part of one processor."""
    for root, name, limit in (
        (Path("/sys/fs/cgroup"), "cpu.max", f"{QUOTA_US} {PERIOD_US}"),
        (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", str(QUOTA_US)),
    ):
        group = root / f"paddle_ft-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / name).exists():
                (group / name).write_text(limit)
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("processors cannot be rationed here: needs root and control groups")


def start(ration: Path | None, *command: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", *command]
    if ration is not None:
        inside = f'echo $$ > {ration}/cgroup.procs && exec "$@"'
        words = ["/bin/sh", "-c", inside, "sh", *words]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def test_of_three_nodes_the_slow_one_is_named_by_all(ration: Path) -> None:
    with EmbeddedEtcd() as etcd:
        shared = ("paddle_ft.cli", "probe", "--etcd", etcd.endpoint, "--job-id", "j", "--json")
        probes = {
            node: start(ration if node == "b" else None, *shared, "--nodes", "3", "--node", node)
            for node in "abc"
        }
        try:
            output = {node: probe.communicate(timeout=END_S)[0] for node, probe in probes.items()}
        finally:
            for probe in probes.values():
                probe.kill()
                probe.wait()
    assert {node: probe.returncode for node, probe in probes.items()} == {
        "a": 0, "b": EXIT_UNFIT, "c": 0,
    }, output  # fmt: skip
    for told in map(json.loads, output.values()):
        assert [finding["nodes"] for finding in told["findings"]] == [["b"]]
        assert "matrix product" in told["findings"][0]["reason"]


def test_a_slow_node_does_not_join(ration: Path, tmp_path: Path) -> None:
    with EmbeddedEtcd() as etcd:
        coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,)))
        admit(Config(job=JobConfig(id="j")), coordinator, "a", lambda _: None)
        coordinator.close()
        flags = ("--etcd", etcd.endpoint, "--job_id", "j", "--node", "b", "--probe", "local")
        script = (str(TINY), "--record", str(tmp_path / "record"))
        places = ("--log_dir", str(tmp_path / "log"), "--checkpoint", str(tmp_path / "store"))
        launcher = start(ration, "paddle_ft.launch", *flags, *places, *script)
        try:
            output, _ = launcher.communicate(timeout=END_S)
        finally:
            launcher.kill()
            launcher.wait()
    assert launcher.returncode == EXIT_UNFIT, output
    assert "error: node b does not join" in output and "Traceback" not in output
    assert not (tmp_path / "record").exists()
