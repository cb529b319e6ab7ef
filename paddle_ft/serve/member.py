"""A replica in etcd: its lease, its record, its view of the group, its transactions.

Everything that waits for etcd does so on threads of its own; what is asked for here is known
already. While etcd is away, the view stays what it was and transactions end as not known.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.kv import Coordinator, Transaction, TxnResult
from paddle_ft.coordination.lease import LeaseKeeper
from paddle_ft.coordination.mirror import Mirror
from paddle_ft.errors import (
    ConfigError,
    CoordinationError,
    EtcdUnavailable,
    LeaseLost,
    PaddleFTError,
)
from paddle_ft.serve import registry
from paddle_ft.serve.elect import outlived
from paddle_ft.serve.registry import Group, Keys, ReplicaRecord
from paddle_ft.serve.standstill import Standstill

log = logging.getLogger("paddle_ft")

TELL_S = 0.5
"""Between two writes of a record in which only the end of the log is new."""
RETRY_S = 0.5
JOIN_S = 1.0
STUCK_S = 1.0
"""An event loop that has stood still for so long, or half a heartbeat, does not renew its lease."""


def with_heartbeat(etcd: EtcdConfig, heartbeat_s: float, misses: int) -> EtcdConfig:
    """``etcd`` with a lease that ends when ``misses`` heartbeats are missing.

    Raises ConfigError where they are too quick for the time-out of one request to etcd.
    """
    ttl_s = max(2, math.ceil(heartbeat_s * misses))  # etcd grants no less
    if ttl_s - heartbeat_s - etcd.rpc_timeout_s <= 0:
        raise ConfigError(
            f"serve.heartbeat_s = {heartbeat_s:g} and serve.misses = {misses} leave no time for a "
            f"request to etcd (etcd.rpc_timeout_s = {etcd.rpc_timeout_s:g}): raise one of them"
        )
    return etcd.model_copy(update={"lease_ttl_s": ttl_s, "renew_interval_s": heartbeat_s})


class _Alive:
    """etcd for the keeper of the lease: renewed only as long as this replica takes its turns.

    A process whose event loop stands still would keep a lease, and stay the primary, for ever.
    """

    def __init__(self, coordinator: Coordinator, stuck_s: float) -> None:
        self.turned_s = time.monotonic()
        self._coordinator = coordinator
        self._stuck_s = stuck_s

    def grant(self, ttl_s: int) -> int:
        return self._coordinator.grant(ttl_s)

    def revoke(self, lease: int) -> None:
        self._coordinator.revoke(lease)

    def keep_alive(self, lease: int) -> int:
        if time.monotonic() - self.turned_s > self._stuck_s:
            raise EtcdUnavailable("the event loop of this replica stands still: see what blocks it")
        return self._coordinator.keep_alive(lease)


class Member:
    """Args:
    wake: called from any thread when there is something new; must not block.
    """

    def __init__(
        self,
        etcd: EtcdConfig,
        group: str,
        wake: Callable[[], None],
        coordinator: Coordinator | None = None,
    ) -> None:
        self.coordinator: Coordinator = coordinator or EtcdCoordinator(etcd)
        self.keys = Keys(group)
        stuck_s = max(STUCK_S, etcd.renew_interval_s / 2)
        self._alive = _Alive(self.coordinator, stuck_s)
        self._etcd = etcd
        self._wake = wake
        self._mirror = Mirror(self.coordinator, self.keys.prefix, self._changed)
        self._group = Group()
        self._complaint = ""
        self._keeper: LeaseKeeper | None = None
        self._wanted: ReplicaRecord | None = None
        self._told: ReplicaRecord | None = None
        """What stands under the lease; None: it is not known."""
        self._holder = ""
        """For whom the lease was taken."""
        self._told_s = 0.0
        self._standstill = Standstill()
        self._news = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ life

    def start(self, record: ReplicaRecord) -> None:
        """Registers and begins to follow the group; waits for etcd, and until a replica of the same
        name on another machine has gone.

        Raises CoordinationError; ConfigError if that one does not go.
        """
        self._wanted = record
        self._mirror.start()
        self._wait_for_namesake(record)
        self._join(record)
        self._thread = threading.Thread(target=self._run, name="replica record", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the lease back: to the others this replica is gone at once. Waits for etcd."""
        self._closed.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)
        if self._keeper is not None:
            self._keeper.close()
        self._mirror.close()
        self.coordinator.close()

    # ------------------------------------------------------------ what is known

    @property
    def lease(self) -> int:
        """0 while there is none."""
        keeper = self._keeper
        return keeper.lease if keeper is not None and not keeper.lost else 0

    def deadline_s(self, lease: int) -> float:
        """Monotonic time until which ``lease`` certainly stands; -inf if it is not this replica's,
        or not any more: what was written under another one may be gone."""
        keeper = self._keeper
        if keeper is None or not lease or keeper.lease != lease:
            return float("-inf")
        return keeper.deadline()

    def turned(self) -> None:
        """This replica takes its turns: without that its lease is not renewed."""
        now_s = time.monotonic()
        self._standstill.turned(now_s)
        self._alive.turned_s = now_s

    def age_s(self) -> float:
        """At most so long ago came in what is read now: whoever sent it may have given it up."""
        return self._standstill.age_s(time.monotonic())

    def group(self) -> Group:
        """The newest view; the one before where etcd holds what cannot be read.

        Raises CoordinationError if etcd has lost its data: no term counts up from there.
        """
        if self._mirror.lost:
            raise CoordinationError(
                f"etcd has lost what it knew of the serving group {self.keys.group}: start its "
                "replicas again; what the group kept for sessions is lost with that"
            )
        if self._mirror.revision == self._group.revision:
            return self._group
        try:
            seen = self._mirror.snapshot()
            self._group = registry.parse(self.keys, seen.kvs, seen.revision)
            self._complaint = ""
        except (ValueError, CoordinationError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("the serving group in etcd cannot be followed: %s", error)
        return self._group

    # ------------------------------------------------------------ what is written

    def tell(self, record: ReplicaRecord) -> None:
        """``record`` is to stand in etcd, soon."""
        if record != self._wanted:
            self._wanted = record
            self._news.set()

    def transact(self, txn: Transaction) -> TxnResult | None:
        """Waits for etcd; None if it is not known whether it took effect. A refusal for the sake
        of a lease that has ended is a transaction that did not succeed."""
        try:
            return self.coordinator.transact(txn)
        except LeaseLost:
            return TxnResult(False, 0)
        except PaddleFTError as error:
            log.debug("a transaction of the serving group: %s", error)
            return None

    def end(self, lease: int) -> None:
        """Gives back the lease of a replica that has ended; it ends by itself, too."""
        try:
            self.coordinator.revoke(lease)
        except PaddleFTError as error:
            log.debug("the lease of a replica that has ended: %s", error)

    def _changed(self) -> None:
        self._wake()

    def _wait_for_namesake(self, record: ReplicaRecord) -> None:
        """Who has this replica's node and place has ended, or so all others will think of it: on
        another machine only the end of its lease shows that."""
        patience_s = 2 * self._etcd.lease_ttl_s
        deadline_s = time.monotonic() + patience_s
        while not self._closed.is_set():
            known = self.group().replicas
            names = outlived(record.name, known)
            elsewhere = [known[name].host for name in names if known[name].host != record.host]
            if not elsewhere:
                return
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"another replica of the serving group {self.keys.group} is named "
                    f"{record.node.partition('.')[0]}, at {elsewhere[0]}, and has been there for "
                    f"{patience_s:g} s: give each its own --node"
                )
            self._closed.wait(0.1)

    def _join(self, record: ReplicaRecord) -> None:
        """Takes a lease and registers under it."""
        old, before = self._keeper, self._holder
        keeper = LeaseKeeper(
            self._alive,
            ttl_s=self._etcd.lease_ttl_s,
            renew_interval_s=self._etcd.renew_interval_s,
            safety_margin_s=self._etcd.rpc_timeout_s,
            on_lost=self._lost,
        )
        keeper.start()
        self._keeper, self._holder, self._told = keeper, record.name, None
        if old is not None:
            old.close(revoke=record.name != before)
        self._write(record)

    def _write(self, record: ReplicaRecord) -> None:
        lease = self.lease
        if not lease:  # without one it would stand for ever
            raise LeaseLost("it ended before this replica was registered under it")
        self._told = None
        self.coordinator.transact(registry.register(self.keys, record, lease))
        self._told, self._told_s = record, time.monotonic()

    def _lost(self) -> None:
        self._news.set()
        self._wake()

    def _run(self) -> None:
        """Keeps a lease, and what is registered under it, as they should be."""
        while not self._closed.is_set():
            self._news.wait(RETRY_S)
            self._news.clear()
            if self._closed.is_set():
                return
            try:
                self._keep()
            except LeaseLost:
                self._news.set()
                self._closed.wait(0.05)
            except PaddleFTError as error:
                log.debug("the record of this replica: %s", error)
                self._news.set()
                self._closed.wait(RETRY_S)

    def _keep(self) -> None:
        wanted, told, keeper = self._wanted, self._told, self._keeper
        assert wanted is not None
        if keeper is None or keeper.lost or wanted.name != self._holder:
            self._join(wanted)
            return
        if wanted == told:
            return
        same = told and replace(wanted, term=told.term, sequence=told.sequence) == told
        if same and self._closed.wait(max(0.0, self._told_s + TELL_S - time.monotonic())):
            return
        newest = self._wanted
        if newest is not None and newest.name == self._holder:
            self._write(newest)
