"""A serving group of real processes for tests: started, killed, frozen, asked.

with EtcdCluster(1) as etcd, ServingGroup(etcd, 3) as group:
    group.primary().kill()
    at = group.put("k", "1")
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from typing_extensions import Self

from paddle_ft.agent.tether import tethered
from tests.integration.etcd_cluster import EtcdCluster, wait_until

ROOT = Path(__file__).parents[2]


class Refused(Exception):
    """The replica has answered with an error; ``args[0]`` is its type."""


class ReplicaProcess:
    """Usable once ``ready``."""

    def __init__(self, etcd: str, group: str, node: str, log: Path, settings: dict[str, Any]):
        self.node = node
        self._log = log
        argv = [sys.executable, "-m", "tests.integration.serve_replica", etcd, group, node]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                tethered([*argv, json.dumps(settings)]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self._port = 0

    def ready(self) -> None:
        """Waits until it takes part."""
        if not self._port:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert line, f"{self.node} has ended:\n{self.log()[-3000:]}"
            self._port = int(line)

    def ask(self, op: str, timeout_s: float = 10.0, **request: Any) -> Any:
        """Raises Refused, or OSError where the process does not answer."""
        self.ready()
        with socket.create_connection(("127.0.0.1", self._port), timeout=timeout_s) as connection:
            connection.sendall(json.dumps({"op": op, **request}).encode() + b"\n")
            line = connection.makefile("rb").readline()
        if not line:
            raise ConnectionResetError
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["ok"]

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, also where it is frozen."""
        self._process.kill()
        self._end()

    def stop(self) -> int:
        """SIGTERM; gives the exit code."""
        self._process.terminate()
        return self._end()

    def _end(self) -> int:
        code = self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    @property
    def started(self) -> bool:
        return self._port != 0

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(errors="replace")


class ServingGroup:
    """``size`` replicas on the nodes n0, n1 …; ``settings`` are those of ``GroupSettings``."""

    def __init__(self, etcd: EtcdCluster, size: int, name: str = "g", **settings: Any) -> None:
        self._name = name
        self._etcd = etcd.endpoints[0]
        self._settings = settings
        self._size = size
        self._dir = Path(tempfile.mkdtemp(prefix="paddle_ft-test-group-"))
        self.replicas: dict[str, ReplicaProcess] = {}

    def __enter__(self) -> Self:
        try:
            for number in range(self._size):
                self.start(f"n{number}")
            for replica in self.replicas.values():
                replica.ready()
            self.settle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for node in self.replicas:
                text = (self._dir / f"{node}.log").read_text(errors="replace")
                print(f"---- {node}\n{text[-3000:]}")
        self.close()

    def close(self) -> None:
        for replica in self.replicas.values():
            if replica.alive:
                replica.kill()
        shutil.rmtree(self._dir, ignore_errors=True)

    def start(self, node: str) -> None:
        """A new process on ``node``; does not wait for it."""
        log = self._dir / f"{node}.log"
        self.replicas[node] = ReplicaProcess(self._etcd, self._name, node, log, self._settings)

    def status(self, node: str) -> dict[str, Any]:
        found: dict[str, Any] = self.replicas[node].ask("status")
        return found

    def settle(self, timeout_s: float = 20.0) -> None:
        """Waits until one is the primary and all that live are in sync."""

        def settled() -> bool:
            alive = [n for n, r in self.replicas.items() if r.alive]
            states = [self.status(node) for node in alive]
            leading = [s for s in states if s["role"] == "primary"]
            names = sorted(s["name"] for s in states)
            return len(leading) == 1 and leading[0]["in_sync"] == names

        wait_until(settled, "one primary, and everybody in sync", timeout_s)

    def primary(self) -> ReplicaProcess:
        """Whoever answers changes; waits until there is one."""
        found: list[ReplicaProcess] = []

        def look() -> bool:
            found[:] = [r for r in self.replicas.values() if r.alive and self._leads(r)]
            return len(found) == 1

        wait_until(look, "one primary")
        return found[0]

    def _leads(self, replica: ReplicaProcess) -> bool:
        try:
            return bool(replica.ask("status", timeout_s=0.3)["role"] == "primary")
        except OSError:
            return False

    def put(self, key: str, value: str, timeout_s: float = 10.0) -> list[int]:
        """Asks everybody until one has taken it."""
        until_s = time.monotonic() + timeout_s
        while True:
            for replica in [r for r in self.replicas.values() if r.alive]:
                try:
                    at: list[int] = replica.ask("put", timeout_s=1.0, key=key, value=value, s=1.0)
                    return at
                except (Refused, OSError):
                    pass
            assert time.monotonic() < until_s, "nobody takes changes"
            time.sleep(0.01)

    def freeze(self, replica: ReplicaProcess) -> None:
        replica.signal(signal.SIGSTOP)

    def thaw(self, replica: ReplicaProcess) -> None:
        replica.signal(signal.SIGCONT)
