"""Three nodes on one machine, each in a network namespace of its own, on a bridge; root only.

The etcd members are on the nodes, one on each, so a partition cuts a node with its member. The
store, and who does the faults, are on the machine's own side of the bridge. Names hold the process
id; what a killed process has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from paddle_ft.chaos import network
from tests.integration.etcd_cluster import EtcdCluster

NODES = ("a", "b", "c")
_PREFIX = "pft"
_SUBNETS = 200


def unusable() -> str:
    """Why there can be no namespaces here; "" if there can be."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "bridge", "tc") if shutil.which(name) is None]
    return f"network namespaces need iproute2, and there is no {missing[0]}" if missing else ""


class World:
    """``namespaces`` of ``NODES`` and their ``addresses``; ``host``: that of the machine's side."""

    def __init__(self) -> None:
        self._bridge = f"{_PREFIX}{os.getpid()}"
        self.namespaces = tuple(f"{self._bridge}{node}" for node in NODES)
        self.host = ""
        self.addresses: tuple[str, ...] = ()

    def make(self) -> None:
        subnet = _free_subnet()
        self.host = f"{subnet}.1"
        self.addresses = tuple(f"{subnet}.{2 + i}" for i in range(len(NODES)))
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name, address in zip(self.namespaces, self.addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", self._bridge, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        _remove(self._bridge)


@contextlib.contextmanager
def three_nodes() -> Iterator[World]:
    """Skips the test, and says why, where that cannot be."""
    if why := unusable():
        pytest.skip(why)
    for left in _left_behind():
        _remove(left)
    world = World()
    try:
        try:
            world.make()
        except network.CommandFailed as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield world
    finally:
        world.remove()


class EtcdOnNodes(EtcdCluster):
    """A member on each node."""

    def __init__(self, world: World) -> None:
        super().__init__(len(NODES))
        self._world = world

    def _host(self, index: int) -> str:
        return self._world.addresses[index]

    def _inside(self, index: int) -> Sequence[str]:
        return network.inside(self._world.namespaces[index])


@contextlib.contextmanager
def small_disk(place: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own, for all that see this machine's mounts."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "paddle_ft-test", str(place)]
    subprocess.run(mount, check=True, timeout=20)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=20)


def _ip(*words: str) -> None:
    network.run(["ip", *words])


def _free_subnet() -> str:
    taken = {
        address["local"].rpartition(".")[0]
        for link in json.loads(network.run(["ip", "-json", "-4", "addr"]))
        for address in link["addr_info"]
    }
    wanted = (f"10.213.{(os.getpid() + i) % _SUBNETS}" for i in range(_SUBNETS))
    return next(subnet for subnet in wanted if subnet not in taken)


def _left_behind() -> Iterator[str]:
    """Bridges of processes that have ended."""
    for link in json.loads(network.run(["ip", "-json", "link", "show", "type", "bridge"])):
        name = str(link.get("ifname", ""))
        pid = name.removeprefix(_PREFIX)
        if name != pid and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            yield name


def _remove(bridge: str) -> None:
    """It, and the namespaces of its nodes."""
    for name in (f"{bridge}{node}" for node in NODES):
        with contextlib.suppress(network.CommandFailed):
            _ip("link", "del", name)
        with contextlib.suppress(network.CommandFailed):
            _ip("netns", "del", name)
    with contextlib.suppress(network.CommandFailed):
        _ip("link", "del", bridge)
