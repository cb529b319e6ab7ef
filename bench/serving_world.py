"""What the serving benchmark measures: a real etcd, real replicas and gateway, published models.

with World(folder, models, replicas=2) as world, world.load(200, writers=4) as load:
    world.settle()
    world.nodes["n0"].kill()

All of it ends with the block, and with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import Self

from bench.serving_analysis import Ack, Request, requests_of
from bench.serving_load import Spec
from bench.serving_model import HERE, Model, environment
from paddle_ft.agent.net import free_ports
from paddle_ft.agent.tether import tethered
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.serve.registry import Group, Keys, parse
from tests.integration.etcd_cluster import EtcdCluster

GROUP = "bench"
HEARTBEAT: dict[str, Any] = {"serve.heartbeat_s": 1, "serve.misses": 3}
LEASE_S = 3
"""Of a replica with that; by default 15. What is measured beyond a lease does not depend on it."""
TOKEN = "bench"
START_S = 120.0
"""For a replica until it is ready; a worker imports Paddle, on a machine that answers requests."""
STOP_S = 45.0


class Broken(RuntimeError):
    """What was measured cannot be measured further; one sentence."""


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Raises Broken."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise Broken(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


class Node:
    """A replica's place: its ports, its cache and its log stay when the process does not."""

    def __init__(
        self, folder: Path, name: str, flags: Sequence[str], settings: Mapping[str, Any],
        host: str = "127.0.0.1", inside: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.host = name, host
        own = "127.0.0.1" if inside else host
        self.http_port, self.grpc_port = free_ports(own, 2)
        self._log = folder / f"{name}.log"
        self._argv = [
            *inside, sys.executable, "-m", "paddle_ft.serve", *flags, "--host", host,
            "--node", name, "--cache", str(folder / f"{name}-cache"),
            "--http_port", str(self.http_port), "--grpc_port", str(self.grpc_port),
        ]  # fmt: skip
        self._environment = environment({"serve.admin_token": TOKEN, **settings})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                tethered(self._argv, signal.SIGKILL),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
            )  # fmt: skip

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL of the front; its workers end with it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def ask(
        self, method: str, path: str, body: bytes = b"", timeout_s: float = 10.0, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Raises OSError, http.client.HTTPException."""
        return ask(self.host, self.http_port, method, path, body, timeout_s, **headers)

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return " / ".join(lines[-3:])[-400:]


def ask(
    host: str, port: int, method: str, path: str, body: bytes = b"", timeout_s: float = 10.0,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """(status, headers in lower case, body); raises OSError, http.client.HTTPException."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, answer.read()
    finally:
        connection.close()


@dataclass
class Load:
    """What a load has recorded; filled when it ends."""

    requests: list[Request] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)
    told: dict[str, list[float]] = field(default_factory=dict)
    """Why requests failed: how many, when the first and the last."""
    stale: list[str] = field(default_factory=list)
    reads: int = 0
    state: str = ""
    """Why nothing was acknowledged."""
    put_failures: dict[str, int] = field(default_factory=dict)
    core_share: float = 0.0

    def read(self, out: Path) -> None:
        told = json.loads(out.with_suffix(".json").read_text())
        self.requests = requests_of(out.with_suffix(".bin").read_bytes())
        self.acks = [Ack(*values) for values in told.pop("acks")]
        for name, value in told.items():
            setattr(self, name, value)


@contextlib.contextmanager
def load(folder: Path, spec: Spec) -> Iterator[Load]:
    """Requests until the block ends."""
    path = Path(spec.out).with_suffix(".spec")
    path.write_text(json.dumps(asdict(spec)))
    with (folder / "load.log").open("ab") as log:
        process = subprocess.Popen(
            tethered([sys.executable, "-m", "bench.serving_load", str(path)]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=HERE.parent,
            env=environment({}),
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    found = Load()
    try:
        if not process.stdout.readline():
            raise Broken(f"the load does not begin: {(folder / 'load.log').read_text()[-300:]}")
        yield found
    finally:
        process.stdin.close()
        try:
            process.wait(spec.timeout_s + 30)
            found.read(Path(spec.out))
        except (subprocess.TimeoutExpired, OSError, ValueError):
            process.kill()
            process.wait(5)
        process.stdout.close()


class World:
    """An etcd, ``replicas`` nodes n0, n1 … of one group, and the gateway before them."""

    def __init__(
        self, folder: Path, model: Model, replicas: int, *, gateway: bool = True,
        settings: Mapping[str, Any] | None = None, flags: Sequence[str] = (),
        logs: Path | None = None,
    ) -> None:  # fmt: skip
        """``logs``: where the logs of its processes are to stay."""
        self.folder, self.model = folder / f"world-{time.monotonic_ns()}", model
        self.nodes: dict[str, Node] = {}
        self.gone: set[str] = set()
        """Names of replicas that were killed; their records stay until their leases end."""
        self.http_port, self.grpc_port = free_ports("127.0.0.1", 2)
        self.etcd = EtcdCluster(1)
        self._names = [f"n{i}" for i in range(replicas)]
        self._flags, self._settings = tuple(flags), HEARTBEAT | (settings or {})
        self._gateway: subprocess.Popen[bytes] | None = None
        self._wants_gateway = gateway
        self._logs = logs
        self._loads = 0
        self._stack = contextlib.ExitStack()
        self._coordinator: EtcdCoordinator

    # ------------------------------------------------------------ where things are

    host = "127.0.0.1"
    """Where the gateway listens."""

    def _node(self, name: str) -> Node:
        flags = ["--etcd", self.etcd.endpoints[0], "--group", GROUP, "--model", self.model.name]
        flags += ["--store", str(self.model.store), *self._flags]
        return Node(self.folder, name, flags, self._settings)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(self._keep_logs)
            stack.enter_context(self.etcd)
            self._coordinator = EtcdCoordinator(self.etcd.config())
            stack.callback(self._coordinator.close)
            stack.callback(self._stop)
            self.nodes = {name: self._node(name) for name in self._names}
            for number, node in enumerate(self.nodes.values()):
                node.start()
                if number == 0:  # who comes first founds the group
                    until(lambda: self.group().primary, "a first primary", START_S)
            if self._wants_gateway:
                self._start_gateway()
            self.settle()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_gateway(self) -> None:
        listen = [f"{self.host}:{port}" for port in (self.http_port, self.grpc_port)]
        argv = [sys.executable, "-m", "paddle_ft.cli", "gateway", "--group", GROUP]
        argv += ["--etcd", self.etcd.endpoints[0], "--folder", str(self.folder / "gateway")]
        argv += ["--listen", listen[0], "--listen-grpc", listen[1]]
        with (self.folder / "gateway.log").open("ab") as log:
            self._gateway = subprocess.Popen(
                tethered(argv, signal.SIGTERM), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment({"gateway.workers": 1, **self._settings}),
            )  # fmt: skip

    def _keep_logs(self) -> None:
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.log"):
                shutil.copy(path, self._logs)

    def _stop(self) -> None:
        """All that was started."""
        for node in self.nodes.values():
            if not node.ended:
                with contextlib.suppress(ProcessLookupError):
                    node.kill()
        if self._gateway is not None:
            self._gateway.terminate()
            try:
                self._gateway.wait(15)
            except subprocess.TimeoutExpired:
                self._gateway.kill()
                self._gateway.wait(5)

    # ------------------------------------------------------------ what it is like

    def group(self) -> Group:
        """As etcd has it; raises EtcdUnavailable."""
        keys = Keys(GROUP)
        seen = self._coordinator.read(keys.prefix)
        return parse(keys, seen.kvs, seen.revision)

    @property
    def gateway_pid(self) -> int:
        assert self._gateway is not None
        return self._gateway.pid

    def kill(self, victim: Node) -> None:
        """SIGKILL; who comes back on its node has another name."""
        self.gone |= {n for n, r in self.group().replicas.items() if r.node == victim.name}
        victim.kill()

    def primary(self) -> Node:
        found = self.group()
        if found.primary is None or found.primary not in found.replicas:
            raise Broken("there is no primary")
        return self.nodes[found.replicas[found.primary].node]

    def primary_other_than(self, name: str, since_s: float, timeout_s: float = 30.0) -> float:
        """Seconds from ``since_s`` until etcd has a primary that is not ``name``."""
        while time.monotonic() - since_s < timeout_s:
            found = self.group().primary
            if found and found != name:
                return time.monotonic() - since_s
            time.sleep(0.004)
        raise Broken(f"no new primary within {timeout_s:g} s of the fault")

    def settled(self) -> bool:
        """One is the primary, all are ready, in sync and asked by the gateway."""
        group = self.group()
        newest: dict[str, str] = {}
        for name in sorted(group.replicas, key=lambda n: group.since.get(n, 0)):
            newest[group.replicas[name].node] = name
        if set(newest) != set(self.nodes) or group.primary not in newest.values():
            return False
        if self.gone & set(newest.values()):
            return False
        if not all(group.replicas[name].condition == "ready" for name in newest.values()):
            return False
        in_sync = group.in_sync.names if group.in_sync else ()
        if set(in_sync) != set(newest.values()):
            return False
        return not self._wants_gateway or self._asks(list(newest.values()))

    def _asks(self, names: Sequence[str]) -> bool:
        lines = [x for x in self.gateway_said().splitlines() if "requests go to" in x]
        return bool(lines) and all(name in lines[-1] for name in names)

    def gateway_said(self) -> str:
        path = self.folder / "gateway.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def settle(self, timeout_s: float = START_S) -> None:
        """Raises Broken, telling how things are, if it does not come to that."""
        deadline_s = time.monotonic() + timeout_s
        while not self.settled():
            for node in self.nodes.values():
                if node.ended:
                    raise Broken(f"{node.name} has ended: {node.last_words()}")
            if time.monotonic() > deadline_s:
                raise Broken(f"not settled within {timeout_s:g} s: {self._told()}")
            time.sleep(0.1)

    def _told(self) -> str:
        group = self.group()
        records = [f"{n} {r.condition}" for n, r in group.replicas.items()]
        in_sync = group.in_sync.names if group.in_sync else ()
        asked = [x for x in self.gateway_said().splitlines() if "requests go to" in x][-1:]
        return f"{records}, primary {group.primary}, in sync {list(in_sync)}, gateway: {asked}"

    @contextlib.contextmanager
    def load(self, rate_hz: float = 0.0, writers: int = 0, clients: int = 16) -> Iterator[Load]:
        """Through the gateway, until the block ends."""
        self._loads += 1
        spec = Spec(
            self.http_port, str(self.folder / f"load{self._loads}"), str(self.model.samples),
            self.model.name, self.host, rate_hz, clients, writers,
        )  # fmt: skip
        with load(self.folder, spec) as found:
            yield found

    def held(self, acks: Sequence[Ack]) -> dict[tuple[int, str], int]:
        """What the primary has of the keys in ``acks``."""
        found, primary = {}, self.primary()
        for writer, key in sorted({(a.writer, a.key) for a in acks}):
            status, _, body = primary.ask("GET", f"/v2/state/bench{writer}/{key}")
            if status == 200:
                found[writer, key] = int(body)
            elif status != 404:
                raise Broken(f"the state cannot be read: {status} {body[:100]!r}")
        return found
