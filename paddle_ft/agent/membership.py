"""This node in etcd: its lease, its record, and small transactions one after another."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from paddle_ft.agent.net import free_ports
from paddle_ft.agent.supervise import Publish
from paddle_ft.config import Config
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import Coordinator, Transaction
from paddle_ft.coordination.lease import LeaseKeeper
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.errors import EtcdUnavailable, PaddleFTError
from paddle_ft.types import Member, NodeRecord, NodeStatus

log = logging.getLogger("paddle_ft")

STORE_PORTS = 7
"""Ports for the stores of groups that are formed before new ports have been told."""
PAUSE_S = 0.5
"""Between two tries of a write that etcd did not answer."""
REFUSED_PAUSE_S = 0.02
"""The same, if etcd has refused it: what changed meanwhile is about to be seen."""


@dataclass(frozen=True, slots=True)
class Node:
    """One launcher, under a name that no other of the job has.

    host: the address others reach it under; run_dir: private directory for the socket and the
    beacons; shared_dir: another on shared memory, for snapshots.
    """

    name: str
    host: str
    run_dir: Path
    shared_dir: Path


@dataclass(frozen=True, slots=True)
class TransactionDone:
    """Event: a transaction has come back."""

    kind: str
    succeeded: bool
    revision: int
    record: NodeRecord | None


class Membership:
    """Used by the loop alone; only the sending of a transaction runs on another thread.

    Args:
        link: where the others hold a connection to this node.
        emit: takes TransactionDone from that thread.
        wake: called when the lease is lost.
    """

    def __init__(
        self,
        config: Config,
        coordinator: Coordinator,
        mirror: JobMirror,
        node: Node,
        link: str,
        emit: Callable[[TransactionDone], None],
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._coordinator = coordinator
        self._keys = schema.Keys(config.job.id)
        self._mirror = mirror
        self._node = node
        self._link = link
        self._emit = emit
        self._wake = wake
        self._keeper: LeaseKeeper | None = None
        self._joined = False
        self._record: NodeRecord | None = None
        self._revision = 0
        self._busy = False
        self._not_before_s = 0.0

    def join(self, damaged: tuple[str, ...], leaving: bool) -> None:
        """Registers a new incarnation; raises CoordinationError, and is then to be tried again."""
        self._joined = False
        if self._keeper is not None:
            self._keeper.close()
        etcd = self._config.etcd
        self._keeper = LeaseKeeper(
            self._coordinator,
            ttl_s=etcd.lease_ttl_s,
            renew_interval_s=etcd.renew_interval_s,
            safety_margin_s=etcd.rpc_timeout_s,
            on_lost=self._wake,
        )
        self._keeper.start()
        slots = self._config.job.nproc_per_node
        member = Member(
            node=self._node.name,
            incarnation=uuid.uuid4().hex[:12],
            host=self._node.host,
            slots=slots,
            ports=free_ports(self._node.host, slots + 1 + STORE_PORTS),
        )
        status = NodeStatus(damaged=damaged)
        record = NodeRecord(member, status, leaving, self._link, self.lease)
        result = self._coordinator.transact(schema.register(self._keys, record, self.lease))
        assert result.succeeded, "an incarnation is used once"
        self._record, self._revision = record, result.revision
        self._joined = True

    @property
    def me(self) -> str:
        return self._record.member.id if self._record else ""

    @property
    def lease(self) -> int:
        assert self._keeper is not None
        return self._keeper.lease

    @property
    def lost(self) -> bool:
        """The lease is over, or joining has failed since: to the others this node is dead."""
        return not self._joined or (self._keeper is not None and self._keeper.lost)

    def claim_store(self, value: str) -> str:
        """Puts ``value`` under the job's store key unless one is there; gives the one that is."""
        txn = schema.claim_store(self._keys, value)
        if self._coordinator.transact(txn).succeeded:
            return value
        state = schema.parse(self._keys, self._coordinator.read(self._keys.store).kvs)
        assert state.store is not None, "the store key is never removed"
        return state.store.value

    def acting_until_s(self) -> float:
        """Monotonic time until which the lease certainly stands."""
        return self._keeper.deadline() if self._keeper else 0.0

    @property
    def published(self) -> Publish | None:
        return Publish(self._record.status, self._record.leaving) if self._record else None

    def publish(self, action: Publish) -> None:
        """Writes what the node says of itself, with fresh ports for the next generation."""
        if self._record is None:
            return
        member = self._record.member
        generation = self._record.status.generation
        if action.status.state != "running" or action.status.generation != generation:
            ports = free_ports(self._node.host, member.slots + 1 + STORE_PORTS)
            member = replace(member, ports=ports)
        record = replace(self._record, member=member, status=action.status, leaving=action.leaving)
        txn = schema.update_record(self._keys, record, self.lease, self._revision)
        self.send("publish", txn, record)

    def send(self, kind: str, txn: Transaction, record: NodeRecord | None = None) -> None:
        """Sends ``txn`` unless another one is on its way; whoever wanted it asks again."""
        if self._busy or time.monotonic() < self._not_before_s:
            return
        self._busy = True
        threading.Thread(
            target=self._transact, args=(kind, txn, record), name=f"etcd-{kind}", daemon=True
        ).start()

    def _transact(self, kind: str, txn: Transaction, record: NodeRecord | None) -> None:
        try:
            result = self._coordinator.transact(txn)
            done = TransactionDone(kind, result.succeeded, result.revision, record)
        except EtcdUnavailable as error:
            log.debug("%s: %s", kind, error)
            done = TransactionDone(kind, False, 0, None)
        except PaddleFTError as error:  # the lease is gone, etcd is full, no permission
            log.warning("%s: %s", kind, error)
            done = TransactionDone(kind, False, 0, None)
        self._emit(done)

    def done(self, event: TransactionDone) -> None:
        self._busy = False
        if event.record is not None and event.record.member.id != self.me:
            return  # sent before the lease was lost: this node is somebody else by now
        if event.succeeded and event.record is not None:
            self._record, self._revision = event.record, event.revision
            return
        if event.kind == "publish":  # refused, or not known: go by what etcd holds
            self._revision = self._mirror.revision_of(self._keys.node(self.me))
            record = self._mirror.state().nodes.get(self.me)
            if record is not None:
                self._record = record.value
        if not event.succeeded:
            self._not_before_s = time.monotonic() + (REFUSED_PAUSE_S if event.revision else PAUSE_S)

    def close(self) -> None:
        """Gives the lease back: the node's keys are gone at once."""
        if self._keeper is not None:
            self._keeper.close()
