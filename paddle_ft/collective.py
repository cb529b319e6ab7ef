"""The process group of one generation: join, sum, broadcast, and errors that name what happened.

The engine is Paddle's own group (gloo on the CPU), so that ``paddle.distributed`` works in the same
script. Under the launcher it is built by ``gloo``, and can be left for the next one; otherwise, and
on accelerators, by ``init_parallel_env``. Whatever is told apart here is told apart by the type of
the error alone: a peer that is lost ends the operation with CollectiveFailed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_ft.checkpoint.snapshot import nbytes_of
from paddle_ft.errors import CollectiveFailed, ConfigError
from paddle_ft.gloo import GlooGroups, set_delay
from paddle_ft.health.board import Board

JOIN_TIMEOUT_S = 300.0
_POLL_INTERVAL_S = 0.01
_PACK_BYTES = 16 * 2**20


class Collective:
    """The group of all ranks of this generation; with a world size of 1, nothing at all."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.groups: GlooGroups | None = None
        """Set where the group can be left for another one."""
        self.board = Board()
        """Where it is told which collective this rank is in."""

    @classmethod
    def from_environment(cls) -> Collective:
        """Rank and world size as the launcher has set them; alone without a launcher."""
        try:
            rank = int(os.environ.get("PADDLE_TRAINER_ID", "0"))
            world_size = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
        except ValueError:
            rank, world_size = -1, 0
        if not 0 <= rank < world_size:
            raise ConfigError(
                "PADDLE_TRAINER_ID and PADDLE_TRAINERS_NUM do not name a rank of a world; start "
                "the script with paddle_ft.launch, or unset both to run it alone."
            )
        return cls(rank, world_size)

    def join_next(self, number: int, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Leaves the group there was, for that of generation ``number``; returns once all are in.

        Rank and world size are those of the new one already. Raises CollectiveFailed if a member
        is lost meanwhile, or if this worker is ordered into yet another group.
        """
        assert self.groups is not None
        if self.world_size == 1:
            self.groups.leave(number)
            self.groups.settle()
            return
        host, port = _rendezvous()
        if self.rank != 0:
            _await_listening((host, port), timeout_s, lambda: self.groups_wanted > number)
        try:
            self.groups.build(number, self.rank, self.world_size, f"{host}:{port}")
            self.sum([1])
        except Exception as error:  # Paddle's own have the most various types
            raise peer_loss(error, self.rank, "forming the group") from error
        self.groups.settle()

    @property
    def groups_wanted(self) -> int:
        """Number of the newest group this worker was ordered into."""
        return self.groups.wanted if self.groups is not None else 0

    def join(self, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Sets the group up unless the script has done so; returns once all ranks are there.

        Raises CollectiveFailed if rank 0 does not listen within ``timeout_s``, or the set-up fails.
        """
        import paddle.distributed as dist

        if self.world_size == 1 or dist.is_initialized():
            return
        if self.rank != 0:
            # A rank that connects before the server listens would sleep for 3 s in Paddle.
            _await_listening(_rendezvous(), timeout_s)
        try:
            dist.init_parallel_env()
        except RuntimeError as error:
            raise peer_loss(error, self.rank, "joining the process group") from error

    def all_reduce(self, tensor: Any) -> None:
        """Sums ``tensor`` over all ranks, in place. Raises CollectiveFailed."""
        if self.world_size == 1:
            return
        import paddle.distributed as dist

        self.board.call()
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise peer_loss(error, self.rank, "an all-reduce") from error
        self.board.called()

    def all_gather(self, tensor: Any) -> list[Any]:
        """``tensor`` of each rank, in rank order; all of one shape. Raises CollectiveFailed."""
        if self.world_size == 1:
            return [tensor]
        import paddle.distributed as dist

        gathered: list[Any] = []
        self.board.call()
        try:
            dist.all_gather(gathered, tensor)
        except RuntimeError as error:
            raise peer_loss(error, self.rank, "an all-gather") from error
        self.board.called()
        return gathered

    def sum(self, numbers: list[int]) -> list[int]:
        """``numbers`` summed over all ranks, each for itself. Raises CollectiveFailed."""
        if self.world_size == 1:
            return numbers
        result: list[int] = self.sum_words(np.array(numbers, dtype=np.int64)).tolist()
        return result

    def sum_words(self, words: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """As ``sum``, of an array."""
        if self.world_size == 1 or not words.size:
            return words
        import paddle

        tensor = paddle.to_tensor(words)
        self.all_reduce(tensor)
        result: npt.NDArray[np.int64] = tensor.numpy()
        return result

    def check_same(self, number: int, what: str) -> None:
        """Raises CollectiveFailed unless ``number`` is the same on all ranks."""
        world_size = self.world_size
        if self.sum([number, number**2]) != [world_size * number, world_size * number**2]:
            raise CollectiveFailed(
                f"The ranks do not have the same {what} ({number} on rank {self.rank}); the "
                f"workers start again from one checkpoint."
            )

    def broadcast(self, tensor: Any, root: int = 0) -> None:
        """Overwrites ``tensor`` with that of ``root``. Raises CollectiveFailed."""
        if self.world_size == 1:
            return
        import paddle.distributed as dist

        self.board.call()
        try:
            dist.broadcast(tensor, root)
        except RuntimeError as error:
            raise peer_loss(error, self.rank, "a broadcast") from error
        self.board.called()

    def broadcast_bytes(self, data: npt.NDArray[np.uint8], root: int) -> None:
        """Overwrites ``data`` with that of ``root``, as long as it. Raises CollectiveFailed."""
        if self.world_size == 1 or not data.size:
            return
        import paddle

        tensor = paddle.to_tensor(data)
        self.broadcast(tensor, root)
        if self.rank != root:
            ctypes.memmove(data.ctypes.data, tensor.data_ptr(), data.size)

    def broadcast_memory(self, address: int, nbytes: int, root: int) -> None:
        """Overwrites the memory there with that of ``root``. Raises CollectiveFailed."""
        import paddle
        from paddle.base import core

        if self.world_size == 1 or not nbytes:
            return
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        form = {"place": paddle.CPUPlace(), "persistable": False, "name": "", "stop_gradient": True}
        self.broadcast(core.eager.Tensor(value=memory, zero_copy=True, **form), root)

    def broadcast_all(self, tensors: Iterable[Any], root: int = 0) -> None:
        """``broadcast`` of many tensors, small ones packed together. Raises CollectiveFailed."""
        pack: list[Any] = []
        for tensor in tensors:
            if not tensor.place.is_cpu_place() or not tensor.is_contiguous():
                self.broadcast(tensor, root)
                continue
            pack.append(tensor)
            if sum(map(nbytes_of, pack)) >= _PACK_BYTES:
                self._broadcast_pack(pack, root)
                pack = []
        self._broadcast_pack(pack, root)

    def _broadcast_pack(self, tensors: list[Any], root: int) -> None:
        import paddle

        total = sum(map(nbytes_of, tensors))
        if self.world_size == 1 or not total:
            return
        flat = paddle.zeros([total], dtype="uint8")
        address = flat.data_ptr()
        if self.rank == root:
            for tensor, at in _offsets(tensors):
                ctypes.memmove(address + at, tensor.data_ptr(), nbytes_of(tensor))
        self.broadcast(flat, root)
        if self.rank != root:
            for tensor, at in _offsets(tensors):
                ctypes.memmove(tensor.data_ptr(), address + at, nbytes_of(tensor))


def connect_store(connect: Callable[[], Any]) -> Any:
    """What ``connect`` gives, Paddle's own way to the store of its groups, with fewer waits.

    A rank that connects before the server listens would sleep for 3 s, and a request to the store
    takes 40 ms unless its socket sends at once. That is so for the set-up of the first group only:
    those that ``fleet`` makes after it, of some ranks each, fail to connect if they are quick.
    Raises CollectiveFailed if rank 0 does not listen in time.
    """
    from paddle.base import core

    address = _rendezvous()
    if os.environ.get("PADDLE_TRAINER_ID", "0") != "0":
        _await_listening(address, JOIN_TIMEOUT_S)
    store = connect()
    gloo = getattr(core, "ProcessGroupGloo", None)
    if gloo is None:
        return store
    set_delay(address[1], False)
    create = gloo.create

    def create_first(*args: Any) -> Any:
        gloo.create = create
        try:
            return create(*args)
        finally:
            set_delay(address[1], True)

    gloo.create = create_first
    return store


def is_peer_loss(error: BaseException) -> bool:
    """Whether ``error`` came from a collective, ours or one that the script called itself."""
    return isinstance(error, CollectiveFailed) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def peer_loss(
    error: BaseException, rank: int, what: str = "a collective of the script"
) -> CollectiveFailed:
    """``error``, which came from ``what``, as the error that the agent understands."""
    if isinstance(error, CollectiveFailed):
        return error
    lines = str(error).strip().splitlines() or ["no details"]
    return CollectiveFailed(
        f"Rank {rank} lost a peer in {what} ({lines[-1].strip()[:200]}); the launcher sees to it "
        f"that training goes on."
    )


def _offsets(tensors: list[Any]) -> Iterable[tuple[Any, int]]:
    at = 0
    for tensor in tensors:
        yield tensor, at
        at += nbytes_of(tensor)


def _rendezvous() -> tuple[str, int]:
    """Host and port of rank 0's store, chosen as Paddle chooses it."""
    env = os.environ
    endpoint = env.get("PADDLE_MASTER") or env.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
    if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        endpoint = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"PADDLE_MASTER is {endpoint!r}, not host:port; start the script with paddle_ft.launch."
        )
    return host, int(port)


def _await_listening(
    address: tuple[str, int], timeout_s: float, stop: Callable[[], bool] = lambda: False
) -> None:
    """Returns once somebody listens there; raises CollectiveFailed at the time-out or ``stop``."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        if stop():
            raise CollectiveFailed("Another group is to be joined.")
        try:
            socket.create_connection(address, timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline_s:
                raise CollectiveFailed(
                    f"Rank 0 did not listen at {address[0]}:{address[1]} within {timeout_s:.0f} s "
                    f"({error}); look at its log."
                ) from None
        time.sleep(_POLL_INTERVAL_S)
