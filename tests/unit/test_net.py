"""Names and ports of a node."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from paddle_ft.agent import net
from paddle_ft.agent.net import (
    ELSEWHERE,
    PORTS,
    NodeName,
    _at_random,
    address_towards,
    free_ports,
    interface_of,
)
from paddle_ft.errors import ConfigError


def test_ports_are_free_different_and_out_of_the_kernels_way() -> None:
    ports = free_ports("127.0.0.1", 20)
    assert len(set(ports)) == 20
    assert all(port in PORTS for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))


def test_every_port_is_tried_before_there_is_none() -> None:
    assert sorted(_at_random(PORTS)) == list(PORTS)
    assert sorted(_at_random(range(7, 11))) == [7, 8, 9, 10]


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        free_ports("192.0.2.1", 1)


def test_ipv6_is_refused_for_workers_by_name() -> None:
    with pytest.raises(ConfigError, match="--host ::1 is an IPv6 address"):
        free_ports("::1", 1)
    assert address_towards(["[::1]:2379"]) == "127.0.0.1"
    elsewhere = address_towards([f"{ELSEWHERE}:2379"])
    assert address_towards(["[2001:db8::1]:2379"]) == elsewhere


def test_a_host_that_does_not_resolve_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--host nosuch\.invalid cannot be resolved"):
        free_ports("nosuch.invalid", 1)
    assert free_ports("localhost", 1)


def test_the_address_is_the_one_that_reaches_etcd() -> None:
    assert address_towards(["127.0.0.1:2379"]) == "127.0.0.1"
    assert address_towards(["nonsense"]) == "127.0.0.1"


HOLDER = """
import sys
from paddle_ft.agent.net import NodeName
name = NodeName(sys.argv[1])
print(name.name, flush=True)
sys.stdin.read()
"""


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == interface_of("localhost") == "lo"
    for nobody in ("198.51.100.234", "nosuch.invalid"):
        assert interface_of(nobody) == ""


def test_locks_of_the_dead_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = f"paddle_ft-{os.getuid()}"
    (tmp_path / f"{own}-killed-n.lock").touch()
    (tmp_path / f"{own}-killed-n.log").touch()
    NodeName("before").release()
    assert (tmp_path / f"{own}-killed-n.lock").exists(), "it may be about to be locked"
    monkeypatch.setattr(net, "YOUNG_S", -1.0)
    held = NodeName("held")
    other = NodeName("other")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{own}-killed-n.log",
        f"{own}-held-{held.name}.lock",
        f"{own}-other-{other.name}.lock",
    }
    held.release()
    other.release()


def test_a_name_comes_back_when_its_launcher_is_dead() -> None:
    job = f"name-test-{os.getpid()}"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        first = holder.stdout.readline().strip()
        second = NodeName(job)
        assert second.name == f"{first}-2"
        holder.kill()
    third = NodeName(job)
    assert third.name == first
    second.release()
    third.release()
