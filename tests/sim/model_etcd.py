"""A model of the part of etcd that paddle_ft uses: one thread, no clock of its own, fast.

Invariant: whatever a caller can observe of a real etcd through ``Coordinator`` it observes here,
in the same order. ``tests/contract`` runs one suite against both and compares random histories.

Nothing is copied: keys and events are shared frozen values. Reading a prefix costs a bisection
plus the keys found; a transaction costs its comparisons and operations; leases cost nothing until
the earliest of them ends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import NamedTuple

from paddle_ft.coordination.kv import (
    Delete,
    Event,
    KeyValue,
    OnEvents,
    OnReset,
    Put,
    Snapshot,
    Transaction,
    TxnResult,
)
from paddle_ft.errors import EtcdUnavailable, LeaseLost

_LAST = "\U0010ffff"


class Compacted(Exception):
    """Events after the revision asked for are no longer kept: read anew."""


class Batch(NamedTuple):
    """All events of one revision, in etcd's order."""

    revision: int
    events: tuple[Event, ...]


class _Lease:
    __slots__ = ("ends_s", "keys", "ttl_s")

    def __init__(self, ttl_s: float, ends_s: float) -> None:
        self.ttl_s = ttl_s
        self.ends_s = ends_s
        self.keys: set[str] = set()


class ModelEtcd:
    """One etcd that never fails; who wants faults puts them between it and its users.

    ``clock`` gives seconds. Leases end when the model is used at or after their end, or at
    ``tick()``, in the order of their ends. ``on_commit`` is called with each new ``Batch``.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        ttl_min_s: int = 2,
        on_commit: Callable[[Batch], None] | None = None,
    ) -> None:
        self.revision = 1
        self.on_commit = on_commit
        self._clock = clock
        self._ttl_min_s = ttl_min_s
        self._kvs: dict[str, KeyValue] = {}
        self._keys: list[str] = []  # sorted; str sorts as its UTF-8 bytes do
        self._log: list[Batch] = []
        self._compacted = 0
        self._leases: dict[int, _Lease] = {}
        self._ends: list[tuple[float, int]] = []  # heap; entries of renewed leases are outdated
        self._last_lease = 0

    # ------------------------------------------------------------ keys

    def read(self, prefix: str) -> Snapshot:
        self.tick()
        kvs = self._kvs
        return Snapshot(self.revision, tuple([kvs[k] for k in self._below(prefix)]))

    def get(self, key: str) -> KeyValue | None:
        self.tick()
        return self._kvs.get(key)

    def transact(self, txn: Transaction) -> TxnResult:
        """Raises LeaseLost if it would put under a lease that has ended; ValueError if it
        touches a key twice."""
        self.tick()
        operations = txn.operations
        if len(operations) > 1:
            _check_disjoint(operations)
        kvs = self._kvs
        for compare in txn.compares:
            kv = kvs.get(compare.key)
            if (0 if kv is None else getattr(kv, compare.field)) != compare.revision:
                return TxnResult(False, self.revision)
        for operation in operations:
            lease = operation.lease if isinstance(operation, Put) else 0
            if lease and lease not in self._leases:
                raise LeaseLost(f"lease {lease:x} has ended")
        events: list[Event] = []
        for operation in operations:
            if isinstance(operation, Put):
                events.append(self._put(operation))
            else:
                self._delete(
                    self._below(operation.key) if operation.prefix else (operation.key,), events
                )
        self._commit(events)
        return TxnResult(True, self.revision)

    def _below(self, prefix: str) -> list[str]:
        keys = self._keys
        start = bisect_left(keys, prefix)
        return keys[start : bisect_right(keys, prefix + _LAST, start)]

    def _put(self, put: Put) -> Event:
        key = put.key
        revision = self.revision + 1
        old = self._kvs.get(key)
        if old is None:
            insort(self._keys, key)
        elif old.lease and old.lease != put.lease:
            self._leases[old.lease].keys.discard(key)
        if put.lease:
            self._leases[put.lease].keys.add(key)
        created = revision if old is None else old.create_revision
        kv = KeyValue(key, put.value, created, revision, put.lease)
        self._kvs[key] = kv
        return Event(False, kv)

    def _delete(self, keys: list[str] | tuple[str, ...], events: list[Event]) -> None:
        for key in keys:
            old = self._kvs.pop(key, None)
            if old is None:
                continue
            del self._keys[bisect_left(self._keys, key)]
            if old.lease and old.lease in self._leases:
                self._leases[old.lease].keys.discard(key)
            events.append(Event(True, KeyValue(key, b"", 0, self.revision + 1)))

    def _commit(self, events: list[Event]) -> None:
        if not events:  # etcd counts a revision only for a change
            return
        self.revision += 1
        batch = Batch(self.revision, tuple(events))
        self._log.append(batch)
        if self.on_commit is not None:
            self.on_commit(batch)

    # ------------------------------------------------------------ leases

    def grant(self, ttl_s: int) -> int:
        self.tick()
        self._last_lease += 1
        ttl = max(ttl_s, self._ttl_min_s)
        ends_s = self._clock() + ttl
        self._leases[self._last_lease] = _Lease(ttl, ends_s)
        heapq.heappush(self._ends, (ends_s, self._last_lease))
        return self._last_lease

    def keep_alive(self, lease: int) -> int:
        """The renewed time to live in s, or 0 if the lease has ended."""
        self.tick()
        found = self._leases.get(lease)
        if found is None:
            return 0
        found.ends_s = self._clock() + found.ttl_s
        return int(found.ttl_s)

    def revoke(self, lease: int) -> None:
        self.tick()
        self._end(lease)

    def leases(self) -> dict[int, float]:
        """The leases that stand, and when each ends."""
        self.tick()
        return {lease: found.ends_s for lease, found in self._leases.items()}

    def restart_leases(self) -> None:
        """Every lease gets its full time again, as when etcd elects another leader."""
        self.tick()
        now = self._clock()
        for found in self._leases.values():
            found.ends_s = now + found.ttl_s

    def tick(self) -> None:
        """Ends the leases whose time is over. Every other method does it first."""
        ends = self._ends
        if not ends:
            return
        now = self._clock()
        while ends and ends[0][0] <= now:
            _, lease = heapq.heappop(ends)
            found = self._leases.get(lease)
            if found is None:
                continue
            if found.ends_s <= now:
                self._end(lease)
            else:  # renewed since
                heapq.heappush(ends, (found.ends_s, lease))

    def _end(self, lease: int) -> None:
        found = self._leases.pop(lease, None)
        if found is not None and found.keys:
            events: list[Event] = []
            self._delete(sorted(found.keys), events)
            self._commit(events)

    # ------------------------------------------------------------ history

    def events(self, prefix: str, after_revision: int) -> list[Batch]:
        """The batches after ``after_revision``, each with its events below ``prefix`` only.

        Raises Compacted if some of them are gone.
        """
        self.tick()
        if after_revision < self._compacted - 1:
            raise Compacted
        log = self._log
        found = []
        for batch in log[bisect_right(log, after_revision, key=_revision_of) :]:
            events = tuple([e for e in batch.events if e.kv.key.startswith(prefix)])
            if events:
                found.append(Batch(batch.revision, events))
        return found

    def compact(self, revision: int) -> None:
        """Forgets the events before ``revision``; a watch may still begin at it."""
        if not self._compacted < revision <= self.revision:
            raise ValueError(f"cannot compact at {revision}")
        self._compacted = revision
        del self._log[: bisect_left(self._log, revision, key=_revision_of)]


def _revision_of(batch: Batch) -> int:
    return batch.revision


def _check_disjoint(operations: tuple[Put | Delete, ...]) -> None:
    puts = [o.key for o in operations if isinstance(o, Put)]
    if len(set(puts)) != len(puts):
        raise ValueError("duplicate key given in txn request")
    for operation in operations:
        if isinstance(operation, Delete):
            for key in puts:
                if key == operation.key or (operation.prefix and key.startswith(operation.key)):
                    raise ValueError("duplicate key given in txn request")


class _ModelWatch:
    def __init__(self, prefix: str, revision: int, on_events: OnEvents, on_reset: OnReset) -> None:
        self.prefix = prefix
        self.revision = revision
        self.on_events = on_events
        self.on_reset = on_reset


class ModelCoordinator:
    """``Coordinator`` over a ``ModelEtcd``. Watches deliver when ``deliver`` is called.

    ``available = False`` makes every call raise EtcdUnavailable without an effect.
    """

    def __init__(self, etcd: ModelEtcd) -> None:
        self.etcd = etcd
        self.available = True
        self._watches: list[_ModelWatch] = []

    def _etcd(self) -> ModelEtcd:
        if not self.available:
            raise EtcdUnavailable("the model of etcd is switched off")
        return self.etcd

    def read(self, prefix: str) -> Snapshot:
        return self._etcd().read(prefix)

    def transact(self, txn: Transaction) -> TxnResult:
        return self._etcd().transact(txn)

    def grant(self, ttl_s: int) -> int:
        return self._etcd().grant(ttl_s)

    def keep_alive(self, lease: int) -> int:
        return self._etcd().keep_alive(lease)

    def revoke(self, lease: int) -> None:
        self._etcd().revoke(lease)

    def watch(
        self, prefix: str, revision: int, on_events: OnEvents, on_reset: OnReset
    ) -> Callable[[], None]:
        watch = _ModelWatch(prefix, revision, on_events, on_reset)
        self._watches.append(watch)

        def cancel() -> None:
            if watch in self._watches:
                self._watches.remove(watch)

        return cancel

    def deliver(self) -> None:
        """Brings every watch up to date."""
        for watch in tuple(self._watches):
            try:
                for revision, events in self.etcd.events(watch.prefix, watch.revision):
                    if watch not in self._watches:
                        break
                    watch.on_events(revision, events)
                    watch.revision = revision
            except Compacted:
                snapshot = self.etcd.read(watch.prefix)
                watch.on_reset(snapshot)
                watch.revision = snapshot.revision

    def close(self) -> None:
        self._watches.clear()
