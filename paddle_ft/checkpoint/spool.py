"""What a launcher has acknowledged and the store does not have yet, on the disk of the cache.

    durable = "remote"   writer -> store -> copy in the cache
    durable = "local"    writer -> spool (synced) -> acknowledged
                                     spool -> uploader, in the order of commits -> store
                                     the file becomes the copy in the cache

    <cache>/data/…                     copies: may go at any time
    <cache>/unsent/<store and job>/<n>/    a spool; whoever holds the lock in it owns it

Invariant: an object leaves the spool only after the store has it. A launcher that begins takes over
every spool of its job whose launcher is gone, so what a killed one left is uploaded on. ``backlog``
says in which order, and when a marker may go.

The spools and the copies together stay below ``cache_bytes_max``: copies give way; when none is
left, data is written to the store at once, which then is what its writer waits for. Memory of the
uploader: ``UPLOAD_THREADS`` objects of ``write.PACK_BYTES``.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from paddle_ft.checkpoint import backlog, layout
from paddle_ft.checkpoint.store import Buffers, ObjectInfo, Store, views
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.checkpoint.tiers import UNSENT, Cache
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import ConfigError, StoreError, StoreFull, StoreMissing
from paddle_ft.failpoints import failpoint

_log = logging.getLogger(__name__)
_SLOTS_MAX = 1000
_LOCK = ".lock"
OWNER = "owner"
"""The history of heads this spool is of: what ``commit.binding`` gave."""
_DATA_SHARE = 0.9
"""Of the bound, that data may take: manifests and markers have room when data has none."""


class Spool(DirectoryStore):
    """The objects that wait, synced; made by ``claim``. Safe for threads of one process."""

    def __init__(self, root: Path, cache: Cache, config: CheckpointConfig, lock: int) -> None:
        super().__init__(root, config.model_copy(update={"attempts": 1}))
        self._cache = cache
        self._bytes_max = config.cache_bytes_max
        self._descriptor = lock
        self._writing = 0

    @classmethod
    def claim(
        cls, cache: Cache, config: CheckpointConfig, url: str, job: str, wait_s: float = 0.0
    ) -> Spool:
        """A spool for ``job`` on the store ``url``, one that was left behind if there is one.

        ``wait_s`` is given to a launcher that is just being killed. Raises ConfigError if the
        directory cannot be used.
        """
        key = hashlib.sha256(f"{url}\n{job}".encode()).hexdigest()[:16]
        place = cache.root / UNSENT / key
        until_s = time.monotonic() + wait_s
        try:
            place.mkdir(parents=True, exist_ok=True)
            while True:
                old = _numbers(place)
                last = time.monotonic() >= until_s or not old
                for number in [*old, *(n for n in range(_SLOTS_MAX) if last and n not in old)]:
                    root = place / str(number)
                    if (lock := _lock(root)) is not None:
                        shutil.rmtree(root / ".tmp", ignore_errors=True)
                        return cls(root, cache, config, lock)
                time.sleep(0.05)
        except OSError as error:
            raise ConfigError(
                f"--cache {cache.root} cannot be used: {error.strerror}; name another directory."
            ) from error

    def adopt(self) -> None:
        """Takes over what other spools of this job hold whose launchers are gone."""
        with suppress(OSError):
            for number in _numbers(self.root.parent):
                other = self.root.parent / str(number)
                if other == self.root or (lock := _lock(other)) is None:
                    continue
                try:
                    _move(other, self.root)
                finally:
                    os.close(lock)

    def keep(self, name: str, data: Buffers) -> None:
        """Stores ``data`` durably; raises StoreFull if the bound does not allow it, StoreError."""
        nbytes = sum(view.nbytes for view in views(data))
        share = _DATA_SHARE if name.startswith(layout.DATA) else 1.0
        with self._cache.lock:
            unsent = self._cache.unsent_bytes() + self._writing + nbytes
            if unsent > self._bytes_max * share:
                raise StoreFull(
                    f"{self._cache.url} holds {unsent - nbytes} bytes that wait for their upload; "
                    f"make cache_bytes_max larger than {self._bytes_max}."
                )
            self._cache.make_room(self._writing + nbytes)
            self._writing += nbytes
        try:
            self.put(name, data)
        finally:
            with self._cache.lock:
                self._writing -= nbytes

    def holds(self, name: str) -> bool:
        return (self.root / name).exists()

    def waiting(self) -> list[ObjectInfo]:
        """What is to be uploaded."""
        return [info for info in self.find("") if layout.parse(info.name)]

    def sent(self, name: str) -> None:
        """The store has ``name``: what is here is a copy from now on."""
        path = self.root / name
        if name.startswith(layout.DATA):
            target = self._cache.root / name
            with suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
                os.utime(target)
        self.delete([name])

    def recall(self, name: str) -> str:
        """A small text that outlives the launcher; "" if there is none."""
        with suppress(StoreError, UnicodeDecodeError):
            return self.get(name).decode()
        return ""

    def close(self) -> None:
        """Gives the spool to whoever comes next."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class WriteBack:
    """``remote`` as its writer sees it who keeps back what ``backlog.waits`` for.

    Args:
        shared: launchers on other nodes read what this one writes.
    """

    def __init__(self, spool: Spool, remote: Store, *, shared: bool) -> None:
        self.spool = spool
        self._remote = remote
        self._shared = shared
        self._full = False
        self.kept = threading.Event()
        """Set when something new waits."""

    @property
    def url(self) -> str:
        return self._remote.url

    def put(self, name: str, data: Buffers, *, if_absent: bool = False) -> bool:
        parsed = layout.parse(name)
        if parsed is None or if_absent or not backlog.waits(parsed.kind, self._shared):
            return self._remote.put(name, data, if_absent=if_absent)
        try:
            self.spool.keep(name, data)
            failpoint("spool.kept")
            self.kept.set()
            self._full = self._full and parsed.kind != "data"
        except StoreError as error:
            if parsed.kind == "commit":
                raise  # it must not come into the store before what it speaks of
            if not self._full:
                _log.warning("Checkpoints are written to the store at once for now: %s", error)
            self._full = True
            return self._remote.put(name, data)
        return True

    def get(self, name: str) -> bytes:
        with suppress(StoreMissing):
            if layout.parse(name):
                return self.spool.get(name)
        if name != layout.STORE:
            return self._remote.get(name)
        try:
            content = self._remote.get(name)
        except StoreMissing:
            raise
        except StoreError as error:
            if not self.spool.holds(name):
                raise
            _log.info("%s", error)
            return self.spool.get(name)
        self.spool.put(name, content)
        return content

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        if self.spool.holds(name):
            with suppress(StoreMissing):  # it has just been sent
                self.spool.read_into(name, offset, targets)
                return
        self._remote.read_into(name, offset, targets)

    def find(self, prefix: str) -> list[ObjectInfo]:
        # The spool first: what is sent in between is then found twice, not missed.
        here = {i.name: i for i in self.spool.find(prefix) if layout.parse(i.name)}
        found = here | {info.name: info for info in self._remote.find(prefix)}
        return [found[name] for name in sorted(found)]

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self.spool.delete(n for n in names if layout.parse(n))
        self._remote.delete(names)

    def check(self) -> None:
        try:
            self._remote.check()
        except StoreError as error:
            if not self.spool.holds(layout.STORE):
                raise  # it was never reached from here: more likely mistyped than away
            _log.warning("The store is away; what is saved waits in the cache: %s", error)

    def sweep(self) -> None:
        self.spool.sweep()
        self._remote.sweep()


def _numbers(place: Path) -> list[int]:
    return sorted(int(p.name) for p in place.iterdir() if p.name.isdigit())


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the lock of ``directory``; None if somebody else does."""
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _move(source: Path, target: Path) -> None:
    """All that waits in one spool into another; both are held."""
    for folder, _, files in os.walk(source):
        relative = Path(folder).relative_to(source)
        for file in files:
            if layout.parse(str(relative / file)):
                (target / relative).mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder, file), target / relative / file)
