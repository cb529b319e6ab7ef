"""A directory on a local SSD in front of a slower store: recent blocks are read from it.

Invariant: the cache holds copies only. An object comes into it after the store behind has it, so
anything in it may go at any time, and no fault of it (full, broken, altered, removed by hand) is
more than a slower read: what it gives is verified block by block, and a bad block is fetched from
the store behind and the copy dropped.

With ``durable = "local"`` the directory also holds what the store does not have yet (``spool``):
that is no part of the cache, is read in place, and takes its room first.

Only ``data/`` is kept here. The bound ``bytes_max`` holds after every write; what was used least
recently goes first (the time of a file's last use is its modification time). Several processes may
share the directory. Memory: ``_FETCHES_MAX`` objects of ``write.PACK_BYTES`` while fetching.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.store import Buffers, ObjectInfo, Store, views
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import StoreError
from paddle_ft.failpoints import failpoint

_log = logging.getLogger(__name__)
_FETCHES_MAX = 4
UNSENT = "unsent/"
"""Below it are the spools."""
_ROOM = 0.9
"""Eviction goes down to this share of the bound, so that it need not be done at each write."""


class TieredStore:
    """``remote`` with a cache at ``root``; ``tiers`` are the two, nearest first."""

    def __init__(
        self, root: Path, remote: Store, config: CheckpointConfig, cache: Cache | None = None
    ) -> None:
        self._remote = remote
        self._cache = cache or Cache(root, remote, config)
        self.tiers: tuple[Store, ...] = (self._cache, remote)

    @property
    def url(self) -> str:
        return self._remote.url

    def put(self, name: str, data: Buffers, *, if_absent: bool = False) -> bool:
        done = self._remote.put(name, data, if_absent=if_absent)
        failpoint("tiers.remote")
        if done and name.startswith(layout.DATA):
            self._cache.keep(name, data)
        return done

    def get(self, name: str) -> bytes:
        return self._remote.get(name)

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        self._remote.read_into(name, offset, targets)

    def find(self, prefix: str) -> list[ObjectInfo]:
        return self._remote.find(prefix)

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._cache.discard(names)
        self._remote.delete(names)

    def check(self) -> None:
        self._remote.check()

    def sweep(self) -> None:
        self._cache.sweep()
        self._remote.sweep()


class Cache(DirectoryStore):
    """The nearer tier. To a reader it looks like a store that has everything ``remote`` has."""

    def __init__(self, root: Path, remote: Store, config: CheckpointConfig) -> None:
        super().__init__(root, config.model_copy(update={"attempts": 1}), durable=False)
        self.remote = remote
        """Where it fetches from."""
        self._bytes_max = config.cache_bytes_max
        self.lock = threading.Lock()
        """Held by whoever makes room."""
        self._fetches = threading.BoundedSemaphore(_FETCHES_MAX)
        self._broken = False

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        path = self.root / name
        if _holds(self.remote, name):
            self.remote.read_into(name, offset, targets)
            return
        if not path.exists():
            with self._fetches:
                if not path.exists():
                    self.keep(name, self.remote.get(name))
        super().read_into(name, offset, targets)
        with suppress(OSError):
            os.utime(path)

    def holds(self, name: str) -> bool:
        """Whether it need not be fetched first."""
        return (self.root / name).exists() or _holds(self.remote, name)

    def keep(self, name: str, data: Buffers) -> None:
        """Keeps a copy if it can."""
        nbytes = sum(view.nbytes for view in views(data))
        if nbytes > self._bytes_max or _holds(self.remote, name):
            return
        try:
            with self.lock:
                if not self.make_room(nbytes):
                    return
            self.put(name, data)
            self._broken = False
        except StoreError as error:
            if not self._broken:
                _log.warning("The cache does not take anything; training goes on: %s", error)
            self._broken = True

    def discard(self, names: Iterable[str]) -> None:
        with suppress(StoreError):
            self.delete(names)

    def used_bytes(self) -> int:
        return sum(info.nbytes for info in self.find(layout.DATA))

    def unsent_bytes(self) -> int:
        """What the spools hold; what is being written is not counted."""
        infos = self.find(UNSENT)
        return sum(info.nbytes for info in infos if "/.tmp/" not in info.name)

    def make_room(self, nbytes: int) -> bool:
        """Whether there is room for ``nbytes`` more; copies go for it, the oldest first.

        For who has the lock. Raises StoreError if what is there cannot be removed.
        """
        infos = self.find(layout.DATA)
        used = sum(info.nbytes for info in infos) + nbytes + self.unsent_bytes()
        if used <= self._bytes_max:
            return True
        for info in sorted(infos, key=lambda info: info.modified_s):
            if used <= self._bytes_max * _ROOM:
                break
            self.delete([info.name])
            used -= info.nbytes
        return used <= self._bytes_max


def _holds(store: Store, name: str) -> bool:
    """Whether ``name`` waits on this machine to be sent to the store."""
    spool = getattr(store, "spool", None)
    return spool is not None and spool.holds(name)


def cached(remote: Store, config: CheckpointConfig) -> Store:
    """``remote`` with the cache that ``config`` names, if it names one."""
    return TieredStore(Path(config.cache), remote, config) if config.cache else remote
