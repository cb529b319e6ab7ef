"""A worker process as its front sees it: what it is doing, and the batch it has."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from paddle_ft.errors import ConfigError
from paddle_ft.serve import shared
from paddle_ft.serve.predictor import Settings
from paddle_ft.serve.types import ModelError, ModelInfo, Tensors, Unavailable
from paddle_ft.serve.worker import MESSAGE_BYTES_MAX, info_of

_REAP_S = 10.0
Outputs = dict[str, NDArray[Any]]


class WorkerLost(Exception):
    """The process has ended, or was ended, with a batch of somebody's."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a worker is to load."""

    folder: Path
    name: str
    version: str
    settings: Settings
    bytes_max: int


@dataclass(slots=True)
class Batch:
    """One that a worker is at."""

    number: int
    nbytes: int
    began_s: float
    outputs: asyncio.Future[Outputs]
    moved_s: float
    """When the worker was last seen to use the processor, or to wait for it."""
    ticks: int = -1


class WorkerProcess:
    """One process; for the thread of the event loop.

    ``on_change(worker)`` is called when it gets ready, is through with a batch, or is lost.
    """

    def __init__(self, on_change: Callable[[WorkerProcess], None]) -> None:
        self.stage = "starts"
        self.lost = ""
        """Why it is no more; "" while it lives."""
        self.batch: Batch | None = None
        self.took: tuple[int, float] | None = None
        """Bytes and seconds of the batch that has just ended well; for who takes note of it."""
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(_seen)
        self._on_change = on_change
        self._numbers = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._inputs: shared.Memory | None = None
        self._outputs: shared.Memory | None = None
        self._socket: socket.socket | None = None
        self._life: socket.socket | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def idle(self) -> bool:
        return self.batch is None and not self.lost and self.ready.done()

    async def start(self, source: Source) -> None:
        """Starts the process; ``ready`` tells when it can be used."""
        if self.ready.done():  # closed before it began
            return
        theirs: list[socket.socket] = []
        try:
            self._socket, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.append(control)
            self._life, life = socket.socketpair()
            theirs.append(life)
            self._inputs = shared.Memory.create(source.bytes_max)
            self._outputs = shared.Memory.create(source.bytes_max)
            # Not on the loop: a start takes tens of milliseconds in a large process.
            self._process = await asyncio.to_thread(
                _spawn,
                control.fileno(),
                life.fileno(),
                self._inputs.descriptor,
                self._outputs.descriptor,
            )
        except OSError as error:
            self._end(f"it cannot be started ({error.strerror})")
            return
        finally:
            for end in theirs:
                end.close()
        if self.lost:  # closed meanwhile
            self._process.kill()
            await self.reap()
            return
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        order = {**asdict(source), "folder": str(source.folder.absolute())}
        self._send({"load": order})

    # ------------------------------------------------------------ batches

    def run(self, inputs: Tensors) -> asyncio.Future[Outputs]:
        """Gives an idle worker a batch; the future raises ModelError, Unavailable or WorkerLost.

        Raises ModelError, Unavailable at once for what does not fit into its memory.
        """
        assert self.idle
        assert self._inputs is not None
        header, nbytes = shared.write(self._inputs, inputs)
        now_s = time.monotonic()
        outputs: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        outputs.add_done_callback(_seen)
        self._numbers += 1
        self.batch = Batch(self._numbers, nbytes, now_s, outputs, now_s)
        self._send({"run": self._numbers, "tensors": header, "nbytes": self._inputs.nbytes})
        return outputs

    def look(self) -> tuple[float, float, float]:
        """Of its batch, seconds: since it began, stopped by a signal, without moving."""
        batch = self.batch
        assert batch is not None
        now_s = time.monotonic()
        state, ticks = _state(self.pid)
        if state == "R" or (ticks != batch.ticks and batch.ticks >= 0):
            batch.moved_s = now_s
        batch.ticks = ticks
        still_s = now_s - batch.moved_s
        return now_s - batch.began_s, still_s if state in "Tt" else 0.0, still_s

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(MESSAGE_BYTES_MAX)
            message = json.loads(data) if data else None
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message = None
        if message is None:
            self.kill("")
        elif "stage" in message:
            self.stage = message["stage"]
            self._on_change(self)
        elif "ready" in message:
            self.stage = "ready"
            self.ready.set_result(info_of(message["ready"]))
            self._on_change(self)
        elif "failed" in message:
            self.ready.set_exception(ConfigError(message["failed"]))
            self.kill(message["failed"])
        else:
            self._answered(message)

    def _answered(self, message: dict[str, Any]) -> None:
        batch, self.batch = self.batch, None
        assert self._outputs is not None
        if batch is None or batch.number != message.get("done", message.get("error")):
            self.kill("it answers what was not asked")
            return
        future = batch.outputs
        if "error" in message:
            kind = ModelError if message["kind"] == "model" else Unavailable
            future.set_exception(kind(message["text"]))
        else:
            self.took = batch.nbytes, time.monotonic() - batch.began_s
            try:
                view = self._outputs.seen(message["nbytes"])
                future.set_result(shared.read(view, message["tensors"], copy=True))
            except (ValueError, TypeError, OSError) as error:
                future.set_exception(WorkerLost(str(error)))
                self.kill("it answers what cannot be read")
                return
        self._on_change(self)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError as error:
            self.kill(f"it cannot be told anything ({error.strerror})")

    # ------------------------------------------------------------ the end

    def kill(self, reason: str) -> None:
        """Ends it now; ``reason`` "" if it has ended by itself."""
        if self.lost:
            return
        if self._process is not None:
            if not reason:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.02)  # its socket is closed, so it is all but gone
                reason = _ended(self._process.returncode)
            self._process.kill()
        self._end(reason or "it was not wanted any more")

    def _end(self, reason: str) -> None:
        self.lost = reason
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        if self._life is not None:
            self._life.close()
        for memory in (self._inputs, self._outputs):
            if memory is not None:
                memory.close()
        if not self.ready.done():
            self.ready.set_exception(WorkerLost(reason))
        batch, self.batch = self.batch, None
        if batch is not None and not batch.outputs.done():
            batch.outputs.set_exception(WorkerLost(reason))
        self._on_change(self)

    async def reap(self) -> None:
        """Returns once the killed process is gone."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _REAP_S)


def _seen(future: asyncio.Future[Any]) -> None:
    """Nobody need wait for it: its error is no news."""
    if not future.cancelled():
        future.exception()


def _spawn(*descriptors: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "paddle_ft.serve.worker", *map(str, descriptors)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)


def _ended(code: int | None) -> str:
    if code is None:
        return "it closed its connection"
    if code < 0:
        with suppress(ValueError):
            return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with {code}"


def _state(pid: int) -> tuple[str, int]:
    """State of a process as in /proc, and the processor time it has used, in ticks."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return "X", 0
    return fields[0].decode(), int(fields[11]) + int(fields[12])
