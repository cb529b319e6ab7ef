"""Which stored bytes a box of a tensor is put together from, however it was divided when saved.

Pure. Each element of the box comes from exactly one stored shard, since these do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.manifest import Manifest, Piece
from paddle_ft.checkpoint.plan import Target
from paddle_ft.errors import CheckpointMismatch


@dataclass(frozen=True, slots=True)
class BoxRead:
    """What one stored shard gives to a wanted box."""

    piece: Piece
    common: Box
    rows: Box
    """The rows of the shard (on its first axis) that have to be read for ``common``."""
    targets: tuple[Target, ...]
    """The blocks these rows are in, one behind the other."""
    offset: int
    """Of the first row, in these blocks."""
    nbytes: int
    """Of these blocks."""


def plan_box(manifest: Manifest, name: str, box: Box) -> list[BoxRead]:
    """How ``box`` of the tensor ``name`` is put together, however it was divided when saved.

    Of replicas the first is read. Raises CheckpointMismatch if there is no such tensor or box.
    """
    pieces = {
        p.part.box: p
        for p in reversed(manifest.tensors)
        if p.name == name and (p.shard or p.rank < 0)
    }
    shape = next((p.part.whole for p in pieces.values()), None)
    if shape is None or not box.inside(shape):
        raise CheckpointMismatch(
            f"The checkpoint of step {manifest.step} has no elements {list(box.start)} + "
            f"{list(box.shape)} of {name} (its shape is {shape and list(shape)}); correct the name "
            f"or the shard."
        )
    reads = []
    for source, piece in pieces.items():
        common = source.common(box)
        if common is not None:
            reads.append(_box_read(piece, source, common, manifest.block_bytes))
    return reads


def _box_read(piece: Piece, source: Box, common: Box, block_bytes: int) -> BoxRead:
    axes = slice(1, None)
    rows = Box(common.start[:1] + source.start[axes], common.shape[:1] + source.shape[axes])
    row_bytes = piece.nbytes // source.shape[0] if source.shape else piece.nbytes
    start = (rows.start[0] - source.start[0]) * row_bytes if source.shape else 0
    end = start + (rows.shape[0] if rows.shape else 1) * row_bytes
    first = start // block_bytes
    targets, nbytes = [], 0
    for block in piece.blocks[first : -(-end // block_bytes)]:
        targets.append(Target(piece.name, block, nbytes))
        nbytes += block.nbytes
    return BoxRead(piece, common, rows, tuple(targets), start - first * block_bytes, nbytes)
