"""The load of the serving benchmark, in a process of its own: it must not wait for who measures.

python -m bench.serving_load SPEC.json

Inference at a fixed rate (open loop: a request that is late does not hold back the next, and its
latency counts from when it was to be sent) or from so many clients, each one after another (closed
loop); beside it writers of the state, each with numbers that rise. It says "ready", goes on until
its stdin ends, and writes ``out``.bin (records as in ``serving_analysis``) and ``out``.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serving_analysis import LOST, RECORD, TIMED_OUT, WRONG, Ack

CONNECTIONS_MAX = 512
KEYS = 40
"""Of each writer, used in turn, so that what is lost is not at once covered by what comes after."""
READ_EVERY = 10
TOLD_MAX = 50
TERM = re.compile(rb"paddle-ft-term:\s*(\d+)\.(\d+)", re.IGNORECASE)
LENGTH = re.compile(rb"\ncontent-length:\s*(\d+)", re.IGNORECASE)
VERSION = re.compile(rb'"model_version"\s*:\s*"(\d+)"')
JSON_LENGTH = re.compile(rb"inference-header-content-length:\s*(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Spec:
    """What is asked, and of whom."""

    port: int
    out: str
    samples: str
    """JSON: ``x``, rows; ``scores``, for each version what each gives. Or, if it does not end in
    ``.json``, one whole request, of whose answers only that they are some is looked at."""
    model: str = "digits"
    host: str = "127.0.0.1"
    rate_hz: float = 0.0
    """0: closed loop."""
    clients: int = 16
    writers: int = 0
    put_pause_s: float = 0.05
    timeout_s: float = 30.0


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection that is kept; one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: Any = None
        self._data = b""
        self._waiting: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionResetError(f"closed without an answer ({exc})"))

    def data_received(self, data: bytes) -> None:
        self._data += data
        answer = parsed(self._data)
        if answer is None or self._waiting is None or self._waiting.done():
            return
        self._data = b""
        if b"connection: close" in answer[1].lower():
            self.close()
        self._waiting.set_result(answer)

    async def ask(self, data: bytes, timeout_s: float) -> tuple[int, bytes, bytes]:
        """(status, head, body); raises ConnectionError, asyncio.TimeoutError."""
        if self.closed:  # nobody would ever answer
            raise ConnectionResetError("closed before it was asked")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            return await asyncio.wait_for(self._waiting, timeout_s)
        except asyncio.TimeoutError:
            self.close()
            raise

    def close(self) -> None:
        self.closed = True
        self._transport.close()


def parsed(data: bytes) -> tuple[int, bytes, bytes] | None:
    """(status, head, body) if ``data`` is a whole answer."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return None
    found = LENGTH.search(head)
    if found is None and b"chunked" in head.lower():
        if not body.endswith(b"0\r\n\r\n"):
            return None
        whole = b""
        while body and (size := int(body.partition(b"\r\n")[0], 16)):
            rest = body.partition(b"\r\n")[2]
            whole, body = whole + rest[:size], rest[size + 2 :]
        body = whole
    elif len(body) < (int(found[1]) if found else 0):
        return None
    return int(head[9:12]), head, body


def requests(spec: Spec) -> tuple[list[bytes], list[list[list[float]]]]:
    """A request for each row, binary tensors both ways, and the scores by version and row."""
    if not spec.samples.endswith(".json"):
        return [Path(spec.samples).read_bytes()], []
    told = json.loads(Path(spec.samples).read_text())
    return [infer_request(spec.model, row) for row in told["x"]], told["scores"]


def infer_request(model: str, row: list[float]) -> bytes:
    raw = struct.pack(f"<{len(row)}f", *row)
    tensor: dict[str, Any] = {"name": "image", "datatype": "FP32", "shape": [1, len(row)]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: bench\r\n"
        f"Content-Length: {len(head) + len(raw)}\r\n"
        f"Inference-Header-Content-Length: {len(head)}\r\n\r\n"
    ).encode() + head + raw  # fmt: skip


@dataclass
class Load:
    spec: Spec
    records: bytearray = field(default_factory=bytearray)
    told: dict[str, list[float]] = field(default_factory=dict)
    """Why requests failed: how many, when the first and the last."""
    acks: list[Ack] = field(default_factory=list)
    put_failures: Counter[str] = field(default_factory=Counter)
    stale: list[str] = field(default_factory=list)
    reads: int = 0
    state: str = ""
    """Why there is no state; "": there is, or nobody has asked."""

    def __post_init__(self) -> None:
        self._idle: list[Connection] = []
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._requests, self._scores = requests(self.spec)
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, self.spec.host, self.spec.port))[1]

    async def _one(self, number: int, intended_s: float) -> None:
        row = number % len(self._requests)
        sent_s, version, why = intended_s, 0, ""
        connection: Connection | None = None
        async with self._room:
            try:
                while self._idle and connection is None:
                    connection = self._idle.pop()
                    connection = None if connection.closed else connection
                if connection is None:
                    connection = await self.connect()
                sent_s = time.monotonic()
                status, head, body = await connection.ask(self._requests[row], self.spec.timeout_s)
                status, version, why = self._judge(row, status, head, body)
                if not connection.closed:
                    self._idle.append(connection)
            except asyncio.TimeoutError:
                status, why = TIMED_OUT, "no answer in time"
            except OSError as error:
                status, why = LOST, f"{type(error).__name__}: {error}"
        answered_s = time.monotonic()
        self.records += RECORD.pack(intended_s, sent_s, answered_s, status, version)
        if why and (why in self.told or len(self.told) < TOLD_MAX):
            found = self.told.setdefault(why, [0, answered_s, answered_s])
            found[0], found[2] = found[0] + 1, answered_s

    def _judge(self, row: int, status: int, head: bytes, body: bytes) -> tuple[int, int, str]:
        """(status, version, what is wrong)."""
        if status != 200:
            return status, 0, f"{status} {body[:100].decode(errors='replace')}"
        found, length = VERSION.search(body), JSON_LENGTH.search(head)
        version = int(found[1]) if found else 0
        if (self._scores and length is None) or version < 1:
            return WRONG, version, f"an answer without what belongs to one: {body[:200]!r}"
        if length is not None and version <= len(self._scores):
            expected = self._scores[version - 1][row]
            raw = body[int(length[1]) :]
            if len(raw) != 4 * len(expected) or any(
                abs(a - b) > 1e-3
                for a, b in zip(struct.unpack(f"<{len(expected)}f", raw), expected, strict=True)
            ):
                return WRONG, version, f"row {row} of version {version} has other scores"
        return status, version, ""

    async def _at_a_rate(self) -> None:
        begin_s, number = time.monotonic() + 0.01, 0
        while not self._stop.is_set():
            intended_s = begin_s + number / self.spec.rate_hz
            if (wait_s := intended_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.ensure_future(self._one(number, intended_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            number += 1

    async def _client(self, number: int) -> None:
        while not self._stop.is_set():
            begin_s = time.monotonic()
            await self._one(number, begin_s)
            number += 1
            if time.monotonic() - begin_s < 0.0005:  # refused at once: not in a tight loop
                await asyncio.sleep(0.001)

    # ------------------------------------------------------------ the state

    async def _writer(self, writer: int) -> None:
        number, connection = 0, None
        while not self._stop.is_set() and not self.state:
            number += 1
            key, acknowledged = f"k{number % KEYS}", False
            while not acknowledged and not self._stop.is_set() and not self.state:
                try:
                    if connection is None or connection.closed:
                        connection = await self.connect()
                    acknowledged = await self._put(connection, writer, key, number)
                except (OSError, asyncio.TimeoutError) as error:
                    self.put_failures[type(error).__name__] += 1
                if not acknowledged:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(self.spec.put_pause_s)
        if connection is not None and not connection.closed:
            connection.close()

    async def _put(self, connection: Connection, writer: int, key: str, number: int) -> bool:
        path, body = f"/v2/state/bench{writer}/{key}", str(number).encode()
        asked_s = time.monotonic()
        data = f"PUT {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
        status, head, said = await connection.ask(data.encode() + body, 5.0)
        term = TERM.search(head)
        if status == 404 or status == 405 or (status // 100 == 2 and term is None):
            self.state = f"there is no door for the state: PUT {path} gets {status} {said[:100]!r}"
        if status // 100 != 2 or term is None:
            self.put_failures[f"{status} {said[:120].decode(errors='replace')}"] += 1
            return False
        at = (int(term[1]), int(term[2]))
        self.acks.append(Ack(asked_s, time.monotonic(), *at, writer, key, number))
        if number % READ_EVERY == 0:
            other = await self.connect() if connection.closed else connection
            await self._read(other, path, number, at)
            if other is not connection:
                other.close()
        return True

    async def _read(
        self, connection: Connection, path: str, number: int, at: tuple[int, int]
    ) -> None:
        """Its own write, by the token that it was given."""
        token = f"Paddle-Ft-Term: {at[0]}.{at[1]}"
        data = f"GET {path} HTTP/1.1\r\nHost: bench\r\n{token}\r\n\r\n"
        status, _, body = await connection.ask(data.encode(), 5.0)
        if status == 200:
            self.reads += 1
            if body != str(number).encode():
                self.stale.append(f"{path} of {number} reads {body[:40]!r}")
        elif status == 404:
            self.stale.append(f"{path} of {number} is not there")

    async def run(self) -> None:
        """Until stdin ends."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        if self.spec.rate_hz:
            self._tasks.add(asyncio.ensure_future(self._at_a_rate()))
        else:
            self._tasks |= {
                asyncio.ensure_future(self._client(n)) for n in range(self.spec.clients)
            }
        self._tasks |= {asyncio.ensure_future(self._writer(n)) for n in range(self.spec.writers)}
        began_s, used_s = time.monotonic(), time.process_time()
        print("ready", flush=True)
        await reader.read()
        self._stop.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(
                asyncio.gather(*self._tasks, return_exceptions=True), self.spec.timeout_s + 5
            )
        share = (time.process_time() - used_s) / (time.monotonic() - began_s)
        for connection in self._idle:
            connection.close()
        self._write(share)

    def _write(self, share: float) -> None:
        out = Path(self.spec.out)
        out.with_suffix(".bin").write_bytes(self.records)
        told = {
            "core_share": share, "told": self.told, "state": self.state, "reads": self.reads,
            "acks": [list(a) for a in self.acks], "stale": self.stale,
            "put_failures": dict(self.put_failures.most_common(20)),
        }  # fmt: skip
        out.with_suffix(".json").write_text(json.dumps(told))


async def main() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # late sending would count as late answers
    await Load(Spec(**json.loads(Path(sys.argv[1]).read_text()))).run()


if __name__ == "__main__":
    asyncio.run(main())
