"""The few etcd operations that everything is built on, as plain data.

Invariant: a write that matters is a ``Transaction`` whose comparisons make it safe to send twice.
An answer may be lost after the write took effect (``EtcdUnavailable`` means "not known"); whoever
sent it looks at the state again instead of assuming.

``tests/contract`` runs one suite against the model of the simulator and against a real etcd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Field = Literal["create_revision", "mod_revision"]


@dataclass(frozen=True, slots=True)
class Compare:
    """``key``'s revision equals ``revision``; 0 means that the key does not exist."""

    key: str
    field: Field
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Removes ``key``, or everything that begins with it if ``prefix``."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Transaction:
    """All ``operations`` if all ``compares`` hold, else nothing."""

    compares: tuple[Compare, ...]
    operations: tuple[Put | Delete, ...]


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one key. For a deletion ``kv.value`` is empty."""

    deleted: bool
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys below a prefix as they were at ``revision``."""

    revision: int
    kvs: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class TxnResult:
    succeeded: bool
    revision: int


OnEvents = Callable[[int, tuple[Event, ...]], None]
"""Called with (revision, events) in order, no gap, no repetition. Must not block for long."""
OnReset = Callable[[Snapshot], None]
"""Called when events were compacted away: this snapshot replaces all that was known."""


class Coordinator(Protocol):
    """What ``coordination.etcd.EtcdCoordinator`` and the model of the simulator offer.

    Every call takes at most the client's time-out and then raises EtcdUnavailable.
    """

    def read(self, prefix: str) -> Snapshot:
        """Everything below ``prefix``, linearizable."""
        ...

    def transact(self, txn: Transaction) -> TxnResult:
        """Runs ``txn``. After EtcdUnavailable it may or may not have taken effect.

        Raises LeaseLost if it puts under a lease that has ended, ValueError if it touches a key
        twice.
        """
        ...

    def grant(self, ttl_s: int) -> int:
        """A new lease. etcd grants at least 2 s."""
        ...

    def keep_alive(self, lease: int) -> int:
        """Renews ``lease`` and gives its time to live in s; 0 if it has ended."""
        ...

    def revoke(self, lease: int) -> None:
        """Ends ``lease`` and deletes its keys; no error if it had ended already."""
        ...

    def watch(
        self, prefix: str, revision: int, on_events: OnEvents, on_reset: OnReset
    ) -> Callable[[], None]:
        """Delivers changes after ``revision`` on a thread of its own until the result is called."""
        ...

    def close(self) -> None: ...
