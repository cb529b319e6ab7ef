"""Which link of three nodes is slow is named while the job runs, in network namespaces."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.chaos import network
from tests.chaos.namespaces import NODES, EtcdOnNodes, World, three_nodes
from tests.integration.jobs import FAST_ETCD, SCRIPTS, Launcher, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.paddle,
    pytest.mark.etcd,
    pytest.mark.timeout(300),
]

RATE = "4mbit"
LEARNT_STEPS = 120


@contextlib.contextmanager
def slow_link(world: World, one: int, other: int) -> Iterator[None]:
    """Between two nodes alone; to all others they are as fast as before."""
    for here, there in ((one, other), (other, one)):
        tc = [*network.inside(world.namespaces[here]), "tc"]
        network.run([*tc, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb"])
        shape = ["htb", "rate", RATE, "quantum", "1514"]
        network.run([*tc, "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:1", *shape])
        match = ["u32", "match", "ip", "dst", f"{world.addresses[there]}/32", "flowid", "1:1"]
        network.run([*tc, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", *match])
    try:
        yield
    finally:
        for node in (one, other):
            tc = [*network.inside(world.namespaces[node]), "tc"]
            network.run([*tc, "qdisc", "del", "dev", "eth0", "root"])


def told(launchers: list[Launcher]) -> list[dict[str, Any]]:
    """Links that were named or cleared, in the order of that."""
    lines = [
        line
        for launcher in launchers
        for line in (launcher.log_dir / "events.jsonl").read_text().splitlines()
    ]
    found = [event for event in map(json.loads, lines) if event["kind"] == "link"]
    return sorted(found, key=lambda event: event["at_s"])


def steps(launchers: list[Launcher]) -> int:
    """Of the rank that is known to have made fewest."""
    found = []
    for launcher in launchers:
        for path in launcher.log_dir.glob("health-*.json"):
            found += [row["step"] for row in json.loads(path.read_text())["rows"]]
    return min(found) if len(found) == len(NODES) else 0


def test_the_slow_link_and_the_node_whose_links_are_slow_are_named(tmp_path: Path) -> None:
    with three_nodes() as world, EtcdOnNodes(world) as etcd:
        script = (str(SCRIPTS / "odd_rank.py"), "--steps", "100000", "--outputs", "4000")
        shared = ("--etcd", ",".join(etcd.endpoints), "--nnodes", "3", "--job_id", "j")
        shared = (*shared, "--checkpoint", str(tmp_path / "store"))
        launchers = []
        try:
            for node, namespace, host in zip(NODES, world.namespaces, world.addresses, strict=True):
                given = (*shared, "--node", node, "--host", host, *script)
                inside = network.inside(namespace)
                launchers.append(Launcher(tmp_path / node, given, FAST_ETCD, inside))
            wait_until(lambda: steps(launchers) >= LEARNT_STEPS, 90)
            with slow_link(world, 0, 1):
                wait_until(lambda: bool(told(launchers)), 60)
            (named,) = told(launchers)
            assert named["nodes"] == ["a", "b"] and "usual" in named["reason"]
            wait_until(lambda: len(told(launchers)) >= 2, 60)
            assert told(launchers)[1]["nodes"] == []
            assert "the link between nodes a and b is slow" in launchers[0].output
            undo = network.slow(world.namespaces[2], RATE, 0.4)
            try:
                wait_until(lambda: len(told(launchers)) >= 3, 60)
            finally:
                for argv in undo:
                    network.run(argv)
            assert told(launchers)[2]["nodes"] == ["c"]
        finally:
            for launcher in launchers:
                launcher.close()
