"""One launcher at a time on a checkpoint store, where no etcd of the job sees to it.

A launcher with a private etcd knows of no other. In a directory it holds a lock that ends with its
process, however that ends. An object store has no such lock: there it leaves a note, and who finds
the note of another that may be alive warns; what ``commit`` says of owners keeps both safe.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paddle_ft.checkpoint.store import Store
from paddle_ft.checkpoint.store_directory import LOCK, DirectoryStore
from paddle_ft.errors import ConfigError, StoreError

_log = logging.getLogger(__name__)
NOTE = "launcher.json"
_HANDOVER_S = 3.0
"""How long one that is being killed gets to be gone."""


@contextmanager
def alone(store: Store, job: str) -> Iterator[None]:
    """Has ``store`` for this process while the block lasts; raises ConfigError if another has.

    Without an effect, but for a warning, where the store cannot be reached or cannot lock.
    """
    if isinstance(store, DirectoryStore):
        with _locked(store.root, job):
            yield
    elif store.url.startswith("s3://"):
        with _noted(store, job):
            yield
    else:
        yield


@contextmanager
def _locked(directory: Path, job: str) -> Iterator[None]:
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if directory.is_dir():  # else whoever writes to it first is told that it cannot be made
            _log.warning("%s cannot be locked (%s): use it once at a time.", path, error.strerror)
        yield
        return
    try:
        until_s = time.monotonic() + _HANDOVER_S
        while not _try_lock(descriptor, path):
            if time.monotonic() >= until_s:
                other = _who(os.pread(descriptor, 4096, 0))
                raise ConfigError(
                    f"{directory} is in use by another launcher ({other}): give this one another "
                    f"--checkpoint, or both the same --etcd."
                )
            time.sleep(0.05)
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _myself(job), 0)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    """False if another process has it. A file system that cannot lock counts as locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("%s cannot be locked (%s): use it once at a time.", path, error.strerror)
    return True


@contextmanager
def _noted(store: Store, job: str) -> Iterator[None]:
    mine = _myself(job)
    try:
        with suppress(StoreError):
            found = store.get(NOTE)
            if _may_live(found):
                _log.warning(
                    "%s was last used by another launcher (%s) that did not end in order: give "
                    "each its own --checkpoint, or both the same --etcd, if it still runs.",
                    store.url,
                    _who(found),
                )
        with suppress(StoreError):
            store.put(NOTE, mine)
        yield
    finally:
        with suppress(StoreError):
            if store.get(NOTE) == mine:
                store.delete([NOTE])


def _myself(job: str) -> bytes:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "job": job}).encode()


def _read(content: bytes) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {}


def _who(content: bytes) -> str:
    told = _read(content)
    return ", ".join(f"{key} {told[key]}" for key in ("job", "pid", "host") if key in told) or "?"


def _may_live(content: bytes) -> bool:
    """Not if it is known to be gone: it ran on this host, and there is no such process."""
    told = _read(content)
    if told.get("host") != socket.gethostname() or not isinstance(told.get("pid"), int):
        return True
    try:
        os.kill(told["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return bool(told["pid"] != os.getpid())
