"""Which link is slow: measured over real connections, concluded from what all have measured."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from paddle_ft.agent.peers import PeerLinks
from paddle_ft.coordination.schema import JobState
from paddle_ft.health import links
from paddle_ft.health.figures import PairTime, bad_links
from paddle_ft.health.judge import HealthRecord, Verdict
from paddle_ft.health.links import BYTES, LinkWatch, measure
from paddle_ft.types import Generation, Member, NodeRecord, Versioned
from tests.integration.jobs import wait_until
from tests.sim.model_etcd import ModelEtcd

SLOW = Verdict("slow_link", -1, 0, 0.0, "")


def around(**next_s: float) -> dict[str, list[PairTime]]:
    """Each node with the time to the next one in the ring."""
    names = sorted(next_s)
    after = dict(zip(names, names[1:] + names[:1], strict=True))
    return {name: [PairTime(after[name], seconds)] for name, seconds in next_s.items()}


@pytest.mark.parametrize(
    ("times", "named"),
    [
        (around(a=0.001, b=0.001, c=0.0012), []),
        (around(a=0.001, b=0.0025, c=0.001), []),  # within what is measured beside a training
        (around(a=0.001, b=0.05, c=0.001), [("b", "c")]),
        (around(a=0.001, b=0.05, c=0.05), [("c",)]),
        (around(a=0.001, b=-1.0, c=0.001), [("b", "c")]),
        (around(a=0.001, b=0.001, c=0.001, d=0.05, e=0.001), [("d", "e")]),
        (around(a=0.001, b=0.001, c=0.05, d=0.05, e=0.001), [("d",)]),
        (around(a=0.05, b=0.05, c=0.05), []),
        (around(a=0.05, b=0.04), [("a", "b")]),
    ],
)
def test_the_link_or_the_node_that_stands_out_is_named(
    times: dict[str, list[PairTime]], named: list[tuple[str, ...]]
) -> None:
    assert [finding.nodes for finding in bad_links(times)] == named


class Agents:
    """Listening agents of nodes a, b and c, in a group of that order."""

    def __init__(self) -> None:
        etcd = ModelEtcd(lambda: 0.0)
        self.peers = [PeerLinks("127.0.0.1", etcd) for _ in "abc"]  # type: ignore[arg-type]
        members = tuple(Member(n, "1", "127.0.0.1", 1, (i, i)) for i, n in enumerate("abc"))
        nodes = {}
        for member, peer in zip(members, self.peers, strict=True):
            peer.follow(member.id, {})
            nodes[member.id] = Versioned(NodeRecord(member, link=peer.address), 1, 1)
        self.state = JobState(generation=Versioned(Generation(3, members, ""), 1, 1), nodes=nodes)

    def told(self, **records: HealthRecord) -> JobState:
        health = {f"{node}.1": Versioned(r, 1, 1) for node, r in records.items()}
        return replace(self.state, health=health)


@pytest.fixture
def agents() -> Iterator[Agents]:
    agents = Agents()
    yield agents
    for peer in agents.peers:
        peer.close()


def test_a_link_is_measured_only_to_who_is_meant(agents: Agents) -> None:
    assert 0 < measure(agents.peers[1].address, "b.1") < links.LIMIT_S
    assert measure(agents.peers[1].address, "c.1") is None
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert measure(f"127.0.0.1:{port}", "b.1") is None


def test_what_takes_too_long_is_worked_out_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LIMIT_S", 0.4)

    def trickle(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"b.1\n")
            for _ in range(100):
                try:
                    connection.sendall(bytes(BYTES // 80))
                except OSError:
                    return
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=trickle, args=(server,))
        thread.start()
        taken_s = measure(f"127.0.0.1:{server.getsockname()[1]}", "b.1")
        thread.join(10)
    assert taken_s is not None and taken_s > 1.0, "it would have taken 4 s"


def test_a_node_measures_its_own_link_when_anybody_finds_reductions_slow(agents: Agents) -> None:
    woken: list[int] = []
    watch = LinkWatch(lambda: woken.append(1))
    calm = agents.told(b=HealthRecord(3), c=HealthRecord(2, verdicts=(SLOW,)))
    for _ in range(3):
        watch.look(calm, "a.1", 3, False)
    assert watch._began_s == float("-inf"), "of another generation: nobody finds anything slow"
    slow = HealthRecord(3, verdicts=(SLOW,))
    watch.look(agents.told(b=slow), "a.1", 3, False)
    wait_until(lambda: bool(woken))
    assert [time.peer for time in watch.times] == ["b"] and not watch.findings
    told = {"b": replace(slow, links=(PairTime("c", 9.0),))}
    watch.look(agents.told(**told), "a.1", 3, False)
    assert not watch.findings, "c has not measured yet"
    told["c"] = HealthRecord(3, links=(PairTime("a", watch.times[0].seconds),))
    watch.look(agents.told(**told), "a.1", 3, False)
    assert [finding.nodes for finding in watch.findings] == [("b", "c")]
    watch.look(calm, "a.1", 3, False)
    assert not watch.findings
