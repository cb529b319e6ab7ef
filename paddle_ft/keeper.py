"""Where a session's snapshots go and where its state comes from.

``AgentKeeper`` hands them to the agent that started this process; ``NullKeeper`` is for a script
that runs alone and keeps nothing. A keeper owns the buffers: at most ``buffers`` snapshots are in
flight, and while none is free there is no new one.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from paddle_ft.agent.ipc import (
    Allocate,
    Allocated,
    Channel,
    Committed,
    Farewell,
    Hello,
    LostPeer,
    Order,
    PauseRequest,
    Published,
    Released,
    RestoreReply,
    RestoreRequest,
    RestoreTaken,
    SaveRequest,
    ShardsRequest,
    SnapshotReady,
)
from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.snapshot import Image
from paddle_ft.errors import (
    EXIT_WORKER_FAILED,
    CollectiveFailed,
    ConfigError,
    StoreFull,
    WorkerFailed,
)
from paddle_ft.exits import end, say
from paddle_ft.types import ImageInfo, Recovery

_TELL_INTERVAL_S = 5.0
_NO_MEMORY_RETRY_S = 5.0
_NO_MEMORY_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 60.0

Kind = Literal["done", "paused", "fatal", "collective"]


class Superseded(CollectiveFailed):
    """What was waited for is not needed: this worker is to join another group."""


class Keeper(Protocol):
    """What a session needs of the place its snapshots go to."""

    saves: bool
    """False: there is no such place, and no snapshot is to be taken."""
    committed_step: int
    """Step of the newest checkpoint known to be safe; -1 if none."""
    pause_reason: str
    """Why this rank was asked to save and leave; "" if it was not."""
    pause_exit_code: int
    asked: frozenset[int]
    """Signals on which a rule may want to save; whoever has saved empties it."""
    order: Order | None
    """The newest order to join another group."""

    def restore(self) -> Image | None:
        """The state to start from."""

    def free(self) -> bool:
        """Whether a snapshot can be taken now, as far as is known."""

    def acquire(self, nbytes: int, wait: bool) -> tuple[int, memoryview] | None:
        """A buffer of at least ``nbytes``; None if there is none, unless ``wait``.

        Raises StoreFull if there is no memory for one at all and ``wait`` is set.
        """

    def publish(self, buffer: int, info: ImageInfo) -> None:
        """The buffer holds a whole snapshot."""

    def give_back(self, buffer: int) -> None:
        """The buffer was not used after all."""

    def wait_committed(self, step: int) -> None:
        """Returns once the checkpoint of ``step`` is safe; says what it waits for."""

    def published(self, name: str, version: int, store: str) -> None:
        """Tells that a version of a model is in ``store``."""

    def join(self, rank: int, world_size: int, generation: int, recovery: Recovery) -> None:
        """Tells that this worker is ``rank`` of ``generation``, and what it can do in the next."""

    def lost_peer(self, reason: str) -> None:
        """Tells that the group is broken, and why."""

    def wait_order(self, after: int) -> Order:
        """The newest order for a generation later than ``after``, once there is one."""

    def close(
        self, kind: Kind | None, reason: str = "", exit_code: int = 0, step: int = -1
    ) -> None:
        """Ends the connection; ``kind`` is None for an ordinary exception of the script."""


class NullKeeper:
    """Keeps nothing."""

    saves = False
    committed_step = -1
    pause_reason = ""
    pause_exit_code = 0
    asked: frozenset[int] = frozenset()
    order: Order | None = None

    def join(self, rank: int, world_size: int, generation: int, recovery: Recovery) -> None:
        pass

    def lost_peer(self, reason: str) -> None:
        pass

    def wait_order(self, after: int) -> Order:
        raise AssertionError("nobody gives orders")

    def restore(self) -> Image | None:
        return None

    def free(self) -> bool:
        return False

    def acquire(self, nbytes: int, wait: bool) -> tuple[int, memoryview] | None:
        return None

    def publish(self, buffer: int, info: ImageInfo) -> None:
        raise AssertionError("there was no buffer to publish")

    def give_back(self, buffer: int) -> None:
        raise AssertionError("there was no buffer to give back")

    def wait_committed(self, step: int) -> None:
        pass

    def published(self, name: str, version: int, store: str) -> None:
        pass

    def close(
        self, kind: Kind | None, reason: str = "", exit_code: int = 0, step: int = -1
    ) -> None:
        pass


class AgentKeeper:
    """The agent at the other end of ``socket``. A process that loses its agent ends at once.

    ``on_order`` is called from a thread for each order that is to be followed at once.
    """

    saves = True
    pause_exit_code = 0

    def __init__(self, socket: str, on_order: Callable[[Order], None] = lambda _: None) -> None:
        self.committed_step = -1
        self.pause_reason = ""
        self.asked: frozenset[int] = frozenset()
        self.order: Order | None = None
        self._on_order = on_order
        self._rank = -1
        self._world_size = 0
        self._generation = 0
        self._changed = threading.Condition()
        self._maps: list[mmap.mmap] = []
        self._nbytes = 0
        self._free: list[int] = []
        """The one used longest ago first, so that the newest snapshot stays for a restart."""
        self._reply: RestoreReply | Allocated | None = None
        self._no_memory_until_s = 0.0
        self._closing = False
        try:
            self._channel = Channel.connect(socket)
        except OSError as error:
            raise ConfigError(
                f"The agent of this worker does not answer at {socket} ({error.strerror}); start "
                f"the script with paddle_ft.launch, or unset PADDLE_FT to run it alone."
            ) from None
        threading.Thread(target=self._read, name="agent", daemon=True).start()

    # ------------------------------------------------------------ generations

    def join(self, rank: int, world_size: int, generation: int, recovery: Recovery) -> None:
        self._rank, self._world_size, self._generation = rank, world_size, generation
        self._channel.send(Hello(rank, generation, os.getpid(), recovery))

    def lost_peer(self, reason: str) -> None:
        self._channel.send(LostPeer(reason))

    def wait_order(self, after: int) -> Order:
        with self._changed:
            what = "a place in the job" if after == 0 else "the group to be formed again"
            self._wait_until(lambda: self._is_ordered(after), what, quiet=after == 0)
            assert self.order is not None
            return self.order

    def _is_ordered(self, after: int) -> bool:
        order = self.order
        return order is not None and order.generation > after

    # ------------------------------------------------------------ the state to start from

    def restore(self) -> Image | None:
        reply = self._ask(RestoreRequest(self._rank, self._world_size), None, unless_ordered=True)
        assert isinstance(reply, RestoreReply)
        if reply.info is None:
            return None
        self.committed_step = reply.info.step
        image = Image.open(reply.path or os.devnull, reply.info, self._read_boxes)
        self._channel.send(RestoreTaken(self._rank))
        return image

    def _read_boxes(self, wanted: Mapping[str, Box]) -> dict[str, memoryview]:
        reply = self._ask(ShardsRequest(self._rank, dict(wanted)), None, unless_ordered=True)
        assert isinstance(reply, RestoreReply)
        assert reply.path is not None
        assert reply.info is not None
        image = Image.open(reply.path, reply.info)
        os.unlink(reply.path)  # it is for this rank alone
        return {name: image.read(name) for name in wanted}

    # ------------------------------------------------------------ buffers

    def free(self) -> bool:
        with self._changed:
            if self._maps or not self._nbytes:
                return bool(self._free) or not self._maps
            return time.monotonic() >= self._no_memory_until_s

    def acquire(self, nbytes: int, wait: bool) -> tuple[int, memoryview] | None:
        enough = bool(self._maps) and nbytes <= self._nbytes
        if not enough and not self._allocate(nbytes, wait):
            return None
        with self._changed:
            if wait:
                self._wait_unless_ordered(lambda: bool(self._free), "a free snapshot buffer")
            if not self._free:
                return None
            buffer = self._free.pop(0)
            return buffer, memoryview(self._maps[buffer])

    def _allocate(self, nbytes: int, wait: bool) -> bool:
        with self._changed:  # what is in flight refers to the buffers by number
            if not wait and not self._all_free():
                return False
            self._wait_unless_ordered(self._all_free, "snapshots to be written")
        deadline_s = time.monotonic() + _NO_MEMORY_TIMEOUT_S
        while True:
            reply = self._ask(Allocate(self._rank, max(nbytes, 1)), _ANSWER_TIMEOUT_S)
            assert isinstance(reply, Allocated)
            with self._changed:
                self._nbytes = max(nbytes, 1)
                self._maps = [_mapped(Path(path)) for path in reply.paths]
                self._free = list(range(len(self._maps)))
                self._no_memory_until_s = time.monotonic() + _NO_MEMORY_RETRY_S
            if self._maps or not wait:
                return bool(self._maps)
            if time.monotonic() >= deadline_s:
                raise StoreFull(
                    f"There is no shared memory for a snapshot of {nbytes / 1e6:.0f} MB on this "
                    f"node; enlarge /dev/shm or lower checkpoint.buffers."
                )
            time.sleep(1.0)

    def _all_free(self) -> bool:
        return len(self._free) == len(self._maps)

    def publish(self, buffer: int, info: ImageInfo) -> None:
        self._channel.send(SnapshotReady(buffer, info))

    def give_back(self, buffer: int) -> None:
        with self._changed:
            self._free.insert(0, buffer)
            self._changed.notify_all()

    def wait_committed(self, step: int) -> None:
        with self._changed:
            self._wait_unless_ordered(
                lambda: self.committed_step >= step, f"the checkpoint of step {step} to be stored"
            )

    def published(self, name: str, version: int, store: str) -> None:
        self._channel.send(Published(name, version, store))

    # ------------------------------------------------------------ the connection

    def close(
        self, kind: Kind | None, reason: str = "", exit_code: int = 0, step: int = -1
    ) -> None:
        with self._changed:
            self._closing = True
        if kind is not None:
            self._channel.send(Farewell(kind, reason, exit_code, step))
        self._channel.close()

    def _ask(
        self,
        message: RestoreRequest | ShardsRequest | Allocate,
        timeout_s: float | None,
        unless_ordered: bool = False,
    ) -> RestoreReply | Allocated:
        """``unless_ordered``: an order raises Superseded.

        Whatever order it is: the agent does not answer for a generation that is over.
        """
        with self._changed:
            self._reply = None
            self._channel.send(message)
            what = "the agent" if timeout_s else "the checkpoint to be loaded"

            def over() -> bool:
                return self._reply is not None or (
                    unless_ordered and self._is_ordered(self._generation)
                )

            self._wait_until(over, what, timeout_s)
            reply: RestoreReply | Allocated | None = self._reply
        if reply is None:
            raise Superseded(f"Rank {self._rank} is to join another group.")
        return reply

    def _wait_unless_ordered(self, condition: Callable[[], bool], what: str) -> None:
        """As ``_wait_until``; raises Superseded if an order comes first."""
        self._wait_until(lambda: condition() or self._is_ordered(self._generation), what)
        if not condition():
            raise Superseded(f"Rank {self._rank} is to join another group.")

    def _wait_until(
        self,
        condition: Callable[[], bool],
        what: str,
        timeout_s: float | None = None,
        quiet: bool = False,
    ) -> None:
        """Waits with ``_changed`` held; tells what for, every few seconds.

        Without ``timeout_s`` the end is the agent's to decide: it ends this process.
        """
        start_s = time.monotonic()
        while not self._changed.wait_for(condition, _TELL_INTERVAL_S):
            waited_s = time.monotonic() - start_s
            if timeout_s is not None and waited_s >= timeout_s:
                raise WorkerFailed(
                    f"Rank {self._rank} waited {waited_s:.0f} s for {what}; see the launcher's log."
                )
            if not quiet:
                say(f"rank {self._rank} waits for {what} ({waited_s:.0f} s)")

    def _read(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except ValueError as error:  # an agent of another version
                say(f"rank {self._rank} does not understand its agent: {error}")
                message = None
            if message is None:
                break
            with self._changed:
                if isinstance(message, Released):
                    if message.buffer < len(self._maps) and message.buffer not in self._free:
                        self._free.append(message.buffer)
                elif isinstance(message, Committed):
                    self.committed_step = max(self.committed_step, message.step)
                elif isinstance(message, PauseRequest):
                    self.pause_reason = message.reason or "asked by the agent"
                elif isinstance(message, SaveRequest):
                    self.asked |= {message.number}
                elif isinstance(message, RestoreReply):
                    if message.generation == self._generation:
                        self._reply = message
                elif isinstance(message, Allocated):
                    self._reply = message
                elif isinstance(message, Order):
                    self.order = message
                self._changed.notify_all()
            if isinstance(message, Order) and message.at_once:
                self._on_order(message)
        if not self._closing:
            say(f"rank {self._rank} lost its agent and ends")
            end(EXIT_WORKER_FAILED)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)
