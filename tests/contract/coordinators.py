"""The coordinators that the contract is checked on, with what a test needs to steer them."""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paddle_ft.coordination import etcd_stubs
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.coordination.kv import Coordinator, Event, Snapshot
from paddle_ft.coordination.schema import ROOT
from tests.integration.etcd_cluster import EtcdCluster
from tests.sim.model_etcd import ModelCoordinator, ModelEtcd

_numbers = itertools.count()


@dataclass
class Seen:
    """What a watch delivered, in order."""

    events: list[Event] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    resets: list[Snapshot] = field(default_factory=list)

    def on_events(self, revision: int, events: tuple[Event, ...]) -> None:
        self.batches.append(revision)
        self.events.extend(events)

    def on_reset(self, snapshot: Snapshot) -> None:
        self.resets.append(snapshot)

    def values(self) -> list[bytes]:
        return [e.kv.value for e in self.events if not e.deleted]


class Bench(ABC):
    """One coordinator under test, and a prefix of its own for each test."""

    coordinator: Coordinator

    def __init__(self) -> None:
        self.prefix = f"{ROOT}/contract-{next(_numbers)}/"
        self._cancels: list[Callable[[], None]] = []

    def watch(self, revision: int, prefix: str = "") -> Seen:
        seen = Seen()
        cancel = self.coordinator.watch(
            prefix or self.prefix, revision, seen.on_events, seen.on_reset
        )
        self._cancels.append(cancel)
        return seen

    def cancel_watches(self) -> None:
        while self._cancels:
            self._cancels.pop()()

    @abstractmethod
    def another(self) -> Coordinator:
        """A second client of the same etcd."""

    @abstractmethod
    def compact(self, revision: int) -> None: ...

    @abstractmethod
    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Lets time pass, and watches deliver, until ``condition()``."""

    @abstractmethod
    def concurrently(self, jobs: Sequence[Callable[[], None]]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class ModelBench(Bench):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._etcd = ModelEtcd(lambda: self.now_s)
        self.coordinator = self._model = ModelCoordinator(self._etcd)

    def another(self) -> Coordinator:
        return ModelCoordinator(self._etcd)

    def compact(self, revision: int) -> None:
        self._etcd.compact(revision)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        deadline = self.now_s + timeout_s
        self._model.deliver()
        while not condition():
            assert self.now_s < deadline, "waited in vain"
            self.now_s += 0.1
            self._model.deliver()

    def concurrently(self, jobs: Sequence[Callable[[], None]]) -> None:
        for job in jobs:
            job()

    def close(self) -> None:
        self.coordinator.close()


class EtcdBench(Bench):
    def __init__(self, cluster: EtcdCluster) -> None:
        super().__init__()
        self._cluster = cluster
        self._clients: list[EtcdCoordinator] = []
        self.coordinator = self.another()
        self._channel = grpc.insecure_channel(cluster.endpoints[0])
        self._api = etcd_stubs.load()

    def another(self) -> EtcdCoordinator:
        client = EtcdCoordinator(self._cluster.config())
        self._clients.append(client)
        return client

    def compact(self, revision: int) -> None:
        self._api.KVStub(self._channel).Compact(
            self._api.CompactionRequest(revision=revision, physical=True), timeout=10
        )

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def concurrently(self, jobs: Sequence[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    def close(self) -> None:
        """Leaves no lease behind: one that ended later would make a revision in another test."""
        self.cancel_watches()
        leases = self._api.LeaseStub(self._channel)
        for status in leases.LeaseLeases(self._api.LeaseLeasesRequest(), timeout=10).leases:
            self.coordinator.revoke(status.ID)
        for client in self._clients:
            client.close()
        self._channel.close()
