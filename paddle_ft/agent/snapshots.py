"""The agent's memory of the workers' state: buffers, the writer behind them, the restored image.

Invariants:
- buffers belong to the agent and outlive the workers: what a worker had copied when it died is
  still written;
- a step is written once the images of all ranks of this node are there, and its buffers are given
  back after that, never before;
- at most ``buffers`` snapshots of a rank are in flight, so host memory is bounded by
  buffers x share of the state, plus one image of the whole state while workers restore. Who finds
  no free buffer does not wait: the workers agree to try again at the next step.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddle_ft.agent.ipc import Allocated, Channel, Released, RestoreReply, SnapshotReady
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.errors import CheckpointDamaged, PaddleFTError, StoreError
from paddle_ft.types import CommitRef, ImageInfo, Part

log = logging.getLogger("paddle_ft")

RETRY_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class PartWritten:
    """Event: this node's part of a step is in the store."""

    part: Part


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """Event: the restore point cannot be loaded; ``damaged`` if its bytes are lost."""

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
class _Job:
    generation: int
    step: int
    images: tuple[_Image, ...]


class Buffers:
    """Snapshot buffers as files on shared memory, by generation, rank and index."""

    def __init__(self, directory: Path, each: int) -> None:
        self._directory = directory
        self._each = each
        self._files: dict[tuple[int, int], list[tuple[Path, mmap.mmap]]] = {}
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

    def view(self, generation: int, rank: int, index: int) -> memoryview:
        with self._lock:
            return memoryview(self._files[generation, rank][index][1])

    def drop_before(self, generation: int) -> None:
        """Frees the buffers of earlier generations."""
        with self._lock:
            for key in [k for k in self._files if k[0] < generation]:
                self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
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
    return Path(tempfile.mkdtemp(prefix=f"paddle_ft-{os.getpid()}-{job}-", dir=parent))


def remove_leftovers(parent: Path) -> None:
    """Removes what launchers left there that were killed: their name holds their pid."""
    for path in parent.glob("paddle_ft-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and path.is_dir() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


class SnapshotKeeper:
    """Args:
    room: the checkpoint store of the job.
    directory: private directory on shared memory.
    emit: called with PartWritten and RestoreFailed from threads of this object.
    """

    def __init__(
        self,
        room: CheckpointRoom,
        directory: Path,
        buffers: int,
        emit: Callable[[PartWritten | RestoreFailed], None],
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
        self._restored: dict[int, RestoreReply] = {}
        self._restore_done = True
        self._closed = False
        self.trouble = ""
        """Why the newest write is not getting on; "" if all is well. For the status line."""
        self._writer = threading.Thread(target=self._write_all, name="snapshots", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------ one generation

    def begin(
        self,
        generation: int,
        member: str,
        ranks: Sequence[int],
        world_size: int,
        restore: CommitRef | None,
        sequence: int,
    ) -> None:
        """Turns to ``generation``; loads its restore point in the background.

        ``sequence`` is that of the head, which is past ``restore`` if that one is a fallback.
        """
        with self._lock:
            self._generation = generation
            self._member = member
            self._ranks = frozenset(ranks)
            self._arrived.clear()
            self._restored.clear()
            self._restore_done = restore is None
            self._base, self._sequence = restore, sequence
            self._lock.notify_all()
        self._buffers.drop_before(generation)
        for path in self._directory.glob("restore-*"):
            path.unlink(missing_ok=True)
        if restore is not None:
            threading.Thread(
                target=self._restore,
                args=(generation, restore, tuple(ranks), world_size),
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
        return Allocated(self._buffers.allocate(generation, rank, nbytes))

    def wait_restored(self, generation: int, rank: int) -> RestoreReply | None:
        """What ``rank`` starts from; None once the generation is over. Blocks while loading."""
        with self._lock:
            while True:
                if generation != self._generation or self._closed:
                    return None
                if self._restore_done:
                    return self._restored.get(rank, RestoreReply(None, None))
                self._lock.wait(timeout=1.0)

    def arrived(self, generation: int, channel: Channel, message: SnapshotReady) -> None:
        """A rank has copied its share; the step is written once all ranks here have."""
        step = message.info.step
        with self._lock:
            if generation != self._generation:
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
            except Exception:
                log.exception("step %d was not saved: a defect of paddle_ft", job.step)
            finally:
                with self._lock:
                    self._pending.remove(job.step)
                    self.trouble = ""

    def _write(self, job: _Job) -> None:
        images = [
            (
                image.message.info,
                self._buffers.view(job.generation, image.message.info.rank, image.message.buffer),
            )
            for image in job.images
        ]
        try:
            while not self._over(job.generation):
                try:
                    with self._lock:
                        member, base, sequence = self._member, self._base, self._sequence
                    part = self._room.write_part(
                        images,
                        sequence=sequence + 1,
                        generation=job.generation,
                        member=member,
                        parent=base,
                    )
                except StoreError as error:
                    self._complain(job.step, error)
                    time.sleep(RETRY_INTERVAL_S)
                    continue
                self._emit(PartWritten(part))
                return
        finally:
            for _, view in images:
                view.release()
            for image in job.images:
                image.channel.send(Released(image.message.buffer))

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
        infos: Mapping[int, ImageInfo] = {}
        complained = ""
        while not self._over(generation):
            try:
                infos = self._room.restore(ref, ranks=ranks, world_size=world_size, path=path)
                break
            except CheckpointDamaged as error:
                self._emit(RestoreFailed(generation, ref.manifest, True, str(error), 0))
                return
            except StoreError as error:
                if str(error) != complained:
                    complained = str(error)
                    log.warning("step %d cannot be loaded yet: %s", ref.step, error)
                time.sleep(RETRY_INTERVAL_S)
            except PaddleFTError as error:
                self._emit(
                    RestoreFailed(generation, ref.manifest, False, str(error), error.exit_code)
                )
                return
            except Exception as error:
                log.exception("step %d cannot be loaded: a defect of paddle_ft", ref.step)
                self._emit(RestoreFailed(generation, ref.manifest, False, repr(error), 70))
                return
        with self._lock:
            if generation == self._generation:
                self._restored = {
                    rank: RestoreReply(str(path), info, ref.sequence)
                    for rank, info in infos.items()
                }
                self._restore_done = True
                self._lock.notify_all()

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
