"""Versions, levels and shares of a group of replicas: real processes, real etcd."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.serve.publish import publish
from paddle_ft.serve.register import register
from paddle_ft.serve.registry import Group, Keys, Published, parse
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.replica_world import Clients, ReplicaProcess, publish_times

pytestmark = [pytest.mark.etcd, pytest.mark.slow]
GROUP = "readers"


class World:
    """A group whose replicas are started by name, as etcd shows it."""

    def __init__(self, place: Path, etcd: str, wait_for: Callable[..., None]) -> None:
        self.place, self.etcd, self.wait_for = place, etcd, wait_for
        self._made: list[ReplicaProcess] = []
        self._coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd,)))

    def start(self, *names: str) -> list[ReplicaProcess]:
        place = ["--etcd", self.etcd, "--group", GROUP, "--spares", "0"]
        made = [ReplicaProcess(self.place, *place, "--node", name) for name in names]
        self._made += made
        return made

    def end(self) -> None:
        """Stops all that run; each must end well."""
        for made in self._made:
            made.stop()
        for made in self._made:
            assert made.wait() in (0, -signal.SIGKILL), made.text
            assert "Traceback" not in made.text, made.text

    def close(self) -> None:
        for made in self._made:
            made.kill()
        self._coordinator.close()

    @property
    def group(self) -> Group:
        seen = self._coordinator.read(Keys(GROUP).prefix)
        return parse(Keys(GROUP), seen.kvs, seen.revision)

    def of(self, field: str) -> dict[str, Any]:
        """One field of all records, by node."""
        return {r.node: getattr(r, field) for r in self.group.replicas.values()}

    @property
    def leader(self) -> str:
        return (self.group.primary or "").partition(".")[0]

    def until(self, field: str, **wanted: Any) -> None:
        self.wait_for(lambda: self.of(field) == wanted, 60)

    def served(self, **versions: str) -> None:
        self.until("models", **{n: {"times": v} if v else {} for n, v in versions.items()})

    def publish(self, factor: int) -> None:
        self.tell(publish_times(self.place, factor).ref.version)

    def tell(self, version: int) -> None:
        now = Published(version, str(self.place / "store"), 1.0)
        register(self._coordinator, GROUP, "times", now)

    def cli(self, *flags: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["serving", "--etcd", self.etcd, "--group", GROUP, *flags])
        assert done.exit_code == code, done.output
        return done.output


@pytest.fixture
def world(
    tmp_path: Path, wait_for: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setenv("PADDLE_FT_SERVE__RAMP_S", "0")
    monkeypatch.setenv("PADDLE_FT_SERVE__NOTICE_S", "0.3")
    monkeypatch.setenv("PADDLE_FT_SERVE__HEARTBEAT_S", "1")
    publish_times(tmp_path, 2)
    with EtcdCluster(1) as etcd:
        made = World(tmp_path, etcd.endpoints[0], wait_for)
        try:
            yield made
            made.end()
        finally:
            made.close()


@contextmanager
def history(world: World) -> Iterator[list[Group]]:
    """All states of the group while the block lasts."""
    seen: list[Group] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            seen.append(world.group)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_what_is_published_goes_round_and_what_does_not_load_stays_away(world: World) -> None:
    left, right = world.start("left", "right")
    world.served(left="1", right="1")
    first = world.leader
    with Clients(left) as one, Clients(right) as other, history(world) as seen:
        world.publish(3)
        world.served(left="2", right="2")
        world.wait_for(lambda: one.answers[3] > 5 and other.answers[3] > 5)
    assert not one.failures + other.failures
    models = [{r.node: r.models.get("times") for r in g.replicas.values()} for g in seen]
    assert all(first == node or m[first] == "2" for m in models for node in m if m[node] == "2")

    broken = world.place / "pipeline" / "pipeline.py"
    broken.write_text(broken.read_text() + "\nraise ZeroDivisionError('no such luck')\n")
    world.tell(publish(broken.parent, "times", str(world.place / "store")).ref.version)
    world.wait_for(lambda: "no such luck" in world.of("reason")[first], 60)
    assert f"{first}." in world.cli()
    assert "times 3 is not served here" in world.cli()
    world.publish(5)  # the next one is taken up all the same
    world.served(left="4", right="4")
    second = right if first == "left" else left
    assert "no such luck" not in second.text
    world.until("reason", left="", right="")

    leader = left if first == "left" else right
    assert leader.load("times", version="1") == (200, None)  # and no newer one by itself
    world.served(left="1", right="1")
    world.publish(6)
    assert leader.load("times", version="2") == (200, None)
    world.served(left="2", right="2")
    assert leader.load("times") == (200, None)
    world.served(left="5", right="5")
    world.publish(7)
    world.served(left="6", right="6")


def test_a_cold_standby_starts_its_workers_when_the_primary_is_lost(world: World) -> None:
    (left,) = world.start("left")
    world.until("condition", left="ready")
    (right,) = world.start("right")
    world.until("condition", left="ready", right="ready")
    world.cli("--level", "lukewarm", code=1)
    with Clients(left) as clients:
        assert "cold-standby" in world.cli("--level", "cold-standby")
        world.until("condition", left="ready", right="standby")
        world.wait_for(lambda: right.infer()[0] == 503)
        assert "not served by this standby" in right.infer()[1]
        world.publish(3)
        world.served(left="2", right="")
    assert not clients.failures
    os.kill(left.pid, signal.SIGSTOP)
    world.wait_for(lambda: world.leader == "right", 60)
    world.wait_for(lambda: right.infer()[1] and right.infer()[0] == 200, 60)
    assert right.infer()[1][0] == 3
    os.kill(left.pid, signal.SIGCONT)
    world.until("condition", left="standby", right="ready")
    assert json.loads(world.cli("--json"))["level"] == "cold-standby"


def test_a_new_primary_and_a_newcomer_get_a_tenth_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_FT_SERVE__RAMP_S", "3")
    (left,) = world.start("left")
    world.until("condition", left="ready")
    with history(world) as seen:
        world.start("mid", "right")
        world.until("condition", left="ready", mid="ready", right="ready")
        world.until("share", left=1.0, mid=1.0, right=1.0)
    shares = [r.share for g in seen for r in g.replicas.values() if r.node == "mid"]
    assert 0.1 in shares
    assert [r.share for g in seen for r in g.replicas.values() if r.node == "left"][-1] == 1.0
    world.cli("--level", "hot-standby")
    world.wait_for(lambda: len(world.group.in_sync.names) == 3 if world.group.in_sync else False)
    with history(world) as seen:
        os.kill(left.pid, signal.SIGKILL)
        world.wait_for(lambda: world.leader in ("mid", "right"), 60)
        leader = world.leader
        world.wait_for(lambda: world.of("share")[leader] == 0.1)
        world.wait_for(lambda: world.of("share")[leader] == 1.0, 60)
    assert world.leader == leader
    others = [
        (g.revision, r.node, r.share, g.primary)
        for g in seen
        for r in g.replicas.values()
        if r.node not in (leader, "left")
    ]
    assert not [other for other in others if other[2] != 1.0]
