"""A session without a launcher that keeps its own checkpoints in a directory or object store.

Rank 0 saves for all; every rank loads. Ctrl-C and SIGTERM save after the step that is under way and
end the process with 130 or 143; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import threading
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import Any

from paddle_ft import config as settings
from paddle_ft.agent.ipc import Order
from paddle_ft.checkpoint import commit, plan, retention
from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.manifest import Manifest
from paddle_ft.checkpoint.restore import fetch, infos
from paddle_ft.checkpoint.shards import read_boxes
from paddle_ft.checkpoint.snapshot import Image
from paddle_ft.checkpoint.standalone import SAVES_MAX, SaveHandle, save_image
from paddle_ft.checkpoint.store import open_store
from paddle_ft.errors import (
    EXIT_SIGINT,
    EXIT_SIGTERM,
    CheckpointDamaged,
    CheckpointError,
    StoreError,
)
from paddle_ft.exits import say
from paddle_ft.keeper import Kind
from paddle_ft.types import CommitRef, ImageInfo, Recovery

_log = logging.getLogger(__name__)
_TELL_INTERVAL_S = 5.0


class StandaloneKeeper:
    """Keeps the checkpoints of this script at ``url``; at most ``SAVES_MAX`` are on their way.

    Raises ConfigError, StoreError if ``url`` cannot be used.
    """

    def __init__(self, url: str, rank: int) -> None:
        self.saves = rank == 0
        self.committed_step = -1
        self.pause_reason = ""
        self.pause_exit_code = 0
        self.asked: frozenset[int] = frozenset()
        self.order: Order | None = None
        self._rank = rank
        self._config = settings.load({}, os.environ).config.checkpoint
        self._store = open_store(url, self._config)
        if self.saves:
            self._store.check()
        self._memory: dict[int, mmap.mmap] = {}
        self._handles: dict[int, tuple[int, SaveHandle]] = {}
        """Step and handle of what is on its way, by buffer."""
        self._failed: dict[int, StoreError | CheckpointError] = {}
        self._taken: set[int] = set()
        self._lock = threading.RLock()
        self._handlers: dict[int, Any] = {}
        self._catch_signals()

    def join(self, rank: int, world_size: int, generation: int, recovery: Recovery) -> None:
        pass

    def lost_peer(self, reason: str) -> None:
        pass

    def wait_order(self, after: int) -> Order:
        raise AssertionError("nobody gives orders")

    # ------------------------------------------------------------ the state to start from

    def restore(self) -> Image | None:
        damage: CheckpointDamaged | None = None
        for ref in commit.list_commits(self._store):
            try:
                manifest = commit.read_manifest(self._store, ref)
                wanted = plan.plan_read(manifest, [self._rank])
                memory = memoryview(mmap.mmap(-1, max(1, wanted.nbytes)))
                fetch(self._store, ref.manifest, wanted.targets, memory)
            except CheckpointDamaged as error:
                _log.warning("%s", error)
                damage = damage or error
                continue
            self.committed_step = ref.step
            info = infos(manifest, wanted, self._rank + 1)[self._rank]
            return Image(info, memory, partial(self._read_boxes, ref, manifest))
        if damage is not None:
            raise damage
        return None

    def _read_boxes(
        self, ref: CommitRef, manifest: Manifest, wanted: Mapping[str, Box]
    ) -> dict[str, memoryview]:
        found = read_boxes(self._store, ref, manifest, wanted)
        return {name: memoryview(array.tobytes()) for name, array in found.items()}

    # ------------------------------------------------------------ buffers

    def free(self) -> bool:
        with self._lock:
            self._look_after()
            return len(self._taken) < SAVES_MAX

    def acquire(self, nbytes: int, wait: bool) -> tuple[int, memoryview] | None:
        while not self.free():
            if not wait:
                return None
            with self._lock:
                oldest = min(self._handles.values(), key=lambda handle: handle[0])
            self._wait(*oldest)
        with self._lock:
            buffer = next(b for b in range(SAVES_MAX) if b not in self._taken)
            self._taken.add(buffer)
            memory = self._memory.get(buffer)
            if memory is None or len(memory) < nbytes:
                memory = self._memory[buffer] = mmap.mmap(-1, max(1, nbytes))
            return buffer, memoryview(memory)

    def publish(self, buffer: int, info: ImageInfo) -> None:
        memory = memoryview(self._memory[buffer])[: plan.image_bytes(info.tensors)]
        keep = retention.KeepLast(self._config.keep_last)
        handle = save_image(self._store.url, info, memory, keep=keep, config=self._config)
        with self._lock:
            self._handles[buffer] = info.step, handle

    def give_back(self, buffer: int) -> None:
        with self._lock:
            self._taken.discard(buffer)

    def wait_committed(self, step: int) -> None:
        with self._lock:
            waiting = [handle for handle in self._handles.values() if handle[0] <= step]
        for handle in sorted(waiting, key=lambda handle: handle[0]):
            self._wait(*handle)
        with self._lock:
            self._look_after()
        if step in self._failed:
            raise self._failed[step]

    def published(self, name: str, version: int, store: str) -> None:
        pass  # there is no etcd

    def _look_after(self) -> None:
        """Takes note of what has been written meanwhile."""
        for buffer, (step, handle) in list(self._handles.items()):
            if not handle.done():
                continue
            del self._handles[buffer]
            self._taken.discard(buffer)
            try:
                handle.wait(0)
                self.committed_step = max(self.committed_step, step)
            except (StoreError, CheckpointError) as error:  # it was logged; the next may succeed
                self._failed[step] = error

    def _wait(self, step: int, handle: SaveHandle) -> None:
        waited_s = 0.0
        while not handle.done():
            try:
                handle.wait(_TELL_INTERVAL_S)
            except TimeoutError:
                waited_s += _TELL_INTERVAL_S
                say(f"waits for the checkpoint of step {step} to be stored ({waited_s:.0f} s)")
            except (StoreError, CheckpointError):
                pass

    # ------------------------------------------------------------ signals and the end

    def close(
        self, kind: Kind | None, reason: str = "", exit_code: int = 0, step: int = -1
    ) -> None:
        for number, handler in self._handlers.items():
            # None: it was set by a library, not by Python, and cannot be had back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there can they be caught
        for number, handler in (
            (signal.SIGINT, self._on_stop),
            (signal.SIGTERM, self._on_stop),
            (signal.SIGUSR1, self._on_save),
        ):
            self._handlers[number] = signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.pause_reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pause_reason = signal.Signals(number).name
        self.pause_exit_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
        if self._rank == 0:
            say("saves after this step and ends; once more Ctrl-C ends at once, without saving")

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.asked |= {number}
