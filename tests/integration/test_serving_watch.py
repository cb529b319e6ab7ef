"""What ``paddle-ft serving --watch`` says while etcd is away."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.integration.etcd_cluster import EtcdCluster

pytestmark = [pytest.mark.etcd, pytest.mark.slow, pytest.mark.timeout(120)]


def test_whoever_watches_a_group_is_told_that_etcd_is_away_and_back() -> None:
    with EtcdCluster(1) as etcd:
        where = ",".join(etcd.config().endpoints)
        command = [sys.executable, "-m", "paddle_ft.cli", "serving", "--etcd", where]
        command += ["--group", "g", "--watch"]
        watching = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert watching.stdout is not None
            assert "no replica of it is running" in watching.stdout.readline()
            etcd.freeze(0)
            assert "etcd does not answer: this is what it held last" in watching.stdout.readline()
            etcd.thaw(0)
            assert "etcd answers again" in watching.stdout.readline()
            watching.send_signal(signal.SIGINT)
            assert watching.wait(30) == 0
        finally:
            watching.kill()
            watching.communicate()
