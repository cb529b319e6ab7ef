"""Where a file is cut into blocks, so that versions of a model share what is equal. Pure.

Invariant: the blocks put together are the file. Parameters are cut where tensors begin, so that one
more layer, or one of another size, leaves the blocks of the others as they were; what is not a file
of parameters is cut at equal distances.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

BLOCK_BYTES = 4 * 2**20
GROUP_BYTES = 256 * 2**10
"""Smaller tensors that follow one another share a block of about this size."""


def cut(data: memoryview, *, parameters: bool) -> list[int]:
    """Sizes of the blocks of ``data``, in bytes and in order."""
    sizes = []
    for size in _runs(data) if parameters else [len(data)]:
        whole, rest = divmod(size, BLOCK_BYTES)
        sizes += [BLOCK_BYTES] * whole + ([rest] if rest else [])
    return sizes


def _runs(data: memoryview) -> Iterator[int]:
    """Sizes of tensors and of groups of small ones; of all in one if ``data`` cannot be read."""
    try:
        sizes = list(tensors(data))
    except (struct.error, ValueError, KeyError, IndexError):
        yield len(data)
        return
    group = 0
    for size in sizes:
        if group and size + group > GROUP_BYTES:
            yield group
            group = 0
        group += size
    if group:
        yield group


_LEVELS_MAX = 16
_ITEM_BYTES = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2, 5: 4, 6: 8, 20: 1, 21: 1, 22: 2, 23: 8, 24: 16}
"""By Paddle's number of the dtype."""


def tensors(data: memoryview) -> Iterator[int]:
    """Bytes of each record of a ``.pdiparams`` file: versions, levels, a description, the data."""
    at = 0
    while at < len(data):
        began = at
        version, levels = struct.unpack_from("<IQ", data, at)
        at += 12
        for _ in range(min(levels, _LEVELS_MAX + 1)):
            at += 8 + min(len(data), struct.unpack_from("<Q", data, at)[0])
        inner, length = struct.unpack_from("<Ii", data, at)
        if version or inner or levels > _LEVELS_MAX or not 0 < length < 4096:
            raise ValueError("not a tensor")
        at += 8 + length
        at += _described(bytes(data[at - length : at]))
        if at > len(data):
            raise ValueError("a tensor ends behind the file")
        yield at - began


def _described(text: bytes) -> int:
    """Bytes of the tensor whose protobuf description this is: field 1 its dtype, 2 its sizes."""
    at, item, count = 0, 0, 1
    while at < len(text):
        key, at = _number(text, at)
        if key == 18:  # the sizes in one run
            length, at = _number(text, at)
            end = at + length
            while at < end:
                size, at = _number(text, at)
                count *= size
            continue
        value, at = _number(text, at)
        if key == 8:
            item = _ITEM_BYTES[value]
        elif key == 16:
            count *= value
        else:
            raise ValueError("not a description")
    return item * count


def _number(text: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    value = shift = 0
    while True:
        byte = text[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
