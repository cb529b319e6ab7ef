"""The gateway before real replicas: levels, shares after a fail-over, and the replicas' own TLS."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.serve.grpc_messages import inference
from paddle_ft.serve.publish import publish
from paddle_ft.serve.registry import Group, Keys, parse
from tests.integration.authority import Authority
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.gateway_world import GROUP, HOST, World
from tests.integration.replica_world import Clients, ReplicaProcess, publish_times

pytestmark = [pytest.mark.etcd, pytest.mark.slow, pytest.mark.timeout(300)]
NODE = "PADDLE_FT_TEST_NODE"
FAULT = """
    if (Path({place!r}) / f"fails-{{os.environ[{node!r}]}}").exists():
        raise MemoryError("no such luck")
"""


class Through(ReplicaProcess):
    """The gateway, asked as a replica is."""

    def __init__(self, world: World) -> None:
        self.http = f"{HOST}:{world.http_port}"


class Replicas(World):
    """Replicas as they are, named by their nodes."""

    def __init__(self, folder: Path, coordinator: EtcdCoordinator, etcd: str) -> None:
        super().__init__(folder, coordinator, etcd)
        self.etcd_client, self._etcd = coordinator, etcd
        self.replicas: dict[str, ReplicaProcess] = {}
        self._nodes: dict[int, str] = {}

    def close(self) -> None:
        for made in self.replicas.values():
            made.kill()

    def begin(self, *nodes: str) -> None:
        """Each is there before the next one is started, so the first is the primary."""
        for node in nodes:
            os.environ[NODE] = node
            flags = ("--etcd", self._etcd, "--group", GROUP, "--spares", "0", "--node", node)
            self.replicas[node] = ReplicaProcess(self.folder, *flags)
            self.until(lambda n=node: self.of("condition").get(n) == "ready", node, 60)

    @property
    def group(self) -> Group:
        seen = self.etcd_client.read(Keys(GROUP).prefix)
        return parse(Keys(GROUP), seen.kvs, seen.revision)

    def of(self, field: str) -> dict[str, object]:
        """One field of all records, by node."""
        return {r.node: getattr(r, field) for r in self.group.replicas.values()}

    @property
    def leader(self) -> str:
        return (self.group.primary or "").partition(".")[0]

    def node_of(self, pid: int) -> str:
        """Whose worker that is; "" if it had ended before it was looked at."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode()
            self._nodes[pid] = environ.partition(f"{NODE}=")[2].partition("\0")[0]
        return self._nodes.get(pid, "")

    def kill(self, node: str) -> None:
        os.kill(self.replicas[node].pid, signal.SIGKILL)

    def last(self, clients: Clients, count: int) -> list[str]:
        """Who answers so many of the next requests."""
        begin = len(clients.pids)
        self.until(lambda: len(clients.pids) >= begin + count, f"{count} more answers", 60)
        nodes = {pid: self.node_of(pid) for pid in set(clients.pids[begin:])}
        return [nodes[pid] for pid in clients.pids[begin:]]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    monkeypatch.setenv("PADDLE_FT_SERVE__RAMP_S", "0")
    monkeypatch.setenv("PADDLE_FT_SERVE__NOTICE_S", "0.3")
    monkeypatch.setenv("PADDLE_FT_SERVE__HEARTBEAT_S", "1")
    monkeypatch.setenv(NODE, "")
    publish_times(tmp_path, 2)
    source = tmp_path / "pipeline" / "pipeline.py"
    head, body, rest = source.read_text().partition("    def run(self, inputs, state=None):\n")
    fault = FAULT.format(place=str(tmp_path), node=NODE).strip("\n").replace("\n", "\n    ")
    source.write_text(f"{head}{body}    {fault}\n{rest}")
    publish(source.parent, "times", str(tmp_path / "store"))
    with EtcdCluster(1) as etcd:
        coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoints[0],)))
        made = Replicas(tmp_path, coordinator, etcd.endpoints[0])
        try:
            with made:
                yield made
        finally:
            made.close()
            coordinator.close()


def test_a_new_primary_gets_more_and_more_and_loses_it_when_it_errs(
    world: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_FT_SERVE__RAMP_S", "6")
    world.put(Keys(GROUP).level, b"hot-standby")
    world.begin("a", "b", "c")
    world.start_gateway()
    asked = Through(world)
    world.until(lambda: asked.infer()[0] == 200, "it answers", 60)
    with Clients(asked, 4) as clients:
        assert set(world.last(clients, 50)) == {"a"}
        world.until(lambda: len(getattr(world.group.in_sync, "names", ())) == 3, "in sync")
        world.kill("a")
        world.until(lambda: world.leader in ("b", "c"), "a new primary")
        leader = world.leader
        (other,) = {"b", "c"} - {leader}
        shares: list[object] = []
        begin = len(clients.pids)
        world.until(lambda: world.of("share")[leader] == 0.1, "a tenth")
        while not shares or shares[-1] != 1.0:
            share = world.of("share")[leader]
            if shares[-1:] != [share]:
                shares.append(share)
            time.sleep(0.05)
        assert shares == [0.1, 0.25, 0.5, 1.0]
        nodes = {pid: world.node_of(pid) for pid in set(clients.pids[begin:])}
        count = [nodes[pid] for pid in clients.pids[begin:]]
        assert count.count(other) > count.count(leader) / 2 > 0
        world.until(lambda: set(world.last(clients, 50)) == {leader}, "all go to it")
    assert clients.failures == [], "no request failed by the fail-over"


def test_a_new_primary_that_errs_is_taken_back_and_let_in_again(
    world: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_FT_SERVE__RAMP_S", "8")
    world.put(Keys(GROUP).level, b"hot-standby")
    world.begin("a", "b", "c")
    world.start_gateway()
    world.until(lambda: len(getattr(world.group.in_sync, "names", ())) == 3, "in sync")
    with Clients(Through(world), 4) as clients:
        world.last(clients, 20)
        world.kill("a")
        world.until(lambda: world.leader in ("b", "c"), "a new primary")
        leader = world.leader
        (other,) = {"b", "c"} - {leader}
        (world.folder / f"fails-{leader}").touch()
        world.until(lambda: world.of("share")[leader] == 0.0, "it is taken back", 60)
        assert "requests failed" in str(world.of("reason")[leader])
        world.until(lambda: set(world.last(clients, 30)) == {other}, "the other one answers")
        (world.folder / f"fails-{leader}").unlink()
        world.until(lambda: world.of("share")[leader] == 1.0, "it is let in again", 60)
        world.until(lambda: set(world.last(clients, 50)) == {leader}, "all go to it", 60)
    assert clients.failures == [], "what failed there was asked of the other one"


def test_a_cold_standby_answers_when_it_has_loaded(world: Replicas) -> None:
    world.begin("a", "b")
    world.put(Keys(GROUP).level, b"cold-standby")
    world.until(lambda: world.of("condition").get("b") == "standby", "it has put its workers away")
    world.start_gateway()
    asked = Through(world)
    world.until(lambda: asked.infer()[0] == 200, "it answers", 60)
    world.kill("a")
    answers: list[tuple[int, object]] = []

    def answered() -> bool:
        answers.append(asked.infer())
        return answers[-1][0] == 200

    world.until(answered, "the standby has loaded", 60)
    assert {status for status, _ in answers} <= {200, 503}
    assert world.leader == "b"


def test_replicas_with_their_own_tls(
    world: Replicas, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    authority = Authority.make(world.folder / "authority")
    for who in ("replica", "gateway"):
        authority.issue(who)
    ca = authority.file("ca.crt")
    for key, value in {
        "CERT_FILE": authority.file("replica.crt"),
        "KEY_FILE": authority.file("replica.key"),
        "CLIENT_CA_FILE": ca,
        "CLIENT_CA_REQUIRED": "true",
    }.items():
        monkeypatch.setenv(f"PADDLE_FT_SERVE__{key}", value)
    world.begin("a", "b")
    world.start_gateway(
        PADDLE_FT_GATEWAY__REPLICA_CA_FILE=ca,
        PADDLE_FT_GATEWAY__REPLICA_NAME="replica",
        PADDLE_FT_GATEWAY__REPLICA_CERT_FILE=authority.file("gateway.crt"),
        PADDLE_FT_GATEWAY__REPLICA_KEY_FILE=authority.file("gateway.key"),
    )
    asked = Through(world)
    world.until(lambda: asked.infer()[0] == 200, "it answers", 60)
    api = inference()
    with grpc.insecure_channel(f"{HOST}:{world.grpc_port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelReady",
            request_serializer=api.ModelReadyRequest.SerializeToString,
            response_deserializer=api.ModelReadyResponse.FromString,
        )
        with Clients(asked, 4) as clients:
            world.until(lambda: set(world.last(clients, 30)) == {"a", "b"}, "both answer", 60)
            assert call(api.ModelReadyRequest(name="times"), timeout=20).ready
            world.kill("a")
            world.until(lambda: set(world.last(clients, 30)) == {"b"}, "the other one goes on", 60)
            assert call(api.ModelReadyRequest(name="times"), timeout=20).ready
    assert clients.failures == []
    assert "is left out" in world.said()
