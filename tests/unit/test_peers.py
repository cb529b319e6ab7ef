"""The death of an agent is told from everything that merely looks like it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from paddle_ft.agent.peers import PeerLinks, watched
from paddle_ft.types import NodeRecord, Versioned
from tests.integration.jobs import wait_until
from tests.sim.model_etcd import ModelEtcd
from tests.unit.members import member

PEER = """
import sys, time
from paddle_ft.agent.peers import PeerLinks
links = PeerLinks("127.0.0.1", None)
links.follow("b.1", {})
print(links.address, flush=True)
time.sleep(120)
"""


def test_the_ring_watches_everybody() -> None:
    ring = [f"n{i}.x" for i in range(5)]
    assert watched("n3.x", ring) == ("n4.x", "n0.x")
    seen = [peer for me in ring for peer in watched(me, ring)]
    assert sorted(seen) == sorted(ring * 2)
    assert watched("a.1", ["a.1"]) == ()
    assert watched("a.1", ["a.1", "b.1"]) == ("b.1",)
    assert watched("c.1", ["a.1", "b.1"]) == ("a.1", "b.1")


class Watcher(ModelEtcd):
    """Node ``a``, and the leases it gave back in the name of others."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.revoked: list[int] = []
        self.links = PeerLinks("127.0.0.1", self)  # type: ignore[arg-type]

    def revoke(self, lease: int) -> None:
        self.revoked.append(lease)

    def watch_b(self, address: str) -> None:
        record = NodeRecord(member("b"), link=address, lease=42)
        self.links.follow("a.1", {"b.1": Versioned(record, 1, 1)})

    @property
    def link(self) -> object:
        return self.links._links["b.1"]


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    yield watcher
    watcher.links.close()


@pytest.fixture
def peer() -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_who_is_killed_loses_its_lease(
    watcher: Watcher, peer: Callable[[], tuple[subprocess.Popen[str], str]]
) -> None:
    process, address = peer()
    watcher.watch_b(address)
    wait_until(lambda: watcher.link.proven)  # type: ignore[attr-defined]
    assert watcher.revoked == []
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: watcher.revoked == [42])


def test_a_broken_connection_alone_is_no_death(
    watcher: Watcher, peer: Callable[[], tuple[subprocess.Popen[str], str]]
) -> None:
    _, address = peer()
    watcher.watch_b(address)
    wait_until(lambda: watcher.link.proven)  # type: ignore[attr-defined]
    before = watcher.link.connection  # type: ignore[attr-defined]
    before.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: watcher.link.connection not in (None, before))  # type: ignore[attr-defined]
    assert watcher.revoked == []


def test_who_was_never_reached_is_left_to_its_lease(watcher: Watcher) -> None:
    """A firewall refuses connections, too."""
    tries: list[int] = []
    original = socket.create_connection

    def counting(*args: object, **kwargs: object) -> socket.socket:
        tries.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paddle_ft.agent.peers.socket.create_connection", counting)
        watcher.watch_b(f"127.0.0.1:{port}")
        wait_until(lambda: len(tries) >= 3)
    assert watcher.revoked == []


def test_another_process_on_the_port_is_not_the_peer(watcher: Watcher) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    names = iter([b"b.1\n", b"c.7\n"])

    def serve() -> None:
        for name in names:
            connection, _ = server.accept()
            connection.sendall(name)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    watcher.watch_b(f"127.0.0.1:{server.getsockname()[1]}")
    wait_until(lambda: watcher.revoked == [42])
    thread.join(10)
    server.close()


def test_who_is_not_watched_any_more_may_go(
    watcher: Watcher, peer: Callable[[], tuple[subprocess.Popen[str], str]]
) -> None:
    process, address = peer()
    watcher.watch_b(address)
    wait_until(lambda: watcher.link.proven)  # type: ignore[attr-defined]
    holders = [t for t in threading.enumerate() if t.name == "peer-b.1"]
    watcher.links.follow("a.1", {})
    process.kill()
    wait_until(lambda: not any(t.is_alive() for t in holders))
    assert watcher.revoked == []
