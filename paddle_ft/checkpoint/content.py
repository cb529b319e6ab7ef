"""What a tensor consists of in a store: pieces, blocks, extents and layers.

Pure. A block is known by the sha256 of its bytes. It is found by its extents, which are ranges of
objects, put together; or by extents and, upon these, layers: rows of it that were written later,
each layer over those before. Where the rows of a layer belong stands in the table at the end of its
object (``layers``), not in the manifest, which would have to repeat it each time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from paddle_ft.checkpoint.boxes import Box, PartOf, whole_of
from paddle_ft.types import Scope, ShardOf

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4,
    "int64": 8, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2,
    "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes of one element of each dtype that can be saved."""


def digest_of(data: bytes | memoryview) -> str:
    """sha256, hex. With the CPU's SHA extensions the fastest strong hash in the standard library
    (measured: 1.47 GB/s a thread, blake2b 0.64, md5 0.60); above 2 KiB it releases the GIL."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes from ``offset`` of ``object``."""

    object: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The table of ``object``: ``nbytes`` bytes from ``offset``."""

    object: str
    offset: int
    nbytes: int
    digest: str
    """The first 32 hex digits of the table's sha256."""


@dataclass(frozen=True, slots=True)
class Block:
    """The bytes with this sha256 (hex): the extents put together, and ``layers`` upon them."""

    digest: str
    nbytes: int
    extents: tuple[Extent, ...]
    """Empty if the layers hold all of it."""
    codec: str = ""
    """How the extents are to be decoded: ``""`` as they are, ``zlib``."""
    key: int = 0
    """Under which the tables of ``layers`` have its rows; 0: it has no layers."""
    layers: tuple[Layer, ...] = ()
    """Oldest first."""

    @property
    def objects(self) -> set[str]:
        """All that it is read from."""
        return {e.object for e in self.extents} | {layer.object for layer in self.layers}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or a run of blocks of one from byte ``start``, as stored.

    In a manifest every piece is a whole tensor (``start`` 0). ``rank`` is -1 for replicated
    tensors, else the rank whose local tensor this is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scope: Scope
    rank: int
    start: int
    blocks: tuple[Block, ...]
    shard: ShardOf | None = None
    """What the local tensor of this rank is of one that is divided among them."""

    @property
    def part(self) -> PartOf:
        """Which elements of which tensor these are."""
        if self.shard is None:
            return PartOf(self.name, self.dtype, self.shape, whole_of(self.shape), shard=False)
        box = Box(self.shard.start, self.shape)
        return PartOf(self.name, self.dtype, self.shard.whole, box, shard=True)

    @property
    def nbytes(self) -> int:
        """Of this piece."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def nbytes_whole(self) -> int:
        """Of the tensor it belongs to."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]
