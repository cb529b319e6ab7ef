"""``Coordinator`` over a real etcd, through the stubs of etcd3 and nothing else of it.

Invariant: an answer means that a majority of etcd has it; no answer (EtcdUnavailable) means that
nothing is known. How calls find a member that answers: ``etcd_connection``; how watches survive:
``etcd_watch``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import etcd_stubs
from paddle_ft.coordination.etcd_connection import Connection
from paddle_ft.coordination.etcd_watch import Watch, key_value, range_of
from paddle_ft.coordination.kv import (
    Compare,
    Delete,
    OnEvents,
    OnReset,
    Put,
    Snapshot,
    Transaction,
    TxnResult,
)
from paddle_ft.coordination.lease import LeaseKeeper
from paddle_ft.errors import LeaseLost

__all__ = ["EtcdCoordinator", "EtcdInfo", "LeaseKeeper"]


@dataclass(frozen=True, slots=True)
class EtcdInfo:
    """Who answered a ``ping``."""

    endpoint: str
    version: str
    cluster_id: str


class EtcdCoordinator:
    """The operations of ``kv.Coordinator``, each within ``call_timeout_s``. Thread-safe.

    Besides EtcdUnavailable every call can raise ConfigError (TLS files, user, password,
    permission) and CoordinationError (etcd is full, request too large).
    """

    def __init__(self, config: EtcdConfig) -> None:
        """Opens nothing yet; raises ConfigError for endpoints that cannot be right."""
        self._connection = Connection(config)
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()

    @property
    def targets(self) -> tuple[str, ...]:
        """host:port of each endpoint, in whatever form it was configured."""
        return self._connection.targets

    def ping(self) -> EtcdInfo:
        """Version and identity of the etcd behind the endpoints; raises if there is none."""
        answer, member = self._connection.call("Maintenance", "Status", _api().StatusRequest())
        return EtcdInfo(member.target, answer.version, f"{answer.header.cluster_id:x}")

    def read(self, prefix: str) -> Snapshot:
        answer, _ = self._connection.call("KV", "Range", _api().RangeRequest(**range_of(prefix)))
        return Snapshot(answer.header.revision, tuple(key_value(kv) for kv in answer.kvs))

    def transact(self, txn: Transaction) -> TxnResult:
        """Runs ``txn``; never sends it again once it may have taken effect (``etcd_connection``).

        Raises LeaseLost if it puts under a lease that has ended.
        """
        request = _api().TxnRequest(
            compare=[_compare(c) for c in txn.compares],
            success=[_operation(o) for o in txn.operations],
        )
        answer, _ = self._connection.call("KV", "Txn", request, repeatable=False)
        return TxnResult(answer.succeeded, answer.header.revision)

    def grant(self, ttl_s: int) -> int:
        """A new lease. Repeated freely: one that nobody heard of ends by itself."""
        answer, _ = self._connection.call(
            "Lease", "LeaseGrant", _api().LeaseGrantRequest(TTL=ttl_s)
        )
        lease: int = answer.ID
        return lease

    def keep_alive(self, lease: int) -> int:
        answer, _ = self._connection.call(
            "Lease", "LeaseKeepAlive", _api().LeaseKeepAliveRequest(ID=lease)
        )
        ttl_s: int = answer.TTL
        return ttl_s

    def revoke(self, lease: int) -> None:
        try:
            self._connection.call("Lease", "LeaseRevoke", _api().LeaseRevokeRequest(ID=lease))
        except LeaseLost:
            return

    def watch(
        self, prefix: str, revision: int, on_events: OnEvents, on_reset: OnReset
    ) -> Callable[[], None]:
        watch = Watch(self._connection, self.read, prefix, revision, on_events, on_reset)
        with self._lock:
            self._watches.add(watch)
        watch.start()

        def cancel() -> None:
            with self._lock:
                self._watches.discard(watch)
            watch.cancel()

        return cancel

    def close(self) -> None:
        """Ends the watches and all calls under way. Safe to call twice."""
        with self._lock:
            watches, self._watches = self._watches, set()
        for watch in watches:
            watch.cancel()
        self._connection.close()


def _api() -> Any:
    return etcd_stubs.load()


def _compare(compare: Compare) -> Any:
    kind = _api().Compare
    target = {"create_revision": kind.CREATE, "mod_revision": kind.MOD}[compare.field]
    return kind(
        target=target,
        result=kind.EQUAL,
        key=compare.key.encode(),
        **{compare.field: compare.revision},
    )


def _operation(operation: Put | Delete) -> Any:
    api = _api()
    if isinstance(operation, Put):
        put = api.PutRequest(
            key=operation.key.encode(), value=operation.value, lease=operation.lease
        )
        return api.RequestOp(request_put=put)
    keys = range_of(operation.key) if operation.prefix else {"key": operation.key.encode()}
    return api.RequestOp(request_delete_range=api.DeleteRangeRequest(**keys))
