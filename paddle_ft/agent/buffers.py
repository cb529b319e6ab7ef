"""Shared memory that belongs to the agent: the snapshots of its workers, and blocks found in them.

A snapshot stays in its buffer after it was written, until the worker takes the next one there. So
blocks of the newest checkpoint can be copied from here when the workers restart; whoever does so
compares digests, since a buffer may be overwritten at any time.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from paddle_ft.checkpoint.manifest import Block

log = logging.getLogger("paddle_ft")

YOUNG_S = 10.0
"""A directory that was just made may not be locked yet."""


class Buffers:
    """Snapshot buffers as files on shared memory, by generation, rank and index."""

    def __init__(self, directory: Path, each: int) -> None:
        self._directory = directory
        self._each = each
        self._files: dict[tuple[int, int], list[tuple[Path, mmap.mmap]]] = {}
        self._places: dict[tuple[int, int, int], dict[str, int]] = {}
        """What was last written from a buffer: digest of each block -> offset."""
        self._lock = threading.Lock()

    def allocate(self, generation: int, rank: int, nbytes: int) -> tuple[str, ...]:
        """Paths of the buffers of one worker; empty if there is not enough shared memory."""
        with self._lock:
            self._drop((generation, rank))
            files: list[tuple[Path, mmap.mmap]] = []
            self._files[generation, rank] = files
            for index in range(self._each):
                path = self._directory / f"snapshot-{generation}-{rank}-{index}"
                try:
                    files.append((path, _reserve(path, max(nbytes, 1))))
                except OSError as error:
                    log.error(
                        "no shared memory for a snapshot of %.0f MB (%s): checkpoints are off "
                        "until there is more; enlarge /dev/shm or lower checkpoint.buffers",
                        nbytes / 1e6,
                        error.strerror,
                    )
                    self._drop((generation, rank))
                    return ()
            return tuple(str(path) for path, _ in files)

    def view(self, generation: int, rank: int, index: int) -> memoryview | None:
        """One buffer; None if it is gone, or another generation's now."""
        with self._lock:
            files = self._files.get((generation, rank))
            return memoryview(files[index][1]) if files else None

    def hold(self, generation: int, rank: int, index: int, places: dict[str, int]) -> None:
        """Notes where in a buffer the blocks are that were written from it."""
        with self._lock:
            if (generation, rank) in self._files:
                self._places[generation, rank, index] = places

    def copies(self, block: Block) -> list[memoryview]:
        """Where ``block`` has been; a worker may have overwritten it since."""
        with self._lock:
            return [
                memoryview(self._files[generation, rank][index][1])[at : at + block.nbytes]
                for (generation, rank, index), places in self._places.items()
                if (at := places.get(block.digest)) is not None
            ]

    def hand_on(self, ranks: Mapping[int, int], before: int, generation: int) -> None:
        """Workers that go on keep their buffers. ``ranks``: old to new ones."""
        with self._lock:
            moved = {
                (generation, new): self._files.pop((before, old))
                for old, new in ranks.items()
                if (before, old) in self._files
            }
            kept = {
                (generation, ranks[rank], index): places
                for (number, rank, index), places in self._places.items()
                if number == before and rank in ranks
            }
            self._files |= moved
            self._places = {
                key: places
                for key, places in self._places.items()
                if not (key[0] == before and key[1] in ranks)
            } | kept

    def drop_before(self, generation: int) -> None:
        """Frees the buffers of earlier generations."""
        with self._lock:
            for key in [k for k in self._files if k[0] < generation]:
                self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        for place in [p for p in self._places if p[:2] == key]:
            del self._places[place]
        for path, mapped in self._files.pop(key, []):
            path.unlink(missing_ok=True)
            try:
                mapped.close()
            except BufferError:
                pass  # a view is still being written from; freed with it


def _reserve(path: Path, nbytes: int) -> mmap.mmap:
    """A file of ``nbytes`` whose pages exist, so that a later write cannot fail with SIGBUS."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return mmap.mmap(descriptor, nbytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def shared_directory(job: str) -> Path:
    """A private directory on shared memory (or the temporary one) for this launcher."""
    shared = Path("/dev/shm")  # noqa: S108  the directory made there is private
    parent = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    remove_leftovers(parent)
    return own_directory(job, parent)


_locks: list[int] = []
"""Held until the process ends: who lives holds the locks on its directories."""


def own_directory(name: str, parent: Path) -> Path:
    """A new private directory, locked for as long as this process lives."""
    path = Path(tempfile.mkdtemp(prefix=f"paddle_ft-{os.getpid()}-{name}-", dir=parent))
    hold(path)
    return path


def hold(path: Path) -> None:
    """Locks the directory ``path`` for as long as this process lives: it is no leftover."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _locks.append(descriptor)


def remove_leftovers(
    parent: Path, names: str = "paddle_ft-[0-9]*-*", young_s: float = YOUNG_S
) -> None:
    """Removes the directories there that nobody holds, as those of launchers that were killed.

    One in which something came or went less than ``young_s`` ago stays. A pid would not
    do: the owner may live in another PID namespace.
    """
    for path in parent.glob(names):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            age_s = time.time() - os.fstat(descriptor).st_mtime
            if age_s >= young_s and os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(descriptor)
