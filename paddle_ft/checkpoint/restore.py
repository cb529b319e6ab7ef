"""From the store to an image that ranks can map: parallel ranged reads, every block verified.

Invariant: an image is handed out only if the sha256 of every block in it is the manifest's. A
block that is missing or altered is fetched again from the next tier of the store; if none has it,
CheckpointDamaged names the manifest, the tensor and the object.

Memory: the image, and ``READ_THREADS`` blocks where blocks are compressed.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.manifest import Block, Manifest, Piece
from paddle_ft.checkpoint.plan import ReadPlan, Target, batches, plan_read, scatter
from paddle_ft.checkpoint.store import Store, tiers_of
from paddle_ft.checkpoint.tables import GAP_BYTES, Tables, read_layers
from paddle_ft.checkpoint.write import digest_of
from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    StoreError,
    StoreFull,
    StoreMissing,
)
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, ImageInfo

_log = logging.getLogger(__name__)
READ_THREADS = 8
_BATCH_BYTES = 16 * 2**20

Near = Callable[[Block], Iterable[memoryview]]
"""Copies of a block in this machine's memory, that are there or once were; they are verified."""


def restore(
    store: Store,
    ref: CommitRef,
    manifest: Manifest,
    *,
    ranks: Sequence[int],
    world_size: int,
    path: str | Path,
    near: Near | None = None,
) -> dict[int, ImageInfo]:
    """Writes one image for all ``ranks`` of a node to the new file ``path``; what is in it.

    ``near`` is asked for each block before the store is. ``path`` should be on shared memory; it is
    complete when this returns and removed when this raises: CheckpointDamaged, StoreError
    (StoreFull if the file does not fit).
    """
    plan = plan_read(manifest, ranks)
    assert all(0 <= rank < world_size for rank in ranks)
    path = Path(path)
    try:
        # Unmapped when the last view of it is gone, which after an error is not here.
        image = memoryview(new_mapped(path, plan.nbytes))
        came = fetch(store, ref.manifest, plan.targets, image, near=near)
        del image
        failpoint("restore.image")
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    _log.info(
        "restored step %d: %.6g MB from memory, %.6g from the cache, %.6g from the store",
        manifest.step,
        *(came[tier] / 1e6 for tier in ("memory", "cache", "store")),
        extra={"tell": True},
    )
    return infos(manifest, plan, world_size)


def infos(manifest: Manifest, plan: ReadPlan, world_size: int) -> dict[int, ImageInfo]:
    """What the image of ``plan`` holds for each rank."""
    return {
        rank: ImageInfo(manifest.step, rank, world_size, tensors, manifest.meta)
        for rank, tensors in plan.tensors.items()
    }


def new_mapped(path: Path, nbytes: int) -> mmap.mmap:
    """A new file of ``nbytes``, its space reserved, mapped; at least one byte. Or StoreFull."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Without this a full tmpfs would kill the process with SIGBUS in mid read.
            os.posix_fallocate(descriptor, 0, max(1, nbytes))
            return mmap.mmap(descriptor, max(1, nbytes))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreFull(
            f"The state of {nbytes} bytes does not fit into {path.parent} ({error.strerror}); "
            f"free memory there or make it larger."
        ) from error


def fetch(
    store: Store,
    manifest: str,
    targets: Sequence[Target],
    image: memoryview,
    threads: int = READ_THREADS,
    near: Near | None = None,
) -> Counter[str]:
    """Reads every block of ``targets`` to its place in ``image`` and verifies it.

    Gives the bytes that came from ``memory``, ``cache`` and ``store``. ``manifest`` names the
    checkpoint in errors. Raises CheckpointDamaged, StoreError.
    """
    stop = threading.Event()
    tables = Tables(store)

    def work(batch: list[Target]) -> Counter[str]:
        if stop.is_set():
            return Counter()
        try:
            rest = [t for t in batch if near is None or not _copied(near, t, image)]
            came = _fetch_batch(store, tables, manifest, rest, image)
            came["memory"] = _nbytes(batch) - _nbytes(rest)
            return came
        except BaseException:
            stop.set()
            raise

    total: Counter[str] = Counter()
    with Crew(threads, "restore") as pool:
        for came in pool.map(work, batches(targets, _BATCH_BYTES)):
            total += came
    return total


def _nbytes(targets: Iterable[Target]) -> int:
    return sum(t.block.nbytes for t in targets)


def _copied(near: Near, target: Target, image: memoryview) -> bool:
    """Whether a copy of the block was at hand and still is what it was."""
    place = _place(target, image)
    for view in near(target.block):
        if view.nbytes == place.nbytes:
            place[:] = view
            if _intact(target, image):
                return True
    return False


def _fetch_batch(
    store: Store, tables: Tables, manifest: str, batch: list[Target], image: memoryview
) -> Counter[str]:
    """Brings ``batch`` to its places from the nearest tiers that have it; from where it came."""
    missing = list(batch)
    reason = "altered"
    came: Counter[str] = Counter()
    tables.fetch(t.block for t in missing)
    *nearer, last = tiers_of(store)
    for tier in nearer:
        held = _held(tier, missing)
        try:
            _read(tier, tables, missing, image)
        except StoreError as error:
            # Whatever is wrong with a nearer tier, the last one has everything.
            _log.info("%s", error)
            continue
        total, missing = _nbytes(missing), [t for t in missing if not _intact(t, image)]
        came["cache"] = min(held, total - _nbytes(missing))
        came["store"] = total - _nbytes(missing) - came["cache"]
        if not missing:
            return came
        bad = {name for t in missing for name in t.block.objects}
        _log.warning("Dropped from %s, being altered: %s.", tier.url, ", ".join(sorted(bad)))
        tier.delete(bad)
    came["store"] += _nbytes(missing)
    try:
        _read(last, tables, missing, image)
    except StoreMissing:
        reason = "missing or too short"
    else:
        missing = [t for t in missing if not _intact(t, image)]
    # A body may have been altered on its way: once more, each block by itself.
    missing = [t for t in missing if not _read_alone(last, tables, t, image)]
    if missing:
        bad_one = missing[0]
        names = sorted(bad_one.block.objects)
        raise CheckpointDamaged(
            f"{store.url}/{manifest} is damaged: {bad_one.block.nbytes} bytes of tensor "
            f"{bad_one.tensor} are {reason} in {', '.join(names)}; use an older checkpoint."
        )
    return came


def _held(tier: Store, targets: Iterable[Target]) -> int:
    """Bytes of ``targets`` that ``tier`` has and need not fetch from the one behind."""
    holds: Callable[[str], bool] = getattr(tier, "holds", lambda name: True)
    return _nbytes(t for t in targets if all(map(holds, t.block.objects)))


def _place(target: Target, image: memoryview) -> memoryview:
    return image[target.offset : target.offset + target.block.nbytes]


def _intact(target: Target, image: memoryview) -> bool:
    return digest_of(_place(target, image)) == target.block.digest


def _read_alone(store: Store, tables: Tables, target: Target, image: memoryview) -> bool:
    try:
        _read(store, tables, [target], image)
    except StoreMissing:
        return False
    return _intact(target, image)


def _read(store: Store, tables: Tables, targets: Sequence[Target], image: memoryview) -> None:
    """Brings the bytes of ``targets`` into ``image``, unverified."""
    plain = [t for t in targets if not t.block.codec]
    wanted = []
    for target in plain:
        at = target.offset
        for extent in target.block.extents:
            wanted.append((extent, at))
            at += extent.nbytes
    for run in scatter(wanted, GAP_BYTES, _BATCH_BYTES):
        store.read_into(
            run.object,
            run.offset,
            [memoryview(bytearray(n)) if at < 0 else image[at : at + n] for at, n in run.places],
        )
    read_layers(store, tables, targets, image)
    for target in targets:
        if target.block.codec:
            _read_coded(store, target.block, _place(target, image))


def _read_coded(store: Store, block: Block, place: memoryview) -> None:
    stored = bytearray(sum(e.nbytes for e in block.extents))
    view, at = memoryview(stored), 0
    for extent in block.extents:
        store.read_into(extent.object, extent.offset, [view[at : at + extent.nbytes]])
        at += extent.nbytes
    decoder = zlib.decompressobj()
    try:
        plain = decoder.decompress(stored, block.nbytes)
    except zlib.error:
        return  # The digest will not be right, which is all that needs to be known.
    if len(plain) == block.nbytes:
        place[:] = plain


def verify(store: Store, ref: CommitRef, manifest: Manifest) -> list[CheckpointDamaged]:
    """Reads every block once and gives what is wrong, one error a tensor; [] if it is intact.

    The last tier is looked at, which is what everybody else depends on. Memory: ``READ_THREADS`` x
    16 MiB, or one block if larger.
    """
    store = tiers_of(store)[-1]
    tables = Tables(store)

    def work(piece: Piece) -> CheckpointDamaged | None:
        targets = [Target(piece.name, block, 0) for block in piece.blocks]
        for batch in batches(targets, _BATCH_BYTES):
            placed, offset = [], 0
            for target in batch:
                placed.append(Target(target.tensor, target.block, offset))
                offset += target.block.nbytes
            try:
                _fetch_batch(store, tables, ref.manifest, placed, memoryview(bytearray(offset)))
            except CheckpointDamaged as error:
                return error
        return None

    with Crew(READ_THREADS, "verify") as pool:
        return [error for error in pool.map(work, manifest.tensors) if error is not None]


def check_tensors(manifest: Manifest, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises CheckpointMismatch, naming the first difference, unless the replicated and local
    tensors are those of ``expected`` (name -> dtype, shape)."""
    found = {t.name: (t.dtype, t.shape) for t in manifest.tensors}
    for name in sorted(found.keys() ^ expected.keys()):
        side = "lacks" if name in expected else "has"
        raise CheckpointMismatch(
            f"The checkpoint of step {manifest.step} {side} the tensor {name}; it belongs to "
            f"another model."
        )
    for name, (dtype, shape) in sorted(expected.items()):
        if found[name] != (dtype, shape):
            raise CheckpointMismatch(
                f"The tensor {name} is {found[name][0]} {list(found[name][1])} in the checkpoint "
                f"of step {manifest.step} and {dtype} {list(shape)} in the model; it belongs to "
                f"another model."
            )
