"""A lease keeper renews, knows how long its lease stands, and says once that it has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.kv import Put, Transaction
from paddle_ft.coordination.lease import LeaseKeeper
from paddle_ft.errors import EtcdUnavailable
from tests.integration.etcd_cluster import EtcdCluster, wait_until

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


class Kept:
    """A keeper, its client, and how often it said that the lease was lost."""

    def __init__(self, etcd: EtcdCluster, ttl_s: int = 4) -> None:
        self.client = EtcdCoordinator(etcd.config(call_timeout_s=0.5, rpc_timeout_s=0.3))
        self.lost: list[str] = []
        self.keeper = LeaseKeeper(
            self.client,
            ttl_s=ttl_s,
            renew_interval_s=0.1,
            safety_margin_s=1.0,
            on_lost=lambda: self.lost.append(threading.current_thread().name),
        )

    def left_s(self) -> float:
        return self.keeper.deadline() - time.monotonic()


@pytest.fixture
def kept(etcd: EtcdCluster) -> Iterator[Kept]:
    kept = Kept(etcd)
    yield kept
    kept.keeper.close()
    kept.client.close()


def test_before_the_start_nothing_stands(kept: Kept) -> None:
    assert kept.keeper.lease == 0
    assert kept.keeper.deadline() == float("-inf")


def test_the_deadline_moves_with_each_renewal_and_never_beyond_the_lease(kept: Kept) -> None:
    lease = kept.keeper.start()
    assert lease == kept.keeper.lease != 0
    first = kept.keeper.deadline()
    assert 2.0 < kept.left_s() <= 3.0
    wait_until(lambda: kept.keeper.deadline() > first + 0.3, "renewals")
    assert kept.left_s() <= 3.0


def test_closing_gives_the_lease_back_with_its_keys(kept: Kept) -> None:
    lease = kept.keeper.start()
    kept.client.transact(Transaction((), (Put("/kept/k", b"", lease),)))
    kept.keeper.close()
    assert kept.client.read("/kept/").kvs == ()
    assert kept.client.keep_alive(lease) == 0
    assert kept.lost == []
    kept.keeper.close()


def test_closing_without_revoking_leaves_the_lease_to_its_time(kept: Kept) -> None:
    lease = kept.keeper.start()
    kept.keeper.close(revoke=False)
    assert kept.client.keep_alive(lease) == 4


def test_a_lease_ended_by_etcd_is_reported_once(kept: Kept) -> None:
    kept.client.revoke(kept.keeper.start())
    wait_until(lambda: bool(kept.lost), "the keeper hears of it")
    assert kept.keeper.lost
    assert kept.keeper.deadline() == float("-inf")
    wait_until(lambda: "lease keeper" not in thread_names(), "the keeper's thread has ended")
    assert kept.lost == ["lease keeper"]


def test_the_keeper_may_be_closed_from_its_own_callback(kept: Kept) -> None:
    kept.keeper._on_lost = lambda: (kept.keeper.close(), kept.lost.append("closed"))
    kept.client.revoke(kept.keeper.start())
    wait_until(lambda: kept.lost == ["closed"], "the callback ran to its end")


def test_a_frozen_etcd_lets_the_deadline_pass_but_does_not_end_the_lease(etcd: EtcdCluster) -> None:
    kept = Kept(etcd, ttl_s=2)
    try:
        kept.keeper.start()
        etcd.freeze(0)
        wait_until(lambda: kept.left_s() < -0.5, "the deadline passes")
        assert kept.lost == []
        etcd.thaw(0)
        # Which of the two is etcd's to decide: it counts the lease while frozen, or it does not.
        wait_until(lambda: kept.left_s() > 0 or kept.lost, "etcd decides")
        assert len(kept.lost) <= 1
    finally:
        etcd.thaw(0)
        kept.keeper.close()
        kept.client.close()


def test_without_etcd_it_cannot_start(etcd: EtcdCluster) -> None:
    client = EtcdCoordinator(etcd.config(endpoints=("127.0.0.1:1",), call_timeout_s=0.3))
    keeper = LeaseKeeper(
        client, ttl_s=4, renew_interval_s=1, safety_margin_s=1, on_lost=lambda: None
    )
    with pytest.raises(EtcdUnavailable):
        keeper.start()
    keeper.close()
    client.close()


def thread_names() -> list[str]:
    return [t.name for t in threading.enumerate()]
