"""Bodies of HTTP: read with a bound in bytes and in time, gzip and deflate both ways."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping
from typing import Any, TypeVar

from paddle_ft.serve.tensors import BadRequest

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

WBITS = {"gzip": 31, "deflate": 15}
COMPRESS_BYTES_MIN = 1024
"""What is smaller would hardly get smaller."""
IN_THREAD_BYTES = 64 * 1024
"""What is larger is compressed beside the event loop."""


class Disconnected(Exception):
    """The client is gone: nobody reads an answer."""


async def gently(steps: Generator[None, None, T]) -> T:
    """What ``steps`` returns; the event loop answers others after each of them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        await asyncio.sleep(0)


def _not_counted(nbytes: int) -> None:
    pass


async def read_body(
    receive: Receive,
    headers: Mapping[str, str],
    bytes_max: int,
    timeout_s: float | None,
    count: Callable[[int], None] = _not_counted,
) -> bytes:
    """The body, unpacked; raises BadRequest (400, 408, 413, 415) and Disconnected.

    ``count`` is told of bytes as they come and may raise. ``timeout_s`` None: it is there already.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", *WBITS):
        raise BadRequest(f"Content-Encoding {encoding[:40]!a} is not served: use gzip", 415)
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise _too_large(bytes_max)
    reading = _read(receive, bytes_max, count)
    body = await (reading if timeout_s is None else _in_time(reading, timeout_s))
    if encoding == "identity":
        return body
    if len(body) > IN_THREAD_BYTES:
        plain = await asyncio.to_thread(unpack, body, encoding, bytes_max)
    else:
        plain = unpack(body, encoding, bytes_max)
    count(len(plain))
    return plain


async def _in_time(reading: Awaitable[bytes], timeout_s: float) -> bytes:
    """As ``wait_for``, without a task: most bodies are there at once."""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def cancel() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(timeout_s, cancel)
    try:
        return await reading
    except asyncio.CancelledError:
        if not late:
            raise
        raise BadRequest(f"the body did not come within {timeout_s:g} s", 408) from None
    finally:
        timer.cancel()


async def _read(receive: Receive, bytes_max: int, count: Callable[[int], None]) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Disconnected
        part = message.get("body", b"")
        size += len(part)
        if size > bytes_max:
            raise _too_large(bytes_max)
        count(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else parts[0]


def unpack(body: bytes, encoding: str, bytes_max: int) -> bytes:
    """``body`` without its ``encoding``; never makes more than ``bytes_max``."""
    stream = zlib.decompressobj(WBITS[encoding])
    try:
        plain = stream.decompress(body, bytes_max + 1)
    except zlib.error:
        raise BadRequest(f"the body is not {encoding}") from None
    if len(plain) > bytes_max:
        raise _too_large(bytes_max)
    if not stream.eof or stream.unused_data:
        raise BadRequest(f"the body is not one whole {encoding} stream")
    return plain


def accepted(header: str) -> str:
    """The encoding for an answer, of those in ``Accept-Encoding``; empty: none."""
    for wanted in ("gzip", "deflate"):
        for part in header.lower().split(","):
            name, *options = part.replace(" ", "").split(";")
            if name == wanted and not any(re.fullmatch(r"q=0(\.0*)?", o) for o in options):
                return wanted
    return ""


async def pack(parts: list[bytes], encoding: str) -> bytes:
    if sum(map(len, parts)) > IN_THREAD_BYTES:
        return await asyncio.to_thread(_pack, parts, encoding)
    return _pack(parts, encoding)


def _pack(parts: list[bytes], encoding: str) -> bytes:
    stream = zlib.compressobj(level=1, wbits=WBITS[encoding])
    return b"".join([*map(stream.compress, parts), stream.flush()])


def _too_large(bytes_max: int) -> BadRequest:
    return BadRequest(f"the body has more than {bytes_max} bytes", 413)
