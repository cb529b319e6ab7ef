"""Who writes what, whether a checkpoint is complete, and what a rank reads.

Pure. Invariants: every byte of a replicated tensor is written by exactly one rank; a manifest
exists only if every byte of every tensor is covered exactly once; every object a manifest refers
to is either new enough that no collector may have taken it, or held by a checkpoint that the head
still keeps (the argument is in ``retention``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.boxes import unfit
from paddle_ft.checkpoint.manifest import Block, Extent, Manifest, PartListing, Piece
from paddle_ft.errors import CheckpointDamaged, CheckpointMismatch
from paddle_ft.types import Head, TensorSpec

ALIGN_BYTES = 64
"""Tensors begin at multiples of this in an image, so that they can be used where they lie."""

IN_FLIGHT_SEQUENCES = 8
"""A part may be committed at most so many commits after its writing began; see ``retention``."""

Mode = Literal["rank0", "sharded"]


def aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def image_bytes(tensors: Iterable[TensorSpec]) -> int:
    """Bytes an image with these tensors takes."""
    return max((t.offset + t.nbytes for t in tensors), default=0)


# ---------------------------------------------------------------- writing


def share(
    tensors: Sequence[TensorSpec],
    rank: int,
    world_size: int,
    block_bytes: int,
    mode: Mode = "sharded",
) -> tuple[TensorSpec, ...]:
    """The pieces ``rank`` has to copy, with their offsets in its image.

    ``tensors`` are whole (their ``offset`` is ignored), in the same order on all ranks. Replicated
    ones are divided in that order into ``world_size`` shares that differ by less than one block
    (``sharded``) or all go to rank 0 (``rank0``); local ones are everybody's own.
    """
    total = sum(t.nbytes for t in tensors if t.scope == "replicated")
    pieces: list[TensorSpec] = []
    offset = position = 0
    for tensor in tensors:
        start, end = 0, tensor.nbytes
        if tensor.scope == "replicated":
            if mode == "rank0":
                mine = rank == 0
            else:
                start, end = _cut(tensor.nbytes, position, rank, world_size, total, block_bytes)
                mine = start < end or (tensor.nbytes == 0 and rank == 0)
            position += tensor.nbytes
            if not mine:
                continue
        offset = aligned(offset)
        pieces.append(replace(tensor, offset=offset, start=start, nbytes=end - start))
        offset += end - start
    return tuple(pieces)


def _cut(
    nbytes: int, position: int, rank: int, world_size: int, total: int, block_bytes: int
) -> tuple[int, int]:
    """Bytes of a tensor standing at ``position`` of ``total`` that are the rank's.

    A block is the rank's if its first byte is in [rank, rank + 1) * total / world_size.
    """

    def first(bound: int) -> int:
        below = max(0, -(-bound * total // world_size) - position)
        return min(nbytes, -(-below // block_bytes) * block_bytes)

    return first(rank), first(rank + 1) if rank + 1 < world_size else nbytes


def shares(
    tensors: Sequence[TensorSpec], world_size: int, block_bytes: int, mode: Mode = "sharded"
) -> tuple[tuple[TensorSpec, ...], ...]:
    """``share`` of every rank."""
    return tuple(share(tensors, rank, world_size, block_bytes, mode) for rank in range(world_size))


def cut(spec: TensorSpec, block_bytes: int) -> list[tuple[int, int]]:
    """Where the blocks of a piece lie in its image: (offset, bytes). Asserts block boundaries."""
    assert spec.start % block_bytes == 0, f"{spec.name} begins inside a block"
    return [
        (spec.offset + at, min(block_bytes, spec.nbytes - at))
        for at in range(0, spec.nbytes, block_bytes)
    ]


# ---------------------------------------------------------------- merging


def merge(
    parts: Sequence[PartListing],
    *,
    head: Head | None,
    parents: Mapping[str, Manifest],
    created_s: float,
    after: int = 0,
) -> Manifest:
    """The checkpoint that ``parts`` make up, to be committed upon ``head``.

    ``parents`` holds the manifest of every ``part.parent`` that the head keeps; where one is kept
    no longer, all that are, since they most likely hold what the part refers to. The sequence is
    the head's plus one, or ``after`` plus one if that is more. Raises CheckpointMismatch when the
    parts do not belong together or are too old to be committed upon this head (write them anew),
    CheckpointDamaged when bytes are missing or covered twice.
    """
    if not parts:
        raise CheckpointDamaged("A checkpoint without parts cannot be committed; save again.")
    first = parts[0]
    what = f"The checkpoint of step {first.step}"
    same = {(p.owner, p.generation, p.step, p.world_size, p.block_bytes) for p in parts}
    if len(same) != 1:
        raise CheckpointMismatch(f"{what} has parts of different origin; save again.")
    held = {
        name: size
        for manifest, parent in parents.items()
        if manifest in kept(head)
        for name, size in parent.objects.items()
    }
    for part in parts:
        _check_age(what, part, head, held)
    ranks = sorted(rank for part in parts for rank in part.ranks)
    if ranks != list(range(first.world_size)):
        raise CheckpointDamaged(
            f"{what} has parts of ranks {ranks}, not of all {first.world_size}; save again."
        )
    metas = [part.meta for part in parts if part.meta is not None]
    if len(metas) != 1:
        raise CheckpointDamaged(f"{what} has no single description by rank 0; save again.")
    tensors = _assemble(what, [piece for part in parts for piece in part.pieces])
    sizes = {name: size for part in parts for name, size in part.objects.items()}
    used = {name for t in tensors for b in t.blocks for name in b.objects}
    old = {name for parent in parents.values() for name in parent.objects}
    return Manifest(
        owner=first.owner,
        sequence=max(head.newest.sequence if head else 0, after) + 1,
        generation=first.generation,
        step=first.step,
        world_size=first.world_size,
        block_bytes=first.block_bytes,
        parent=head.newest.manifest if head else "",
        created_s=created_s,
        bytes_new=sum(sizes[name] for name in used - old),
        objects={name: sizes[name] for name in sorted(used)},
        tensors=tensors,
        meta=metas[0],
        used=_used(parts, {name: sizes[name] for name in sorted(used)}),
    )


def _used(parts: Sequence[PartListing], sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes in use of each object; {} if not every part tells. What two parts both have in use,
    being equal, counts twice, but no object is more than full."""
    if not all(part.used for part in parts if part.objects):
        return {}
    return {
        name: min(size, sum(part.used.get(name, 0) for part in parts))
        for name, size in sizes.items()
    }


def kept(head: Head | None) -> frozenset[str]:
    """The manifests that ``head`` keeps."""
    return frozenset(r.manifest for r in (head.newest, *head.lineage)) if head else frozenset()


def _check_age(what: str, part: PartListing, head: Head | None, held: Mapping[str, int]) -> None:
    """Refuses a part that is too old, or refers to what is not ``held`` by a kept checkpoint."""
    sequence = head.newest.sequence if head else 0
    if not sequence - IN_FLIGHT_SEQUENCES < part.sequence <= sequence + 1:
        raise CheckpointMismatch(
            f"{what}: the part of {part.member} was begun for commit {part.sequence} and the head "
            f"is at {sequence}; save again."
        )
    for name, size in part.objects.items():
        parsed = layout.parse(name)
        mine = (
            parsed is not None
            and (parsed.kind, parsed.owner) == ("data", part.owner)
            and (parsed.sequence, parsed.generation) == (part.sequence, part.generation)
        )
        if mine or held.get(name) == size:
            continue
        if part.parent not in kept(head):
            raise CheckpointMismatch(
                f"{what}: the part of {part.member} builds upon {part.parent}, which is no "
                f"longer kept, nor is {name}; save again."
            )
        raise CheckpointMismatch(
            f"{what}: the part of {part.member} refers to {name}, which is not in the "
            f"checkpoint it builds upon; save again."
        )


def _assemble(what: str, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Whole tensors in a fixed order; raises CheckpointDamaged if a byte is missing or double."""
    groups: dict[tuple[str, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.name, piece.rank].append(piece)
    whole: list[Piece] = []
    for (name, _), group in sorted(groups.items()):
        group.sort(key=lambda p: (p.start, p.nbytes))
        if len({(p.dtype, p.shape, p.scope, p.shard) for p in group}) != 1:
            raise CheckpointDamaged(
                f"{what}: the ranks disagree about the shape or dtype of {name}; save again."
            )
        position = 0
        for piece in group:
            if piece.start != position:
                wrong = "missing" if piece.start > position else "there twice"
                raise CheckpointDamaged(
                    f"{what}: bytes of {name} at {min(position, piece.start)} are {wrong}; "
                    f"save again."
                )
            position += piece.nbytes
        if position != group[0].nbytes_whole or (position == 0 and len(group) > 1):
            raise CheckpointDamaged(
                f"{what}: {name} has {position} of {group[0].nbytes_whole} bytes; save again."
            )
        blocks = tuple(block for piece in group for block in piece.blocks)
        whole.append(replace(group[0], blocks=blocks))
    if unfitting := unfit(p.part for p in whole):
        raise CheckpointDamaged(
            f"{what}: the shards of {', '.join(unfitting)} are not all of it, or overlap; save "
            f"again."
        )
    return tuple(whole)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Target:
    """Where a block is wanted."""

    tensor: str
    block: Block
    offset: int
    """In the image."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One image that serves all ``ranks`` of a node."""

    tensors: Mapping[int, tuple[TensorSpec, ...]]
    """For each rank: the replicated tensors and its local ones, with their place."""
    targets: tuple[Target, ...]
    nbytes: int


def plan_read(
    manifest: Manifest, ranks: Sequence[int], names: Sequence[str] | None = None
) -> ReadPlan:
    """What has to be read so that ``ranks`` (of a world of any size) have their state.

    Replicated tensors are read once. Where the world size has changed, rank r takes the local
    tensors of rank r mod the old world size; shards are left to ``reshard``. ``names``: only
    tensors that match one of these patterns (``backbone.*``).
    """
    tensors: dict[int, list[TensorSpec]] = {rank: [] for rank in ranks}
    targets: list[Target] = []
    offset = 0
    for piece in manifest.tensors:
        if piece.shard is not None:
            continue
        takers = [r for r in ranks if piece.rank < 0 or r % manifest.world_size == piece.rank]
        if not takers or not (names is None or any(fnmatchcase(piece.name, n) for n in names)):
            continue
        offset = aligned(offset)
        spec = TensorSpec(piece.name, piece.dtype, piece.shape, piece.scope, offset, piece.nbytes)
        for rank in takers:
            tensors[rank].append(spec)
        for block in piece.blocks:
            targets.append(Target(piece.name, block, offset))
            offset += block.nbytes
    return ReadPlan({r: tuple(t) for r, t in tensors.items()}, tuple(targets), offset)


def batches(targets: Iterable[Target], batch_bytes: int) -> list[list[Target]]:
    """``targets`` in runs of about ``batch_bytes``, each a piece of work for one thread."""
    result: list[list[Target]] = []
    room = 0
    for target in targets:
        if room < target.block.nbytes or not result:
            result.append([])
            room = batch_bytes
        result[-1].append(target)
        room -= target.block.nbytes
    return result


@dataclass(frozen=True, slots=True)
class Scatter:
    """One ranged read; its bytes go, in order, to ``places``."""

    object: str
    offset: int
    nbytes: int
    places: tuple[tuple[int, int], ...]
    """(offset in the target, bytes); offset -1: bytes between two wanted ranges, to be dropped."""


def scatter(wanted: Iterable[tuple[Extent, int]], gap_bytes: int, read_bytes: int) -> list[Scatter]:
    """The fewest reads that bring each extent to its place.

    Neighbours in an object are read together if at most ``gap_bytes`` lie between them, up to
    ``read_bytes`` a read. Ranges that overlap are read apart.
    """
    result: list[Scatter] = []
    name, start, end = "", 0, 0
    places: list[tuple[int, int]] = []
    for extent, at in sorted(wanted, key=lambda w: (w[0].object, w[0].offset, w[1])):
        gap = extent.offset - end
        joined = extent.offset + extent.nbytes - start
        if extent.object != name or not 0 <= gap <= gap_bytes or joined > read_bytes:
            if places:
                result.append(Scatter(name, start, end - start, tuple(places)))
            name, start, places = extent.object, extent.offset, []
        elif gap:
            places.append((-1, gap))
        places.append((at, extent.nbytes))
        end = extent.offset + extent.nbytes
    if places:
        result.append(Scatter(name, start, end - start, tuple(places)))
    return result
