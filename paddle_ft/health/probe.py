"""Measures this node: matrix product, memory copy, disk; and tells the job's other nodes.

Everything is measured over a stretch of time and not by its best moment: a node whose processors
are rationed is quick for moments.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paddle_ft.config import Config
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import Coordinator, Put, Transaction
from paddle_ft.errors import MachineError, NodeUnfit
from paddle_ft.health.figures import NAMES, Figures, shortfalls, told
from paddle_ft.types import decode, encode

PRODUCT_S = 1.0
PRODUCT_SIZE = 768
COPY_S = 0.3
COPY_BYTES = 32 * 2**20
DISK_BYTES = 64 * 2**20
DISK_BLOCK_BYTES = 4 * 2**20
DISK_S_MAX = 60.0


def measure(cache: str = "") -> Figures:
    """What this node can do, in some two seconds. ``cache``: a directory on its disk, or "".

    Raises MachineError if the disk refuses, or takes longer than ``DISK_S_MAX``.
    """
    product, copy = _product_flops(), _copy_bytes_per_s()
    write, read = _disk(Path(cache)) if cache else (0.0, 0.0)
    return Figures(product, copy, write, read)


def _product_flops() -> float:
    a = np.random.default_rng(0).standard_normal((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    result = a @ a  # threads are started
    done, began_s = 0, time.perf_counter()
    while (took_s := time.perf_counter() - began_s) < PRODUCT_S:
        np.matmul(a, a, out=result)
        done += 1
    return 2.0 * PRODUCT_SIZE**3 * done / took_s


def _copy_bytes_per_s() -> float:
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)  # the pages are there
    done, began_s = 0, time.perf_counter()
    while (took_s := time.perf_counter() - began_s) < COPY_S:
        np.copyto(target, source)
        done += 1
    return COPY_BYTES * done / took_s


def _disk(directory: Path) -> tuple[float, float]:
    """Bytes a second written and read. On a thread: a disk that hangs must not hang its probe."""
    found: list[tuple[float, float] | OSError] = []

    def work() -> None:
        try:
            found.append(_write_and_read(directory))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=work, name="disk", daemon=True)
    thread.start()
    thread.join(DISK_S_MAX)
    if not found:
        raise MachineError(
            f"{directory}: {DISK_BYTES / 1e6:.0f} MB were not written and read within "
            f"{DISK_S_MAX:g} s; look at this disk, or give another --cache"
        )
    if isinstance(found[0], OSError):
        raise MachineError(
            f"{directory} cannot be written: {found[0].strerror}; mend that, or give another "
            f"--cache"
        ) from found[0]
    return found[0]


def _write_and_read(directory: Path) -> tuple[float, float]:
    directory.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).bytes(DISK_BLOCK_BYTES)
    count = DISK_BYTES // DISK_BLOCK_BYTES
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        began_s = time.perf_counter()
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
        wrote_s = time.perf_counter() - began_s
        with contextlib.suppress(OSError):  # from the disk, not from memory, where that can be had
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began_s = time.perf_counter()
        while file.read(DISK_BLOCK_BYTES):
            pass
        return DISK_BYTES / wrote_s, DISK_BYTES / (time.perf_counter() - began_s)


# ---------------------------------------------------------------- compared with the job's nodes


def figures_of_others(coordinator: Coordinator, keys: schema.Keys, node: str) -> list[Figures]:
    """What the nodes that were let in have measured, without ``node``."""
    found = []
    for kv in coordinator.read(keys.figures).kvs:
        if kv.key != keys.figures + node:
            with contextlib.suppress(ValueError):  # of another version
                found.append(decode(Figures, kv.value))
    return found


def admit(
    config: Config, coordinator: Coordinator, node: str, say: Callable[[str], object]
) -> None:
    """Measures this node before it joins; raises NodeUnfit if it is not to.

    Who is let in leaves its figures for those who come later.
    """
    keys = schema.Keys(config.job.id)
    figures = measure(config.checkpoint.cache)
    say("; ".join(f"{NAMES[name]}: {value}" for name, value in told_all(figures)))
    bad = shortfalls(figures, figures_of_others(coordinator, keys, node))
    if bad:
        raise NodeUnfit(
            f"node {node} does not join, it is slower than half of the usual node of job "
            f"{config.job.id} ({'; '.join(bad)}): see what else runs on it, or start without "
            f"--probe"
        )
    coordinator.transact(Transaction((), (Put(keys.figures + node, encode(figures)),)))


def told_all(figures: Figures) -> list[tuple[str, str]]:
    """Names of the figures that were measured, and these for people."""
    every = [(name, getattr(figures, name)) for name in NAMES]
    return [(name, told(name, value)) for name, value in every if value]
