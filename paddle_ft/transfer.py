"""A training state, from a rank that has it to those of its group that lack it.

Everybody takes part in the broadcasts, and those in need keep what comes: it makes an image like
that of a checkpoint, which is put back the same way. What the ranks have for themselves comes from
their last agreement (``local_state``), not from the source.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paddle_ft.checkpoint.snapshot import Image, Source
from paddle_ft.collective import Collective
from paddle_ft.local_state import Words
from paddle_ft.nested import Entry
from paddle_ft.types import ImageInfo, TensorSpec, decode, encode

CHUNK_BYTES = 32 * 2**20


def give(
    collective: Collective,
    entries: list[Entry],
    step: int,
    meta: Mapping[str, Any],
    agreed: Words,
) -> None:
    """This rank is the source. ``agreed``: row r is rank r's own state. Raises CollectiveFailed."""
    specs, _ = _laid_out([entry.spec() for entry in entries])
    info = ImageInfo(step, collective.rank, len(agreed), specs, meta)
    header, rows = encode(info), agreed.tobytes()
    collective.sum([len(header), agreed.shape[0], agreed.shape[1]])
    collective.broadcast_bytes(np.frombuffer(header + rows, dtype=np.uint8), collective.rank)
    shared = [(e, s) for e, s in zip(entries, specs, strict=True) if e.scope != "local"]
    total = sum(spec.nbytes for _, spec in shared)
    pieces = _cut(shared)
    for start in range(0, total, CHUNK_BYTES):
        size = min(CHUNK_BYTES, total - start)
        collective.broadcast_filled(size, collective.rank, next(pieces))


def take(collective: Collective, source: int, rank: int, keep: bool) -> Image | None:
    """This rank is not the source; gives the image for ``rank`` if it is to be kept.

    Raises CollectiveFailed.
    """
    header_bytes, rows, width = collective.sum([0, 0, 0])
    data = np.empty(header_bytes + rows * width * 8, dtype=np.uint8)
    collective.broadcast_bytes(data, source)
    info = decode(ImageInfo, data[:header_bytes].tobytes())
    agreed = np.frombuffer(data[header_bytes:].tobytes(), dtype=np.int64).reshape(rows, width)
    shared = [spec for spec in info.tensors if spec.scope != "local"]
    local = [spec for spec in info.tensors if spec.scope == "local"]
    total = sum(spec.nbytes for spec in shared)
    own = sum(spec.nbytes for spec in local)
    memory = mmap.mmap(-1, max(1, total + own)) if keep else None
    for start in range(0, total, CHUNK_BYTES):
        size = min(CHUNK_BYTES, total - start)
        chunk = collective.broadcast_filled(size, source, None)
        if memory is not None:
            ctypes.memmove(_address(memory) + start, chunk.data_ptr(), size)
    if memory is None:
        return None
    memory[total : total + own] = agreed[rank % rows].tobytes()[:own]
    return Image(replace(info, rank=rank), memoryview(memory))


def _laid_out(specs: list[TensorSpec]) -> tuple[tuple[TensorSpec, ...], int]:
    """``specs`` with their places in an image: what is shared first, then what is a rank's own."""
    at, placed = 0, {}
    for local in (False, True):
        for number, spec in enumerate(specs):
            if (spec.scope == "local") == local:
                placed[number] = replace(spec, offset=at)
                at += spec.nbytes
    return tuple(placed[number] for number in range(len(specs))), at


def _cut(shared: list[tuple[Entry, TensorSpec]]) -> Iterator[list[Source]]:
    """What is copied into each chunk: sources whose offsets count from the chunk's beginning."""
    chunk: list[Source] = []
    room = CHUNK_BYTES
    for entry, spec in shared:
        start = 0
        while start < spec.nbytes:
            size = min(room, spec.nbytes - start)
            chunk.append(Source.of(entry.tensor, start, size, CHUNK_BYTES - room))
            start, room = start + size, room - size
            if not room:
                yield chunk
                chunk, room = [], CHUNK_BYTES
    if chunk:
        yield chunk


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
