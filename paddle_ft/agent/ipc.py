"""Agent and worker talk over one Unix socket: a JSON message a line, both ways.

Invariant: a worker that loses its agent ends; an agent that loses a worker's connection waits for
the process itself to end. Nothing here is on the path of a training step: per-step figures go
through the beacon (``agent.beacon``), tensors through shared memory.

    worker                                  agent
      Hello                  ->
      RestoreRequest         ->
                             <-   RestoreReply        (the state to start from, or none)
      ShardsRequest          ->
                             <-   RestoreReply        (parts of divided tensors)
      RestoreTaken           ->                       (mapped: its file may go)
      Allocate(nbytes)       ->
                             <-   Allocated(paths)    (snapshot buffers the agent owns)
      SnapshotReady(buffer)  ->                       (the agent writes it, beside training)
                             <-   Released(buffer)    (may be overwritten)
                             <-   Committed(step)     (acknowledged: never lost from here on)
                             <-   SaveRequest         (agree with all ranks, save, go on)
                             <-   PauseRequest        (agree with all ranks, save, leave)
                             <-   Order               (join the group of another generation)
      LostPeer(reason)       ->                       (waits for an Order)
      Farewell(…)            ->                       (why the process is about to end)
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from paddle_ft.checkpoint.boxes import Box
from paddle_ft.types import ImageInfo, Recovery

log = logging.getLogger("paddle_ft")

ACCEPT_AGAIN_S = 0.05
LINE_BYTES_MAX = 64 * 1024 * 1024
"""A message names every tensor of a snapshot; 64 MiB is some 300,000 tensors."""


@dataclass(frozen=True, slots=True)
class Hello:
    rank: int
    generation: int
    """0 from a worker that has everything prepared and waits for an Order."""
    pid: int
    recovery: Recovery = ""
    """Whether this worker can go on in another group; "" from one that waits at the door."""
    type: Literal["hello"] = "hello"


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    rank: int
    world_size: int
    type: Literal["restore"] = "restore"


@dataclass(frozen=True, slots=True)
class RestoreReply:
    path: str | None
    """File with the bytes, to be mapped read-only; None: start from the beginning."""
    info: ImageInfo | None
    """All replicated tensors and this rank's local ones, with their place in the file."""
    sequence: int = -1
    generation: int = 0
    type: Literal["restored"] = "restored"


@dataclass(frozen=True, slots=True)
class ShardsRequest:
    """Asks for parts of tensors that are divided among the ranks; answered as RestoreRequest."""

    rank: int
    boxes: Mapping[str, Box]
    type: Literal["shards"] = "shards"


@dataclass(frozen=True, slots=True)
class RestoreTaken:
    rank: int
    type: Literal["taken"] = "taken"


@dataclass(frozen=True, slots=True)
class Allocate:
    rank: int
    nbytes: int
    type: Literal["allocate"] = "allocate"


@dataclass(frozen=True, slots=True)
class Allocated:
    paths: tuple[str, ...]
    """One file a buffer, each of at least the bytes asked for; empty: there is no memory."""
    type: Literal["allocated"] = "allocated"


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    buffer: int
    info: ImageInfo
    type: Literal["snapshot"] = "snapshot"


@dataclass(frozen=True, slots=True)
class Released:
    buffer: int
    type: Literal["released"] = "released"


@dataclass(frozen=True, slots=True)
class Committed:
    step: int
    sequence: int
    type: Literal["committed"] = "committed"


@dataclass(frozen=True, slots=True)
class PauseRequest:
    reason: str
    type: Literal["pause"] = "pause"


@dataclass(frozen=True, slots=True)
class Order:
    """Leave the group you are in and join that of ``generation``."""

    generation: int
    env: Mapping[str, str]
    """As for a worker that is started for it."""
    at_once: bool
    """The group is broken: leave it now, in the middle of a step. Else: all together, after one."""
    dismissed: bool = False
    """There is no place for this worker in it: it ends."""
    type: Literal["order"] = "order"


@dataclass(frozen=True, slots=True)
class LostPeer:
    reason: str
    type: Literal["lost_peer"] = "lost_peer"


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """The launcher was sent signal ``number``: a rule may want to save on it."""

    number: int
    type: Literal["save"] = "save"


@dataclass(frozen=True, slots=True)
class Published:
    """A version of a model is in ``store``."""

    name: str
    version: int
    store: str
    type: Literal["published"] = "published"


@dataclass(frozen=True, slots=True)
class Farewell:
    """The last message of a worker that knows why it ends."""

    kind: Literal["done", "paused", "fatal", "collective"]
    """``fatal``: a restart cannot help. ``collective``: a peer was lost, not this worker."""
    reason: str = ""
    exit_code: int = 0
    step: int = -1
    """Of the checkpoint that was handed over before leaving; -1 if none."""
    type: Literal["farewell"] = "farewell"


ToAgent = (
    Hello
    | LostPeer
    | RestoreRequest
    | ShardsRequest
    | RestoreTaken
    | Allocate
    | SnapshotReady
    | Published
    | Farewell
)
ToWorker = Order | RestoreReply | Allocated | Released | Committed | PauseRequest | SaveRequest
_Message = Annotated[ToAgent | ToWorker, Field(discriminator="type")]
_adapter: TypeAdapter[Any] = TypeAdapter(_Message)


class Channel:
    """One connection, either end. ``send`` is thread-safe; ``receive`` is for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.generation = -1
        self.rank = -1
        """Whose connection it is, once its Hello has come; agent's end only."""
        self.pid = 0
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, path: str, timeout_s: float = 10.0) -> Channel:
        """Connects to the agent listening at ``path``; raises OSError if there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            raise
        connection.settimeout(None)
        return cls(connection)

    def send(self, message: ToAgent | ToWorker) -> bool:
        """False if the other end has gone."""
        line: bytes = _adapter.dump_json(message) + b"\n"
        try:
            with self._lock:
                self._connection.sendall(line)
        except OSError:
            return False
        return True

    def receive(self) -> ToAgent | ToWorker | None:
        """The next message; None once the other end has gone. ValueError: not our protocol."""
        try:
            line = self._reader.readline(LINE_BYTES_MAX)
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        message: ToAgent | ToWorker = _adapter.validate_json(line)
        return message

    def close(self) -> None:
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._reader.close()
        self._connection.close()


class Listener:
    """The agent's end: accepts workers and hands every message to ``on_message``.

    ``on_message(channel, message)`` runs on the connection's own thread; message is None when the
    worker has gone.
    """

    def __init__(
        self, path: str, on_message: Callable[[Channel, ToAgent | ToWorker | None], None]
    ) -> None:
        self.path = path
        self._on_message = on_message
        self._closed = False
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(path)
        self._server.listen(64)
        threading.Thread(target=self._accept, name="ipc-accept", daemon=True).start()

    def _accept(self) -> None:
        complained = False
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError as error:  # out of descriptors, or the worker went before its turn
                if not self._closed and not complained:
                    complained = True
                    log.warning("a worker has to wait for its connection: %s", error.strerror)
                time.sleep(ACCEPT_AGAIN_S)
                continue
            complained = False
            channel = Channel(connection)
            threading.Thread(
                target=self._serve, args=(channel,), name="ipc-worker", daemon=True
            ).start()

    def _serve(self, channel: Channel) -> None:
        while True:
            try:
                message = channel.receive()
            except ValueError:
                message = None
            self._on_message(channel, message)
            if message is None:
                channel.close()
                return

    def close(self) -> None:
        self._closed = True
        try:
            self._server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._server.close()
