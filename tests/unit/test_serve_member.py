"""A replica is registered under a lease in the end, however badly etcd answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.kv import Snapshot, Transaction, TxnResult
from paddle_ft.errors import ConfigError, CoordinationError, EtcdUnavailable, LeaseLost
from paddle_ft.serve.member import Member
from paddle_ft.serve.registry import Keys, ReplicaRecord
from paddle_ft.serve.standstill import RECENT_S, Standstill
from tests.integration.etcd_cluster import wait_until
from tests.sim.model_etcd import ModelCoordinator, ModelEtcd

KEYS = Keys("g")
RECORD = ReplicaRecord("n1.x-1", "h", 1, 2, 3)


class Shaky(ModelCoordinator):
    """Loses the next ``failures`` transactions; used from several threads."""

    def __init__(self) -> None:
        super().__init__(ModelEtcd(time.monotonic))
        self.failures = 0
        self.lock = threading.RLock()

    def grant(self, ttl_s: int) -> int:
        with self.lock:
            return super().grant(ttl_s)

    def keep_alive(self, lease: int) -> int:
        with self.lock:
            return super().keep_alive(lease)

    def revoke(self, lease: int) -> None:
        with self.lock:
            super().revoke(lease)

    def transact(self, txn: Transaction) -> TxnResult:
        with self.lock:
            if self.failures:
                self.failures -= 1
                raise EtcdUnavailable("the answer is lost")
            return super().transact(txn)

    def lease_of(self, name: str) -> int:
        """Of its record; 0: there is none, -1: it stands without one."""
        with self.lock:
            self.etcd.tick()
            kv = self.etcd.get(KEYS.replica(name))
        return 0 if kv is None else kv.lease or -1


@pytest.fixture
def etcd() -> Shaky:
    return Shaky()


@pytest.fixture
def member(etcd: Shaky) -> Iterator[Member]:
    config = EtcdConfig(lease_ttl_s=2, renew_interval_s=0.05, rpc_timeout_s=0.5)
    made = Member(config, "g", lambda: None, etcd)
    made.start(RECORD)
    stop = threading.Event()

    def turns() -> None:
        while not stop.wait(0.05):
            made.turned()

    thread = threading.Thread(target=turns)
    thread.start()
    yield made
    stop.set()
    thread.join(5)
    made.close()


def test_a_lease_that_was_lost_is_replaced_although_the_record_fails(
    etcd: Shaky, member: Member
) -> None:
    first = etcd.lease_of(RECORD.name)
    assert first > 0
    with etcd.lock:
        etcd.failures = 1  # the lease is granted, the record is not put
        etcd.etcd.revoke(first)
    wait_until(lambda: etcd.lease_of(RECORD.name) > first, "registered again")
    assert etcd.failures == 0
    assert etcd.lease_of(RECORD.name) == member.lease
    # What stood under the first one has no deadline by the second.
    assert member.deadline_s(first) == member.deadline_s(0) == float("-inf")
    assert member.deadline_s(member.lease) > time.monotonic()


def test_a_new_name_takes_the_place_of_the_old_one(etcd: Shaky, member: Member) -> None:
    first = etcd.lease_of(RECORD.name)
    etcd.failures = 1
    member.tell(ReplicaRecord("n1.x-2", "h", 1, 2, 3))
    wait_until(lambda: etcd.lease_of("n1.x-2") > 0, "registered under the new name")
    assert etcd.lease_of(RECORD.name) == 0
    assert first not in etcd.etcd.leases()


def test_no_record_is_put_without_a_lease(etcd: Shaky, member: Member) -> None:
    keeper = member._keeper
    assert keeper is not None
    keeper.lost = True  # between the look at it and the write
    with pytest.raises(LeaseLost):
        member._write(RECORD)
    assert etcd.lease_of(RECORD.name) != -1


def test_an_etcd_that_has_lost_its_data_is_not_followed(member: Member) -> None:
    member._mirror._reset_and_notify(Snapshot(9, ()))
    assert member.group().revision == 9
    member._mirror._reset_and_notify(Snapshot(8, ()))
    with pytest.raises(CoordinationError, match="lost what it knew of the serving group g"):
        member.group()


def test_a_namesake_on_another_machine_is_waited_for_and_not_taken_for_ended(
    etcd: Shaky, member: Member
) -> None:
    config = EtcdConfig(lease_ttl_s=2, renew_interval_s=0.3, rpc_timeout_s=0.5)
    moved = replace(RECORD, name="n1.x-2", host="other")
    second = Member(config, "g", lambda: None, etcd)
    with pytest.raises(ConfigError, match="is named n1, at h, .* its own --node"):
        second.start(moved)
    assert etcd.lease_of(RECORD.name) > 0, "it lives, and stays"
    member.close()
    third = Member(config, "g", lambda: None, etcd)
    third.start(moved)
    assert etcd.lease_of(moved.name) > 0
    third.close()
    second.close()


def test_what_is_read_after_a_standstill_is_as_old_as_that(member: Member) -> None:
    stood = Standstill()
    assert stood.age_s(5.0) == 0.0, "it takes no turns yet"
    stood.turned(5.0)
    stood.turned(5.1)
    assert stood.age_s(5.1) < 0.2
    assert stood.age_s(9.1) == 4.0, "what has come in meanwhile is read before the next turn"
    stood.turned(9.1)
    stood.turned(9.2)
    assert stood.age_s(9.2) == 4.0, "or soon after it"
    assert stood.age_s(9.1 + RECENT_S) < 1.0
    member.turned()
    assert member.age_s() < 5.0
