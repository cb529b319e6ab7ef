"""The agent's memory of the workers' state: buffers, the writer behind them, the restored image.

Invariants:
- buffers belong to the agent and outlive the workers: what a worker had copied when it died is
  still written;
- a step is written once the images of all ranks of this node are there, and its buffers are given
  back after that, never before;
- at most ``buffers`` snapshots of a rank are in flight. Who finds no free buffer does not wait: the
  workers agree to try again at the next step;
- buffers of workers that are gone stay until the next ones have their state, also if that was to
  come from workers that go on: should they be gone, too, blocks of the restore point that are still
  there are copied from there (``near``), verified like all others.

Memory, for S bytes of state on W ranks of which R are here, local tensors counted with each rank:

    while training       buffers x S x R / W
    while restarting     buffers x S x R / W  +  S        (the image all ranks here start from)

The old buffers go before the workers are told of the image, the image once each of them has mapped
it (they drop it when they have copied it); new buffers are made for the first snapshot. Beside
that: 16 bytes for each sub-block that differs (``checkpoint.deltas``), and the manifests.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from paddle_ft.agent.buffers import (
    Buffers,
    own_directory,
    remove_leftovers,
    shared_directory,
)
from paddle_ft.agent.ipc import Allocated, Channel, Released, RestoreReply, SnapshotReady
from paddle_ft.agent.loading import RETRY_INTERVAL_S, loaded
from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.errors import (
    EXIT_BUG,
    CheckpointError,
    PaddleFTError,
    StoreError,
)
from paddle_ft.types import CommitRef, Generation, ImageInfo, Part

__all__ = [
    "PartWritten",
    "SnapshotKeeper",
    "StateFailed",
    "own_directory",
    "remove_leftovers",
    "shared_directory",
]

log = logging.getLogger("paddle_ft")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PartWritten:
    """Event: this node's part of a step is in the store."""

    part: Part


@dataclass(frozen=True, slots=True)
class StateFailed:
    """Event: the state cannot be loaded (``damaged`` if its bytes are lost) or not be saved."""

    generation: int
    manifest: str
    damaged: bool
    reason: str
    exit_code: int


@dataclass(slots=True)
class _Image:
    channel: Channel
    message: SnapshotReady


@dataclass(frozen=True, slots=True)
class _Load:
    """A restore point, until it is loaded."""

    ref: CommitRef
    ranks: tuple[int, ...]
    world_size: int


@dataclass(frozen=True, slots=True)
class _Job:
    generation: int
    step: int
    images: tuple[_Image, ...]


class SnapshotKeeper:
    """Args:
    room: the checkpoint store of the job.
    directory: private directory on shared memory.
    emit: called with PartWritten and StateFailed from threads of this object.
    """

    def __init__(
        self,
        room: CheckpointRoom,
        directory: Path,
        buffers: int,
        emit: Callable[[PartWritten | StateFailed], None],
    ) -> None:
        self._room = room
        self._directory = directory
        self._buffers = Buffers(directory, buffers)
        self._emit = emit
        self._lock = threading.Condition()
        self._generation = 0
        self._member = ""
        self._ranks: frozenset[int] = frozenset()
        self._arrived: dict[int, dict[int, _Image]] = {}
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=2 * buffers + 2)
        self._pending: list[int] = []
        self._base: CommitRef | None = None
        self._sequence = 0
        self._point: CommitRef | None = None
        """Where the generation starts."""
        self._boxes_read = 0
        self._restored: dict[int, RestoreReply] = {}
        self._untaken: set[int] = set()
        """Ranks that have not mapped the restored image yet."""
        self._restore_done = True
        self._load: _Load | None = None
        self._closed = False
        self.trouble = ""
        """Why the newest write is not getting on; "" if all is well. For the status line."""
        self._writer = threading.Thread(target=self._write_all, name="snapshots", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------ one generation

    def begin(
        self,
        generation: Generation,
        member: str,
        ranks: Sequence[int],
        sequence: int,
        stay: Mapping[int, int],
    ) -> None:
        """Turns to ``generation``; loads its restore point in the background.

        Where workers go on in place it is loaded when one of them asks for it, since others have
        newer states. ``sequence`` is that of the head, which is past the restore point if that is
        a fallback. ``stay``: old and new ranks of the workers here that go on.
        """
        number, restore = generation.number, generation.restore
        with self._lock:
            before, self._generation = self._generation, number
            self._member = member
            self._ranks = frozenset(ranks)
            dropped = [image for images in self._arrived.values() for image in images.values()]
            self._arrived.clear()
            self._load = _Load(restore, tuple(ranks), generation.world_size) if restore else None
            self._restored.clear()
            self._untaken.clear()
            self._restore_done = restore is None
            self._base, self._sequence, self._point = restore, sequence, restore
            self._lock.notify_all()
        for image in dropped:
            image.channel.send(Released(image.message.buffer))
        for path in self._directory.glob("restore-*"):
            path.unlink(missing_ok=True)
        self._buffers.hand_on(stay, before, number)
        if restore is None:
            self._buffers.drop_before(number)
        elif not generation.in_place:
            self._start_loading(number)

    def _start_loading(self, generation: int) -> None:
        with self._lock:
            load, self._load = self._load, None
            if load is None or generation != self._generation:
                return
        threading.Thread(
            target=self._restore,
            args=(generation, load.ref, load.ranks, load.world_size),
            name="restore",
            daemon=True,
        ).start()

    def committed(self, commit: CommitRef) -> None:
        """``commit`` is the newest: later parts refer to its blocks."""
        with self._lock:
            self._base, self._sequence = commit, commit.sequence

    @property
    def pending_step(self) -> int:
        """Newest step that all ranks here have copied and that is not written yet; -1: none."""
        with self._lock:
            return max(self._pending, default=-1)

    # ------------------------------------------------------------ requests of workers

    def allocate(self, generation: int, rank: int, nbytes: int) -> Allocated:
        with self._lock:
            if generation != self._generation:
                return Allocated(())
        self._buffers.drop_before(generation)  # in place, all have their state from each other
        return Allocated(self._buffers.allocate(generation, rank, nbytes))

    def wait_restored(self, generation: int, rank: int) -> RestoreReply | None:
        """What ``rank`` starts from; None once the generation is over. Blocks while loading."""
        self._start_loading(generation)
        with self._lock:
            while True:
                if generation != self._generation or self._closed:
                    return None
                if self._restore_done:
                    return self._restored.get(rank, RestoreReply(None, None, -1, generation))
                self._lock.wait(timeout=1.0)

    def taken(self, generation: int, rank: int) -> None:
        """``rank`` has mapped the restored image; once all have, its file is removed."""
        with self._lock:
            if generation != self._generation or rank not in self._untaken:
                return
            self._untaken.remove(rank)
            if not self._untaken:
                (self._directory / f"restore-{generation}").unlink(missing_ok=True)

    def arrived(self, generation: int, channel: Channel, message: SnapshotReady) -> None:
        """A rank has copied its share; the step is written once all ranks here have."""
        step = message.info.step
        with self._lock:
            if generation != self._generation:
                channel.send(Released(message.buffer))
                return
            images = self._arrived.setdefault(step, {})
            images[message.info.rank] = _Image(channel, message)
            if frozenset(images) != self._ranks:
                return
            del self._arrived[step]
            self._pending.append(step)
            ordered = tuple(images[rank] for rank in sorted(images))
        self._jobs.put(_Job(generation, step, ordered))

    # ------------------------------------------------------------ the writer

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(job)
            except PaddleFTError as error:
                log.error("step %d was not saved: %s", job.step, error)
                fatal = 0 if isinstance(error, CheckpointError) else error.exit_code
                self._emit(StateFailed(job.generation, "", False, str(error), fatal))
            except Exception as error:
                log.exception("step %d was not saved: a defect of paddle_ft", job.step)
                self._emit(StateFailed(job.generation, "", False, repr(error), EXIT_BUG))
            finally:
                with self._lock:
                    self._pending.remove(job.step)
                    self.trouble = ""

    def _write(self, job: _Job) -> None:
        images: list[tuple[ImageInfo, memoryview]] = []
        try:
            for image in job.images:
                info = image.message.info
                view = self._buffers.view(job.generation, info.rank, image.message.buffer)
                if view is None:
                    return  # the generation is over
                images.append((info, view))
            while not self._over(job.generation):
                try:
                    with self._lock:
                        member, base, sequence = self._member, self._base, self._sequence
                    places: dict[str, tuple[int, int]] = {}
                    part = self._room.write_part(
                        images,
                        sequence=sequence + 1,
                        generation=job.generation,
                        member=member,
                        parent=base,
                        places=places,
                    )
                except StoreError as error:
                    self._complain(job.step, error)
                    time.sleep(RETRY_INTERVAL_S)
                    continue
                self._hold(job, places)
                self._emit(PartWritten(part))
                return
        finally:
            for _, view in images:
                view.release()
            for image in job.images:
                image.channel.send(Released(image.message.buffer))

    def _hold(self, job: _Job, places: Mapping[str, tuple[int, int]]) -> None:
        """Notes where the blocks are that were just written, for a restart from memory."""
        found: dict[int, dict[str, int]] = {}
        for digest, (rank, offset) in places.items():
            found.setdefault(rank, {})[digest] = offset
        for image in job.images:
            rank = image.message.info.rank
            self._buffers.hold(job.generation, rank, image.message.buffer, found.get(rank, {}))

    def _over(self, generation: int) -> bool:
        with self._lock:
            return generation != self._generation or self._closed

    def _complain(self, step: int, error: StoreError) -> None:
        told = str(error)
        with self._lock:
            new = told != self.trouble
            self.trouble = told
        if new:
            log.warning(
                "step %d is not saved yet; training goes on and this is tried again: %s",
                step,
                told,
            )

    # ------------------------------------------------------------ restore

    def _restore(
        self, generation: int, ref: CommitRef, ranks: tuple[int, ...], world_size: int
    ) -> None:
        path = self._directory / f"restore-{generation}"

        def load() -> Mapping[int, ImageInfo]:
            near = self._buffers.copies
            return self._room.restore(ref, ranks=ranks, world_size=world_size, path=path, near=near)

        infos = self._loaded(generation, ref, load)
        if infos is None:
            return
        with self._lock:
            if generation == self._generation:
                # Before the workers go on: their new buffers must not come on top of these.
                self._buffers.drop_before(generation)
                self._untaken = set(infos)
                self._restored = {
                    rank: RestoreReply(str(path), info, ref.sequence, generation)
                    for rank, info in infos.items()
                }
                self._restore_done = True
                self._lock.notify_all()

    def read_boxes(
        self, generation: int, rank: int, wanted: Mapping[str, Box]
    ) -> RestoreReply | None:
        """Parts of divided tensors of the restore point; None once the generation is over."""
        with self._lock:
            ref = self._point
            if generation != self._generation or ref is None:
                return None
            self._boxes_read += 1
            path = self._directory / f"restore-{generation}-{self._boxes_read}"
        info = self._loaded(generation, ref, lambda: self._room.restore_boxes(ref, wanted, path))
        return None if info is None else RestoreReply(str(path), info, ref.sequence, generation)

    def _loaded(self, generation: int, ref: CommitRef, load: Callable[[], T]) -> T | None:
        """What ``load`` gives; None if it cannot be had, which is told, or is not wanted."""

        def failed(damaged: bool, reason: str, exit_code: int) -> None:
            self._emit(StateFailed(generation, ref.manifest, damaged, reason, exit_code))

        over = partial(self._over, generation)
        return loaded(load, ref, over, partial(self._room.coming, ref), failed)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        try:
            self._jobs.put(None, timeout=RETRY_INTERVAL_S + 1)
        except queue.Full:
            pass
        self._writer.join(timeout=RETRY_INTERVAL_S + 1)
        shutil.rmtree(self._directory, ignore_errors=True)
