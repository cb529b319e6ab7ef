"""Messages between a front and its workers, as bytes: what the socket of ``worker`` carries. Pure.

JSON; but the two that each batch takes, which tell of a batch and of its outputs, are a few numbers
and a header that is made, and read, once for all batches of the same shapes.
"""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from typing import Any

Header = tuple[tuple[str, str, tuple[int, ...], int, int], ...]
"""(name, dtype, shape, offset, nbytes) of each tensor, as ``shared`` has them."""

BYTES_MAX = 128 * 1024
_FRAME = struct.Struct("<cQQ?")
"""Kind, number of the batch, bytes of the memory, whether it names a session; then the header."""
_RUN, _DONE = b"R", b"D"
_HEADERS_KEPT = 64


def pack(message: dict[str, Any]) -> bytes:
    """The bytes of ``message``."""
    if "run" in message:
        number, nbytes, session = message["run"], message["nbytes"], message["session"]
        return _FRAME.pack(_RUN, number, nbytes, session) + _text(message["tensors"])
    if "done" in message:
        number, nbytes = message["of"], message["nbytes"]
        return _FRAME.pack(_DONE, number, nbytes, False) + _text(message["done"])
    return json.dumps(message).encode()


def unpack(data: bytes) -> dict[str, Any]:
    """What ``pack`` was given. Raises ValueError for what it has not made."""
    if data.startswith((_RUN, _DONE)):
        try:
            kind, number, nbytes, session = _FRAME.unpack_from(data)
        except struct.error:
            raise ValueError("a message is cut off") from None
        tensors = _header(data[_FRAME.size :])
        if kind == _DONE:
            return {"done": tensors, "nbytes": nbytes, "of": number}
        return {"run": number, "tensors": tensors, "nbytes": nbytes, "session": session}
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("a message is no object")
    if "value" in message:
        message["value"] = _tuples(message["value"])
    return message


@lru_cache(_HEADERS_KEPT)
def _text(header: Header) -> bytes:
    return json.dumps(header).encode()


@lru_cache(_HEADERS_KEPT)
def _header(text: bytes) -> Header:
    return _tuples(json.loads(text))


def _tuples(header: Any) -> Header:
    try:
        return tuple(
            (name, dtype, tuple(shape), at, size) for name, dtype, shape, at, size in header
        )
    except TypeError:
        raise ValueError("a header is no list of tensors") from None
