"""Paddle's gloo groups, so that a living process can leave one that is broken and join the next.

The public API cannot do that: ``destroy_process_group`` only clears dictionaries, an all-reduce has
no deadline, and the set-up with a member missing hangs for ever. What it takes here:

- every group has a store of its own, which rank 0 serves, and a number of its own;
- whoever waits in a group, or in its set-up, is freed from another thread by shutting the sockets
  the group has opened for reading (``SHUT_RD``): the loop of gloo sees them end and raises. Closing
  them both ways at once made gloo abort the process on other members in one of five trials, so that
  is kept for the case that nothing else helps. Duplicates of the sockets are held until the next
  group stands, so that peers which have not been told yet see nothing.

Invariant: a group is aborted on all of its members, each by its own agent's order. Paddle never
frees a group (two threads and three to five descriptors each), so processes that have been through
many are to be replaced.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Set
from typing import Any

SOFT_ROUNDS = 10
ROUND_S = 0.05
_GROUP_ID = 100
"""Added to the number of a group; the ids of a process must differ, for Paddle keeps them all."""
_STORE_TIMEOUT_S = 900


class GlooGroups:
    """The default process group of this process, one after another.

    ``build`` belongs to the main thread, ``abort_before`` to any.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the group that stands or is being set up; 0 before the first."""
        self._base: set[int] = set()
        """Sockets that were open before the group's set-up began."""
        self._inodes: set[int] | None = set()
        """Sockets of the group; None while it is set up."""
        self._held: list[socket.socket] = []
        self._lock = threading.Lock()
        self.wanted = 0
        """Number of the newest group that was asked for."""
        self._aborting = False
        self._entered = threading.Event()
        self._kept: list[Any] = []
        """The store: its server ends with the object."""

    def build(self, number: int, rank: int, world_size: int, endpoint: str) -> None:
        """Sets group ``number`` up and makes it Paddle's default group; returns once all are there.

        ``endpoint`` is host:port of the group's store, which rank 0 serves. Raises whatever Paddle
        does if a member is lost meanwhile, or if a later group is wanted (``abort_before``).
        """
        from paddle.base import core

        host, _, port = endpoint.rpartition(":")
        with self._lock:
            self._base, self._inodes = set(_sockets()), None
            self.number = number
            self._entered.set()
            if self.wanted > number:
                raise RuntimeError(f"group {number} is over before it began")
        store = core.TCPStore(host, int(port), rank == 0, 0, _STORE_TIMEOUT_S)
        set_delay(int(port), False, self._base)
        group = core.ProcessGroupGloo.create(store, rank, world_size, _GROUP_ID + number)
        with self._lock:
            self._inodes = set(_sockets()) - self._base
        _install(group, store, rank, world_size, _GROUP_ID + number)
        self._kept = [store]

    def leave(self, number: int) -> None:
        """This process is alone in group ``number``: to Paddle, as if there had never been one."""
        with self._lock:
            self.number, self._inodes = number, set()
            self._entered.set()
        _uninstall()

    def settle(self) -> None:
        """All members are in the present group: what was held of earlier ones can go."""
        with self._lock:
            held, self._held = self._held, []
        for one in held:
            one.close()

    def abort_before(self, number: int) -> None:
        """Frees the main thread from every group before ``number``, now and until it has left."""
        with self._lock:
            self.wanted = max(self.wanted, number)
            self._entered.clear()
            if self._aborting:
                return
            self._aborting = True
        threading.Thread(target=self._abort, name="abort", daemon=True).start()

    def _abort(self) -> None:
        rounds = 0
        while True:
            with self._lock:
                if self.number >= self.wanted:
                    self._aborting = False
                    return
                self._shut(soft=rounds < SOFT_ROUNDS)
            self._entered.wait(ROUND_S)
            self._entered.clear()
            rounds += 1

    def _shut(self, soft: bool) -> None:
        now = _sockets()
        mine = (set(now) - self._base) if self._inodes is None else (set(now) & self._inodes)
        for inode in mine:
            try:
                one = socket.socket(fileno=os.dup(now[inode]))
            except OSError:
                continue
            try:
                if one.family == socket.AF_UNIX:
                    raise OSError("the agent's")
                one.getpeername()  # not the socket the store listens on: its server would abort
                one.shutdown(socket.SHUT_RD if soft else socket.SHUT_RDWR)
            except OSError:
                one.close()
                continue
            self._held.append(one)


def set_delay(port: int, delay: bool, others: Set[int] = frozenset()) -> None:
    """Of the client of the store at ``port``: sockets but those whose inodes are in ``others``.

    It sends a request in pieces, which Nagle's algorithm holds back unless ``delay`` is false.
    """
    for inode, descriptor in _sockets().items():
        if inode in others:
            continue
        try:
            with socket.socket(fileno=os.dup(descriptor)) as one:
                if one.family == socket.AF_INET and one.getpeername()[1] == port:
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, not delay)
        except OSError:  # closed meanwhile, or not connected
            continue


def has_other_groups() -> bool:
    """Whether the script has made process groups of its own, which nobody builds again."""
    from paddle.distributed.communication.group import _GroupManager

    return len(_GroupManager.group_map_by_id) > 1


def _install(group: Any, store: Any, rank: int, world_size: int, number: int) -> None:
    """Makes ``group`` what ``paddle.distributed`` uses if it is not told otherwise.

    These are the places in which ``init_parallel_env`` of Paddle 2.6 and 3.3 leaves its group.
    """
    import paddle.distributed.parallel as parallel
    from paddle.distributed import collective, parallel_helper
    from paddle.distributed.communication.group import Group, _GroupManager

    _uninstall()
    default = Group(rank, number, list(range(world_size)), pg=group, name="_default_pg")
    collective._group_map_by_name["_default_pg"] = default
    collective._group_map[number] = default
    collective._group_map_backend[default] = "gloo"
    collective._set_default_backend("gloo")
    collective._set_default_store(store)
    _GroupManager.group_map_by_id[number] = default
    _GroupManager.global_group_id = number
    parallel._global_parallel_env = parallel.ParallelEnv()
    parallel_helper.__dict__["__parallel_ctx__clz__"] = True


def _uninstall() -> None:
    """Paddle has no default group any more; rank and world are those of the environment."""
    import paddle.distributed.parallel as parallel
    from paddle.distributed import collective, parallel_helper
    from paddle.distributed.communication.group import _GroupManager

    before = collective._group_map_by_name.pop("_default_pg", None)
    if before is None:
        return
    collective._group_map.pop(before.id, None)
    collective._group_map_backend.pop(before, None)
    _GroupManager.group_map_by_id.pop(before.id, None)
    parallel._global_parallel_env = parallel.ParallelEnv()
    parallel_helper.__dict__["__parallel_ctx__clz__"] = None


def _sockets() -> dict[int, int]:
    """Descriptor by inode of every socket of this process."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found[int(target[8:-1])] = int(name)
    return found
