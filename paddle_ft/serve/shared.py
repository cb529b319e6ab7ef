"""Tensors in memory that two processes share: how they lie there, and how it grows.

Each worker has two such memories, one for what goes in and one for what comes out; the writer of
each grows it. They have no name in any file system, so nothing is left of them whoever is killed.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddle_ft.serve.messages import Header
from paddle_ft.serve.types import ModelError, Tensors, Unavailable

_ALIGN_BYTES = 64
_FIRST_BYTES = 2**16
BYTES = "bytes"
"""Stands for a dtype: elements of any length, each behind its length as 4 bytes."""


class Memory:
    """One end of a shared memory of at most ``bytes_max`` bytes."""

    def __init__(self, descriptor: int, bytes_max: int) -> None:
        self.descriptor = descriptor
        self._bytes_max = bytes_max
        self._map: mmap.mmap | None = None
        self._users = 0
        self._closed = False

    @classmethod
    def create(cls, bytes_max: int) -> Memory:
        return cls(os.memfd_create("paddle_ft-tensors", os.MFD_CLOEXEC), bytes_max)

    @property
    def nbytes(self) -> int:
        return len(self._map) if self._map is not None else 0

    def room(self, nbytes: int) -> memoryview:
        """At least ``nbytes`` bytes to write to. Raises ModelError above the bound, Unavailable."""
        if nbytes > self._bytes_max:
            raise ModelError(
                f"The tensors of one batch have {nbytes} bytes; at most {self._bytes_max} are "
                f"allowed."
            )
        if self._map is None or nbytes > len(self._map):
            size = max(nbytes, min(self._bytes_max, 2 * self.nbytes), _FIRST_BYTES)
            try:
                # Its pages exist from here on, so that writing to them cannot end the process.
                os.posix_fallocate(self.descriptor, 0, size)
            except OSError as error:
                raise Unavailable(
                    f"There is no memory for a batch of {nbytes} bytes ({error.strerror})."
                ) from None
            self._map = mmap.mmap(self.descriptor, size)
        return memoryview(self._map)

    def seen(self, nbytes: int) -> memoryview:
        """What the other end has written, of which the memory now has ``nbytes``; read-only."""
        if self._map is None or nbytes > len(self._map):
            self._map = mmap.mmap(self.descriptor, nbytes)
        return memoryview(self._map).toreadonly()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Puts off ``close`` until the end, as other threads must while they use it."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._closed:
                self.close()

    def close(self) -> None:
        self._closed = True
        if not self._users and self.descriptor >= 0:
            self._map = None  # unmapped with the last array upon it
            os.close(self.descriptor)
            self.descriptor = -1


def write(memory: Memory, tensors: Tensors, start: int = 0) -> tuple[Header, int]:
    """Puts ``tensors`` into ``memory`` from byte ``start``: their header, and where they end.

    Raises ModelError for what cannot be carried, Unavailable.
    """
    offset = start
    parts: list[NDArray[Any]] = []
    header = []
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        dtype, data = _flat(name, array)
        header.append((name, dtype, array.shape, offset, data.nbytes))
        parts.append(data)
        offset += -(-data.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    room = memory.room(offset)
    for data, (_, dtype, _, at, nbytes) in zip(parts, header, strict=True):
        if nbytes:
            kind = np.uint8 if dtype == BYTES else dtype
            np.copyto(np.ndarray(data.shape, kind, room, at), data)
    return tuple(header), offset


@lru_cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """Numpy takes some 50 us to say."""
    name: str = dtype.newbyteorder("=").name
    return name


def _flat(name: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    if array.dtype.kind in "biuf":
        return _name_of(array.dtype), array
    if array.dtype.kind not in "OSU":
        raise ModelError(f"{name} is of {array.dtype}, which cannot be carried.")
    parts = []
    for element in array.ravel():
        item = element.encode() if isinstance(element, str) else element
        if not isinstance(item, bytes):
            raise ModelError(f"{name} holds a {type(item).__name__} where bytes belong.")
        parts += [struct.pack("<I", len(item)), item]
    return BYTES, np.frombuffer(b"".join(parts), np.uint8)


def read(view: memoryview, header: Header, *, copy: bool) -> dict[str, NDArray[Any]]:
    """The tensors of ``header``; views of ``view`` unless ``copy``. ValueError: it is damaged."""
    result = {}
    for name, dtype, shape, offset, nbytes in header:
        part = view[offset : offset + nbytes]
        if len(part) != nbytes:
            raise ValueError("a tensor reaches beyond the memory")
        if dtype == BYTES:
            result[name] = _elements(part, shape)
        else:
            array = np.frombuffer(part, dtype).reshape(shape)
            result[name] = array.copy() if copy else array
    return result


def _elements(part: memoryview, shape: Sequence[int]) -> NDArray[Any]:
    array = np.empty(math.prod(shape), object)
    at = 0
    for i in range(array.size):
        (length,) = struct.unpack_from("<I", part, at)
        array[i] = bytes(part[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(part):
        raise ValueError("elements do not fill their tensor")
    return array.reshape(shape)
