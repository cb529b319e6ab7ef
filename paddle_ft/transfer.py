"""A training state, from a rank that has it to those of its group that lack it.

Large tensors go from the memory they lie in straight to where they are to lie; small ones are
packed. Everybody takes part in the broadcasts: Paddle numbers the operations of a gloo group on
each rank for itself, so two ranks cannot exchange anything past the others. Who needs nothing
receives piece after piece into the same memory. What the ranks have for themselves comes from their
last agreement (``local_state``), not from the source.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paddle_ft.checkpoint.snapshot import Image, Source
from paddle_ft.collective import Collective
from paddle_ft.local_state import Words
from paddle_ft.nested import Entry
from paddle_ft.types import ImageInfo, TensorSpec, decode, encode

PIECE_BYTES = 16 * 2**20
"""Broadcast in one go, at most; what a rank that needs nothing has to hold."""
SMALL_BYTES = 2**20
"""Tensors below are packed: a broadcast costs some 0.2 ms, whatever its size."""

Part = tuple[int, int, int]
"""Number of a tensor, first byte, bytes."""
Places = Callable[[Image], Mapping[str, Any]]
"""From the head of an image to tensors in host memory that may be overwritten at once, by name."""


def give(
    collective: Collective,
    entries: Sequence[Entry],
    step: int,
    meta: Mapping[str, Any],
    agreed: Words,
) -> None:
    """This rank is the source. ``agreed``: row r is rank r's own state. Raises CollectiveFailed."""
    specs = tuple(entry.spec() for entry in entries)
    info = ImageInfo(step, collective.rank, len(agreed), specs, meta)
    header, rows = encode(info), agreed.tobytes()
    collective.sum([len(header), agreed.shape[0], agreed.shape[1]])
    collective.broadcast_bytes(np.frombuffer(header + rows, dtype=np.uint8), collective.rank)
    shared = [
        Source.of(entry.tensor, 0, spec.nbytes, 0)
        for entry, spec in zip(entries, specs, strict=True)
        if entry.scope != "local" and spec.nbytes
    ]
    sizes = [source.nbytes for source in shared]
    _broadcast(collective, collective.rank, sizes, [source.address for source in shared])


def take(collective: Collective, source: int, rank: int, places: Places) -> tuple[Image, set[str]]:
    """This rank is in need: what came for it as ``rank``, in an image, and names that are not in
    it because they have come into their places.

    Raises CollectiveFailed, and then a part of them has been overwritten; whatever ``places`` does.
    """
    info, agreed = _take_head(collective, source)
    given = places(Image(replace(info, rank=rank), memoryview(b"")))
    there = {spec.name for spec in info.tensors if spec.scope != "local"}.intersection(given)
    placed, nbytes = _laid_out(info.tensors, there)
    memory = mmap.mmap(-1, max(1, nbytes))
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    shared = [spec for spec in placed if spec.scope != "local" and spec.nbytes]
    addresses = [
        given[spec.name].data_ptr() if spec.name in there else base + spec.offset for spec in shared
    ]
    _broadcast(collective, source, [spec.nbytes for spec in shared], addresses)
    own, at = agreed[rank % len(agreed)].tobytes(), 0
    for spec in placed:
        if spec.scope == "local":
            memory[spec.offset : spec.offset + spec.nbytes] = own[at : at + spec.nbytes]
            at += spec.nbytes
    return Image(replace(info, rank=rank, tensors=placed), memoryview(memory)), there


def rehearse(entries: Sequence[Entry], places: Places) -> None:
    """What takes tens of milliseconds only the first time in a process: before others wait for it.

    Both for who will give and for who will take, of a state of these ``entries``.
    """
    info = ImageInfo(0, 0, 1, tuple(entry.spec() for entry in entries), {})
    places(Image(decode(ImageInfo, encode(info)), memoryview(b"")))


def attend(collective: Collective, source: int) -> None:
    """This rank needs nothing. Raises CollectiveFailed."""
    info, _ = _take_head(collective, source)
    sizes = [spec.nbytes for spec in info.tensors if spec.scope != "local"]
    _broadcast(collective, source, sizes, None)


def _take_head(collective: Collective, source: int) -> tuple[ImageInfo, Words]:
    header_bytes, rows, width = collective.sum([0, 0, 0])
    data = np.empty(header_bytes + rows * width * 8, dtype=np.uint8)
    collective.broadcast_bytes(data, source)
    agreed = np.frombuffer(data[header_bytes:].tobytes(), dtype=np.int64).reshape(rows, width)
    return decode(ImageInfo, data[:header_bytes].tobytes()), agreed


def _laid_out(
    specs: Sequence[TensorSpec], elsewhere: set[str]
) -> tuple[tuple[TensorSpec, ...], int]:
    """``specs`` with their offsets in an image that lacks those ``elsewhere``, and its bytes."""
    at, placed = 0, []
    for spec in specs:
        placed.append(replace(spec, offset=at))
        at += 0 if spec.name in elsewhere else spec.nbytes
    return tuple(placed), at


def _broadcast(
    collective: Collective, root: int, sizes: Sequence[int], addresses: Sequence[int] | None
) -> None:
    """Memory of ``sizes`` bytes at ``addresses``, from ``root`` to all; None: it is not kept."""
    scratch = np.empty(min(PIECE_BYTES, sum(sizes)), dtype=np.uint8)
    for piece in pieces(sizes):
        nbytes = sum(size for _, _, size in piece)
        if addresses is not None and len(piece) == 1:
            number, start, _ = piece[0]
            collective.broadcast_memory(addresses[number] + start, nbytes, root)
            continue
        address = scratch.ctypes.data
        if addresses is not None and collective.rank == root:
            for here, there, size in _each(piece, address, addresses):
                ctypes.memmove(here, there, size)
        collective.broadcast_memory(address, nbytes, root)
        if addresses is not None and collective.rank != root:
            for here, there, size in _each(piece, address, addresses):
                ctypes.memmove(there, here, size)


def _each(
    piece: Sequence[Part], address: int, addresses: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Of each part: where it lies in the pack at ``address``, where in its tensor, bytes."""
    for number, start, size in piece:
        yield address, addresses[number] + start, size
        address += size


def pieces(sizes: Sequence[int]) -> Iterator[list[Part]]:
    """What is broadcast together of tensors of ``sizes`` bytes; each byte once.

    A piece is a part of a large tensor, or several small ones as a whole.
    """
    pack: list[Part] = []
    room = PIECE_BYTES
    for number, size in enumerate(sizes):
        if size >= SMALL_BYTES:
            for start in range(0, size, PIECE_BYTES):
                yield [(number, start, min(PIECE_BYTES, size - start))]
        elif size:
            if size > room:
                yield pack
                pack, room = [], PIECE_BYTES
            pack.append((number, 0, size))
            room -= size
    if pack:
        yield pack
