"""Replicas in network namespaces of their own, so that one can be cut off; root only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from typing_extensions import Self

from bench.serving_model import Model
from bench.serving_world import GROUP, Broken, Node, World
from paddle_ft.chaos import network
from tests.chaos import namespaces
from tests.integration.etcd_cluster import EtcdCluster


class EtcdOnHost(EtcdCluster):
    """On the machine's side of the bridge, where all reach it."""

    def __init__(self, host: str) -> None:
        super().__init__(1)
        self._address = host

    def _host(self, index: int) -> str:
        del index
        return self._address


class NodesApart(World):
    """Each replica on a node of its own; etcd, gateway and load on the machine's side."""

    def __init__(self, folder: Path, model: Model, flags: Sequence[str], logs: Path | None) -> None:
        if why := namespaces.unusable():
            raise Broken(why)
        plain = {"serve.peer_plain": "true", "serve.plain": "true"}
        super().__init__(folder, model, 3, settings=plain, flags=flags, logs=logs)
        self._network = namespaces.World()

    def __enter__(self) -> Self:
        try:
            self._network.make()
        except (network.CommandFailed, OSError, subprocess.SubprocessError) as error:
            self._network.remove()
            raise Broken(f"no network namespaces here: {error}") from None
        self.host = self._network.host
        self.etcd = EtcdOnHost(self.host)
        try:
            return super().__enter__()
        except BaseException:
            self._network.remove()
            raise

    def __exit__(self, *told: object) -> None:
        try:
            super().__exit__(*told)
        finally:
            self._network.remove()

    def _node(self, name: str) -> Node:
        number = int(name[1:])
        flags = ["--etcd", self.etcd.endpoints[0], "--group", GROUP, "--model", self.model.name]
        flags += ["--store", str(self.model.store), *self._flags]
        inside = network.inside(self._network.namespaces[number])
        return Node(
            self.folder, name, flags, self._settings, self._network.addresses[number], inside
        )

    @contextlib.contextmanager
    def cut(self, node: Node) -> Iterator[None]:
        """Nothing goes to the node or comes from it while the block lasts; nobody is told."""
        link = self._network.namespaces[int(node.name[1:])]
        network.run(["ip", "link", "set", link, "down"])
        try:
            yield
        finally:
            network.run(["ip", "link", "set", link, "up"])
