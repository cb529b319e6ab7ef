"""A replica's record in etcd, under a lease of its own; and what etcd holds of a whole group.

Invariant: nothing here waits for etcd but ``start``, ``close`` and ``read_group``. While etcd is
away the replica goes on; it registers again when it can.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator, LeaseKeeper
from paddle_ft.coordination.kv import Put, Transaction
from paddle_ft.errors import CoordinationError, LeaseLost, PaddleFTError
from paddle_ft.serve.registry import Group, InSync, Keys, ReplicaRecord
from paddle_ft.types import decode, encode

log = logging.getLogger("paddle_ft")

RETRY_S = 0.5
JOIN_S = 1.0


class Enrolment:
    """One replica in the registry."""

    def __init__(self, etcd: EtcdConfig, group: str) -> None:
        """Opens nothing yet; raises ConfigError."""
        self.coordinator = EtcdCoordinator(etcd)
        self._etcd, self._keys = etcd, Keys(group)
        self._keeper: LeaseKeeper | None = None
        self._wanted: ReplicaRecord | None = None
        self._told: ReplicaRecord | None = None
        self._complaint = ""
        self._news = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, record: ReplicaRecord) -> None:
        """Registers; raises CoordinationError. Waits for etcd."""
        self._wanted = record
        self._join()
        self._thread = threading.Thread(target=self._run, name="replica record", daemon=True)
        self._thread.start()

    def tell(self, **changes: Any) -> None:
        """Sets fields of the record; soon they are in etcd."""
        assert self._wanted is not None
        record = replace(self._wanted, **changes)
        if record != self._wanted:
            self._wanted = record
            self._news.set()

    def close(self) -> None:
        """Gives the lease back: to the others this replica is gone at once. Waits for etcd."""
        self._closed.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)
        if self._keeper is not None:
            self._keeper.close()
        self.coordinator.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._news.wait()
            self._news.clear()
            if self._closed.is_set():
                return
            try:
                if self._keeper is None or self._keeper.lost:
                    self._join()
                elif self._wanted != self._told:
                    self._write()
                self._complaint = ""
            except PaddleFTError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("the record of this replica is not up to date: %s", error)
                self._news.set()
                self._closed.wait(0.05 if isinstance(error, LeaseLost) else RETRY_S)

    def _join(self) -> None:
        keeper = LeaseKeeper(
            self.coordinator,
            ttl_s=self._etcd.lease_ttl_s,
            renew_interval_s=self._etcd.renew_interval_s,
            safety_margin_s=self._etcd.rpc_timeout_s,
            on_lost=self._news.set,
        )
        keeper.start()
        if self._keeper is not None:
            self._keeper.close(revoke=False)
        self._keeper = keeper
        self._write()

    def _write(self) -> None:
        record, keeper = self._wanted, self._keeper
        assert record is not None
        assert keeper is not None
        put = Put(self._keys.replica(record.name), encode(record), keeper.lease)
        self.coordinator.transact(Transaction((), (put,)))
        self._told = record


def read_group(etcd: EtcdConfig, group: str) -> Group:
    """What etcd holds of ``group`` now; raises CoordinationError."""
    keys, coordinator = Keys(group), EtcdCoordinator(etcd)
    try:
        found = {kv.key: kv for kv in coordinator.read(keys.prefix).kvs}
    finally:
        coordinator.close()
    primary, in_sync = found.get(keys.primary), found.get(keys.in_sync)
    try:
        records = [
            decode(ReplicaRecord, kv.value)
            for key, kv in found.items()
            if key.startswith(keys.replica(""))
        ]
        return Group(
            replicas={record.name: record for record in records},
            primary=primary.value.decode() if primary else None,
            term=primary.create_revision if primary else 0,
            in_sync=decode(InSync, in_sync.value) if in_sync else None,
        )
    except ValueError as error:
        raise CoordinationError(
            f"etcd holds something else of the group {group} than this version of paddle_ft "
            f"expects ({error}); use one version for all replicas."
        ) from error
