"""A worker process as its front sees it: what it is doing, and the batch it has."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddle_ft.errors import ConfigError
from paddle_ft.serve import messages, shared
from paddle_ft.serve.forks import Forks, Process, popen
from paddle_ft.serve.pipeline import said
from paddle_ft.serve.predictor import Settings
from paddle_ft.serve.tensors import nbytes_of
from paddle_ft.serve.types import ModelError, ModelInfo, ServeError, Tensors, Unavailable
from paddle_ft.serve.worker import info_of

_log = logging.getLogger("paddle_ft")
_MODULE = "paddle_ft.serve.worker"
_REAP_S = 10.0
_STATE_S = 5.0
_INLINE_BYTES = 8 * 2**20
"""Batches above it are copied beside the event loop."""
Outputs = dict[str, NDArray[Any]]
"""With what the session is to keep under ``worker.STATE``, if a pipeline changed something."""
Done = Callable[[Outputs | Exception], None]
"""Takes what a batch has come to."""
Fetch = Callable[[str], Awaitable[bytes | None]]
"""The value that the batch's session has under a key; raises ServeError."""


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
    began_s: float
    done: Done
    fetch: Fetch | None
    nbytes: int = 0
    """Where its inputs end."""
    moved_s: float = 0.0
    """When the worker was last seen to use the processor, or to wait for it."""
    ticks: int = -1
    waits_s: float | None = None
    """Since when the worker waits for this process: that time is not its own."""

    def wait(self) -> None:
        self.waits_s = time.monotonic()

    def go_on(self) -> None:
        if self.waits_s is not None:
            self.began_s += time.monotonic() - self.waits_s
        self.moved_s, self.waits_s = time.monotonic(), None


class WorkerProcess:
    """One process; for the thread of the event loop.

    ``on_change(worker)`` is called when it gets ready, is through with a batch, or is lost.
    """

    def __init__(
        self, on_change: Callable[[WorkerProcess], None], forks: Forks | None = None
    ) -> None:
        self.stage = "starts"
        self.lost = ""
        """Why it is no more; "" while it lives."""
        self.batch: Batch | None = None
        self.took: tuple[int, float] | None = None
        """Bytes and seconds of the batch that has just ended well; for who takes note of it."""
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(seen)
        self._on_change, self._forks = on_change, forks
        self._numbers = 0
        self._process: Process | None = None
        self._inputs: shared.Memory | None = None
        self._outputs: shared.Memory | None = None
        self._socket: socket.socket | None = None
        self._life: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def idle(self) -> bool:
        return self.batch is None and not self.lost and self.ready.done()

    @property
    def is_fresh(self) -> bool:
        """It has become ready, and has had no batch."""
        return self.idle and not self._numbers

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
            memories = self._inputs.descriptor, self._outputs.descriptor
            with self._inputs.in_use(), self._outputs.in_use():
                numbers = control.fileno(), life.fileno(), *memories
                if self._forks is not None:
                    self._process = await self._forks.start(numbers, lambda: bool(self.lost))
                if self._process is None and not self.lost:
                    # Not on the loop: a start takes tens of milliseconds in a large process.
                    self._process = await asyncio.to_thread(popen, _MODULE, *numbers)
        except OSError as error:
            if not self.lost:
                self._end(f"it cannot be started ({error.strerror})")
            return
        finally:
            for end in theirs:
                end.close()
        if self.lost:  # closed meanwhile
            if self._process is not None:
                self._process.kill()
                await self.reap()
            return
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        order = {**asdict(source), "folder": str(source.folder.absolute())}
        self._send({"load": order})

    # ------------------------------------------------------------ batches

    def give(self, inputs: Tensors, done: Done, fetch: Fetch | None = None) -> None:
        """Gives an idle worker a batch; ``done`` is called as soon as that has ended, with its
        outputs or with a ModelError, Unavailable or WorkerLost.

        ``fetch`` answers a pipeline that asks for its session's state. Raises ModelError,
        Unavailable at once, too, for what does not fit into its memory.
        """
        assert self.idle
        assert self._inputs is not None
        self._numbers += 1
        batch = self.batch = Batch(self._numbers, time.monotonic(), done, fetch)
        batch.wait()
        if nbytes_of(inputs) > _INLINE_BYTES:
            self._spawn(self._give(batch, inputs))
            return
        try:
            header, batch.nbytes = shared.write(self._inputs, inputs)
        except BaseException:
            self.batch = None
            raise
        self._begin(batch, header)

    async def _give(self, batch: Batch, inputs: Tensors) -> None:
        assert self._inputs is not None
        try:
            with self._inputs.in_use():
                header, batch.nbytes = await asyncio.to_thread(shared.write, self._inputs, inputs)
        except ServeError as error:
            self._end_batch(batch, error)
        except Exception as error:  # noqa: BLE001 - as of a batch that is written at once
            _log.error("a batch cannot be given to worker %d: %s", self.pid, said(error))
            self._end_batch(batch, Unavailable("There is no memory for these inputs just now."))
        else:
            if self.batch is batch:
                self._begin(batch, header)

    def _begin(self, batch: Batch, header: messages.Header) -> None:
        assert self._inputs is not None
        batch.go_on()
        self._send(
            {
                "run": batch.number,
                "tensors": header,
                "nbytes": self._inputs.nbytes,
                "session": batch.fetch is not None,
            }
        )

    def _end_batch(self, batch: Batch, result: Outputs | Exception) -> None:
        if self.batch is not batch:  # the worker was lost meanwhile
            return
        self.batch = None
        self._on_change(self)
        batch.done(result)

    def look(self) -> tuple[float, float, float]:
        """Of its batch, seconds: since it began, stopped by a signal, without moving."""
        batch = self.batch
        assert batch is not None
        now_s = time.monotonic()
        state, ticks = _state(self.pid)
        if state == "R" or batch.waits_s is not None or (ticks != batch.ticks and batch.ticks >= 0):
            batch.moved_s = now_s
        batch.ticks = ticks
        still_s = now_s - batch.moved_s
        ran_s = (batch.waits_s or now_s) - batch.began_s
        return ran_s, still_s if state in "Tt" else 0.0, still_s

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(messages.BYTES_MAX)
            message = messages.unpack(data) if data else None
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
        elif self.batch is None or self.batch.number != message.get("of"):
            self.kill("it answers what was not asked")
        elif "get" in message:
            self.batch.wait()
            self._spawn(self._fetch(self.batch, message["get"]))
        elif "error" in message:
            kind = ModelError if message["error"] == "model" else Unavailable
            self._end_batch(self.batch, kind(message["text"]))
        else:
            self.took = self.batch.nbytes, time.monotonic() - self.batch.began_s
            if sum(entry[-1] for entry in message["done"]) > _INLINE_BYTES:
                self.batch.wait()
                self._spawn(self._take(self.batch, message))
            else:
                self._answered(self.batch, partial(self._outputs_of, message))

    async def _take(self, batch: Batch, message: dict[str, Any]) -> None:
        assert self._outputs is not None
        with self._outputs.in_use():
            copied = asyncio.ensure_future(asyncio.to_thread(self._outputs_of, message))
            copied.add_done_callback(seen)
            await asyncio.wait([copied])
        if self.batch is batch:
            self._answered(batch, copied.result)

    def _answered(self, batch: Batch, outputs: Callable[[], Outputs]) -> None:
        try:
            result = outputs()
        except Exception as error:  # noqa: BLE001 - a worker can answer anything
            _log.error("worker %d answers what cannot be read: %s", self.pid, said(error))
            self.kill("it answers what cannot be read")
        else:
            self._end_batch(batch, result)

    def _outputs_of(self, message: dict[str, Any]) -> Outputs:
        assert self._outputs is not None
        return shared.read(self._outputs.seen(message["nbytes"]), message["done"], copy=True)

    async def _fetch(self, batch: Batch, key: str) -> None:
        """Answers a pipeline; the value lies behind the batch's inputs."""
        assert self._inputs is not None
        assert batch.fetch is not None
        header: messages.Header = ()
        reply: dict[str, Any]
        try:
            value = await asyncio.wait_for(batch.fetch(key), _STATE_S)
            if self.batch is not batch:
                return
            if value is not None:
                given = {"value": np.array([value], object)}
                header, _ = shared.write(self._inputs, given, batch.nbytes)
            reply = {"value": header, "nbytes": self._inputs.nbytes}
        except ServeError as error:
            reply = {"refused": str(error), "for_good": error.status == ModelError.status}
        except asyncio.TimeoutError:
            reply = {"refused": f"The state of the session was not read within {_STATE_S:g} s."}
        except Exception:  # noqa: BLE001 - the pipeline waits for an answer, whatever it is
            _log.exception("a defect where the state of sessions is kept")
            reply = {"refused": "The state of the session cannot be read."}
        if self.batch is batch:
            batch.go_on()
            self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        try:
            self._socket.send(messages.pack(message))
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
        self._on_change(self)
        if batch is not None:
            batch.done(WorkerLost(reason))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reap(self) -> None:
        """Returns once the killed process is gone, and whatever was done for it."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _REAP_S)


def was_ready(worker: WorkerProcess) -> bool:
    return worker.ready.done() and worker.ready.exception() is None


def seen(future: asyncio.Future[Any]) -> None:
    """Nobody need wait for it: its error is no news."""
    if not future.cancelled():
        future.exception()


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
