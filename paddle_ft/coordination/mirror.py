"""A live copy of all keys below a prefix: read once, then followed by the watch.

Invariant: the copy is always some past state of etcd, whole (one revision), and never goes back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from paddle_ft.coordination.kv import Coordinator, Event, KeyValue, Snapshot
from paddle_ft.coordination.schema import JobState, Keys, parse
from paddle_ft.errors import CoordinationError


class Mirror:
    """Args:
    prefix: of the keys.
    notify: called from the watch's thread after each change; must not block.
    """

    def __init__(self, coordinator: Coordinator, prefix: str, notify: Callable[[], None]) -> None:
        self._coordinator = coordinator
        self._prefix = prefix
        self._notify = notify
        self._lock = threading.Lock()
        self._kvs: dict[str, KeyValue] = {}
        self._revision = 0
        self._lost = ""
        self._cancel: Callable[[], None] | None = None

    def start(self) -> None:
        """Reads the keys and begins to follow them; raises EtcdUnavailable."""
        self._reset(self._coordinator.read(self._prefix))
        self._cancel = self._coordinator.watch(
            self._prefix, self._revision, self._apply, self._reset_and_notify
        )

    def snapshot(self) -> Snapshot:
        """The newest state that is known; raises CoordinationError if etcd has lost data."""
        with self._lock:
            if self._lost:
                raise CoordinationError(self._lost)
            return Snapshot(self._revision, tuple(self._kvs.values()))

    @property
    def lost(self) -> bool:
        """Whether etcd has lost data: nothing is followed any more."""
        with self._lock:
            return bool(self._lost)

    @property
    def revision(self) -> int:
        """The newest revision that is known to have changed one of the keys."""
        with self._lock:
            return self._revision

    def revision_of(self, key: str) -> int:
        """mod_revision of ``key``; 0 if it is not there."""
        with self._lock:
            kv = self._kvs.get(key)
            return kv.mod_revision if kv else 0

    def close(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None

    def _reset(self, snapshot: Snapshot) -> None:
        with self._lock:
            if snapshot.revision < self._revision:
                self._lost = (
                    f"etcd stands at revision {snapshot.revision} and was at {self._revision}: it "
                    f"has lost data; start the job again, it goes on from the newest checkpoint"
                )
                return
            self._kvs = {kv.key: kv for kv in snapshot.kvs}
            self._revision = snapshot.revision

    def _reset_and_notify(self, snapshot: Snapshot) -> None:
        self._reset(snapshot)
        self._notify()

    def _apply(self, revision: int, events: tuple[Event, ...]) -> None:
        with self._lock:
            for event in events:
                if event.deleted:
                    self._kvs.pop(event.kv.key, None)
                else:
                    self._kvs[event.kv.key] = event.kv
            self._revision = max(self._revision, revision)
        self._notify()


class JobMirror(Mirror):
    """The copy of one job's keys. ``notify``: as for ``Mirror``."""

    def __init__(self, coordinator: Coordinator, keys: Keys, notify: Callable[[], None]) -> None:
        super().__init__(coordinator, keys.prefix, notify)
        self._keys = keys
        self._parsed: tuple[int, JobState] | None = None

    def state(self) -> JobState:
        """The newest state that is known.

        Raises:
            CoordinationError: a key holds what this version of paddle_ft does not write, or etcd
                has lost data.
        """
        with self._lock:
            if self._lost:
                raise CoordinationError(self._lost)
            if self._parsed is None or self._parsed[0] != self._revision:
                try:
                    state = parse(self._keys, self._kvs.values())
                except ValueError as error:
                    raise CoordinationError(
                        f"etcd holds something else than this version of paddle_ft expects "
                        f"({error}): use another --job_id or one version for all nodes"
                    ) from error
                self._parsed = (self._revision, state)
            return self._parsed[1]
