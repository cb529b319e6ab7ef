"""Faults of the network, on real namespaces: what is cut is silent, what is healed is whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.agent.tether import tethered
from paddle_ft.chaos import network
from paddle_ft.chaos.plan import Node, Plan, parse
from paddle_ft.chaos.proxy import StoreProxy
from paddle_ft.chaos.strike import Hands
from tests.chaos.namespaces import NODES, World, small_disk, three_nodes

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

_CONNECTS = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.3):
        print("reached")
except (BrokenPipeError, ConnectionResetError):
    print("reached")  # and it has hung up
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with three_nodes() as made:
        yield made


def _from(namespace: str, address: tuple[str, int]) -> str:
    """``reached``, or the name of the error."""
    argv = [sys.executable, "-I", "-S", "-c", _CONNECTS, address[0], str(address[1])]
    return network.run([*network.inside(namespace), *argv]).strip()


def _hands(world: World, faults: str) -> Hands:
    pairs = zip(NODES, world.namespaces, strict=True)
    nodes = tuple(Node(name, namespace) for name, namespace in pairs)
    return Hands(Plan(parse(faults).faults, nodes), list)


def test_a_partition_is_silent_and_ends(world: World) -> None:
    hands = _hands(world, "partition@1s:node=b:for=1h")
    a, b, _ = world.namespaces
    with socket.create_server((world.host, 0)) as server:
        assert _from(b, server.getsockname()) == "reached"
        assert hands.strike(hands.plan.faults[0]).victim == f"namespace {b}"
        assert _from(b, server.getsockname()) == "TimeoutError"
        assert _from(a, server.getsockname()) == "reached"
        hands.close()
        assert _from(b, server.getsockname()) == "reached"


def test_a_slow_network_is_slow_and_gets_fast_again(world: World) -> None:
    hands = _hands(world, "slow-network@1s:node=a:for=1h:rate=256kbit")
    shape = ["tc", "-n", world.namespaces[0], "qdisc", "show", "dev", "eth0"]
    assert hands.strike(hands.plan.faults[0]).victim
    assert "tbf" in network.run(shape)
    assert "rate 256Kbit" in network.run(shape)
    hands.close()
    assert "tbf" not in network.run(shape)


def test_a_process_is_found_in_its_namespace(world: World) -> None:
    assert network.of_process(os.getpid()) == ""
    argv = [*network.inside(world.namespaces[2]), "sleep", "60"]
    process = subprocess.Popen(tethered(argv))
    try:
        deadline = time.monotonic() + 20
        while b"sleep\0" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()[:6]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert network.of_process(process.pid) == world.namespaces[2]
    finally:
        process.kill()
        process.wait()


def test_the_proxy_before_a_store_is_reached_from_the_nodes(world: World) -> None:
    with StoreProxy(f"http://{world.host}:9") as proxy:
        host, _, port = proxy.endpoint.removeprefix("http://").partition(":")
        assert _from(world.namespaces[0], (host, int(port))) == "reached"


def test_nothing_is_left(world: World) -> None:
    """A second world goes without a trace, and the first one stays."""
    number = os.getpid() + 10**7  # no process has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: number)
        with three_nodes() as other:
            assert other.namespaces[0] in network.run(["ip", "netns"])
            assert other.host != world.host
    left = network.run(["ip", "netns"])
    assert str(number) not in left + network.run(["ip", "link"])
    assert all(name in left for name in world.namespaces)


def test_a_small_disk_is_filled_to_its_last_byte_and_freed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        plan = parse(f"full-disk@1s:dir={disk}:for=1h")
        hands = Hands(plan, list)
        struck = hands.strike(plan.faults[0])
        assert (struck.victim, struck.note) == (str(disk), "")
        with pytest.raises(OSError, match="No space"):
            (disk / "more").write_bytes(bytes(4096))
        hands.close()
        (disk / "more").write_bytes(bytes(4096))
