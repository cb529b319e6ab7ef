"""Rows that were written after their block: the tables that say where they belong.

A block with layers is cut into sub-blocks (``Cut``: rows of the tensor, usually). A layer of it is
some of them, one behind the other in an object; which ones is a bitmap, in the ``Table`` at the end
of that object. Of the layers that have a sub-block, the last one counts; what none has is in the
extents of the block. So a checkpoint adds its rows and about 1.2 bytes for each, and repeats
nothing: the manifest names the tables.

Form of a table: ``PFTL``, the number of entries, the entries (``_HEAD``), their bitmaps (raw
deflate), in the same order; little-endian. What does not hold together is a ValueError, and what
is altered so that it does gives a block with a wrong digest.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddle_ft.checkpoint.content import Block

LAYERS_MAX = 4096
"""A block in more layers than that is written anew as a whole."""
_MAGIC = b"PFTL"
_COUNT = struct.Struct("<4sI")
_HEAD = struct.Struct("<QQIIII")
"""key; offset of the rows in the object; cut (first, grain, bytes); bytes of the bitmap"""
_CUTS_MAX = 2**24

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Owners = np.ndarray[Any, np.dtype[np.uint16]]
"""For each sub-block the number of its layer, from 1; 0: it is in the extents of the block."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a block of ``nbytes`` is cut: after ``first`` bytes, then every ``grain``."""

    first: int
    grain: int
    nbytes: int

    @property
    def count(self) -> int:
        """Of sub-blocks, the short ones at both ends included."""
        return bool(self.first) + -(-(self.nbytes - self.first) // self.grain)

    def sizes(self) -> Any:
        """Bytes of each sub-block."""
        sizes = np.full(self.count, self.grain, np.int64)
        if self.first:
            sizes[0] = self.first
        if rest := (self.nbytes - self.first) % self.grain:
            sizes[-1] = rest
        return sizes


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer of one block."""

    cut: Cut
    offset: int
    """Of its sub-blocks, in the object."""
    coded: bytes
    """The bitmap, deflated."""

    def mask(self) -> Mask:
        """Which sub-blocks it has; raises ValueError."""
        count = self.cut.count
        decoder = zlib.decompressobj(-15)
        try:
            bits = decoder.decompress(self.coded, -(-count // 8) + 1)
        except zlib.error as error:
            raise ValueError("a bitmap cannot be decoded") from error
        if len(bits) != -(-count // 8):
            raise ValueError("a bitmap has a wrong length")
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(np.bool_)


def entry_of(cut: Cut, offset: int, mask: Mask) -> Entry:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15)
    return Entry(cut, offset, coder.compress(np.packbits(mask).tobytes()) + coder.flush())


def encode_table(entries: Mapping[int, Entry]) -> bytes:
    heads = [
        _HEAD.pack(key, e.offset, e.cut.first, e.cut.grain, e.cut.nbytes, len(e.coded))
        for key, e in entries.items()
    ]
    coded = [e.coded for e in entries.values()]
    return b"".join([_COUNT.pack(_MAGIC, len(entries)), *heads, *coded])


def decode_table(data: bytes) -> dict[int, Entry]:
    """By key; raises ValueError if ``data`` is no table."""
    if len(data) < _COUNT.size:
        raise ValueError("the table is too short")
    magic, count = _COUNT.unpack_from(data)
    at = _COUNT.size + count * _HEAD.size
    if magic != _MAGIC or at > len(data):
        raise ValueError("not a table")
    entries = {}
    for key, offset, first, grain, nbytes, size in _HEAD.iter_unpack(data[_COUNT.size : at]):
        cut = Cut(first, max(1, grain), nbytes)
        if not grain or first >= max(grain, 1) or first > nbytes or cut.count > _CUTS_MAX:
            raise ValueError("a block of the table is cut impossibly")
        entries[key] = Entry(cut, offset, data[at : at + size])
        at += size
    if at != len(data) or len(entries) != count:
        raise ValueError("the table has a wrong length or a key twice")
    return entries


def table_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """Which layer each sub-block of a block is in.

    The same bytes may have been written as other layers by a checkpoint that was never committed;
    so it says itself of which block it is.
    """

    cut: Cut
    owners: Owners
    key: int = 0
    objects: tuple[str, ...] = ()
    """Of the layers."""

    def fits(self, block: Block) -> bool:
        return (self.key, self.objects) == (block.key, tuple(y.object for y in block.layers))

    def used(self, layers: int) -> Any:
        """Bytes in use: of the extents, of each of so many layers."""
        return np.bincount(self.owners, self.cut.sizes(), layers + 1).astype(np.int64)


def map_of(block: Block, entries: Sequence[Entry]) -> Map:
    """The map of ``block``, whose layers ``entries`` are; raises ValueError."""
    cut = entries[0].cut
    if cut.nbytes != block.nbytes or len(entries) > LAYERS_MAX:
        raise ValueError("the layers do not belong to the block")
    owners: Owners = np.zeros(cut.count, np.uint16)
    for number, entry in enumerate(entries, 1):
        if entry.cut != cut:
            raise ValueError("the layers of a block are cut differently")
        owners[entry.mask()] = number
    if not block.extents and not owners.all():
        raise ValueError("the layers are not all of the block")
    return Map(cut, owners, block.key, tuple(y.object for y in block.layers))


def pruned(block: Block, found: Map) -> tuple[Block, Map]:
    """``block`` without the layers and extents of which nothing is in use."""
    alive = np.bincount(found.owners, minlength=len(block.layers) + 1) > 0
    numbers = np.zeros(len(alive), np.uint16)
    numbers[1:][alive[1:]] = np.arange(1, 1 + np.count_nonzero(alive[1:]))
    layers = tuple(y for y, kept in zip(block.layers, alive[1:], strict=True) if kept)
    extents = block.extents if alive[0] else ()
    block = Block(block.digest, block.nbytes, extents, "", block.key, layers)
    objects = tuple(y.object for y in layers)
    return block, Map(found.cut, numbers[found.owners], block.key, objects)


def picked(block: memoryview, cut: Cut, mask: Mask) -> memoryview:
    """The sub-blocks of ``mask``, one behind the other."""
    if mask.all():
        return block
    rows, whole, head, tail = _parts(cut, mask)
    end = cut.first + whole * cut.grain
    body = np.frombuffer(block[cut.first : end], np.uint8).reshape(whole, cut.grain)
    parts = [body[rows].tobytes()]
    if head:
        parts.insert(0, bytes(block[: cut.first]))
    if tail:
        parts.append(bytes(block[end:]))
    return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def placed(data: memoryview, target: memoryview, cut: Cut, mask: Mask, wanted: Mask) -> None:
    """Brings the sub-blocks ``wanted`` (among those of ``mask``, which ``data`` holds) to their
    place in the block ``target``."""
    rows, whole, head, tail = _parts(cut, mask)
    end = cut.first + whole * cut.grain
    at = cut.first if head else 0
    source = np.frombuffer(data[at : at + len(rows) * cut.grain], np.uint8)
    body = np.frombuffer(target[cut.first : end], np.uint8).reshape(whole, cut.grain)
    live = wanted[bool(cut.first) :][:whole][rows]
    body[rows[live]] = source.reshape(len(rows), cut.grain)[live]
    if head and wanted[0]:
        target[: cut.first] = data[: cut.first]
    if tail and wanted[-1]:
        target[end:] = data[at + len(rows) * cut.grain :]


def _parts(cut: Cut, mask: Mask) -> tuple[Any, int, bool, bool]:
    """Of ``mask``: indices among the whole sub-blocks, how many of these there are, whether the
    short one at the beginning and the one at the end are in it."""
    whole = (cut.nbytes - cut.first) // cut.grain
    inner = mask[bool(cut.first) :]
    head = bool(cut.first) and bool(mask[0])
    return np.flatnonzero(inner[:whole]), whole, head, len(inner) > whole and bool(mask[-1])
