"""Nodes that stand by measure all-reduces with each other, in changing pairs, and read the outcome.

    probe/<node>   address, figures, pairs; leased    each puts its own, and reads those of all

What is measured is the sum of two buffers over one TCP connection, on the path that gloo takes too.
Every wait has an end; a pair that does not come about is a result as well.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import Compare, Coordinator, Put, Transaction
from paddle_ft.coordination.lease import LeaseKeeper
from paddle_ft.errors import ConfigError, MembersMissing
from paddle_ft.health.figures import Entry, Figures, PairTime, schedule
from paddle_ft.types import decode, encode

BYTES = 8 * 2**20
REPEATS = 8
PAIR_S_MAX = 10.0
"""For one sum of a pair. The wait for the other is longer from round to round (``_wait_s``): it may
have waited for somebody who does not come itself."""
POLL_S = 0.1
HELLO_BYTES_MAX = 4096


def measure_pairs(
    coordinator: Coordinator,
    keys: schema.Keys,
    config: EtcdConfig,
    *,
    node: str,
    host: str,
    count: int,
    figures: Figures,
    timeout_s: float,
) -> list[Entry]:
    """Waits for ``count`` nodes, measures, and gives what all of them have found.

    Raises MembersMissing if fewer come within ``timeout_s``, ConfigError if the name is taken.
    """
    keeper = LeaseKeeper(
        coordinator,
        ttl_s=config.lease_ttl_s,
        renew_interval_s=config.renew_interval_s,
        safety_margin_s=config.rpc_timeout_s,
        on_lost=lambda: None,
    )
    with socket.create_server((host, 0), backlog=8) as listener, contextlib.closing(keeper):
        keeper.start()
        own = Entry(node, host, listener.getsockname()[1], figures)
        table = _Table(coordinator, keys.probe, own, keeper.lease)
        table.register(timeout_s)
        there = table.await_all(timeout_s, lambda: len(table.known) >= count)
        if not there:
            raise MembersMissing(
                f"{len(table.known)} of {count} nodes came to the probe of job {keys.job} within "
                f"{timeout_s:g} s: run paddle-ft probe on the others too, or give fewer --nodes"
            )
        names = sorted(table.known)[:count]
        if node not in names:
            raise MembersMissing(f"{count} other nodes are being measured: try again later")
        rounds = schedule(names)
        table.put(replace(own, phase=1, pairs=_Pairs(listener, table.known, node).run(rounds)))
        wait_s = 2 * _wait_s(len(rounds))
        table.await_all(wait_s, lambda: table.all_in(names, 1))
        table.put(replace(table.known[node], phase=2))
        table.await_all(wait_s, lambda: table.all_in(names, 2))
        return [table.known[name] for name in names]


class _Table:
    """What the nodes have told; who has gone since stays in it."""

    def __init__(self, coordinator: Coordinator, prefix: str, own: Entry, lease: int) -> None:
        self.known: dict[str, Entry] = {}
        self._coordinator = coordinator
        self._prefix = prefix
        self._own = own
        self._lease = lease
        self._there: set[str] = set()

    def register(self, timeout_s: float) -> None:
        key = self._prefix + self._own.node
        put = Put(key, encode(self._own), self._lease)
        txn = Transaction((Compare(key, "create_revision", 0),), (put,))
        if not _until(lambda: self._coordinator.transact(txn).succeeded, timeout_s):
            raise ConfigError(
                f"a node {self._own.node} takes part in this probe already: give another --node"
            )

    def put(self, own: Entry) -> None:
        put = Put(self._prefix + own.node, encode(own), self._lease)
        self._coordinator.transact(Transaction((), (put,)))
        self.known[own.node] = own

    def await_all(self, timeout_s: float, done: Callable[[], bool]) -> bool:
        """Reads again and again until ``done``; False if that takes too long."""

        def look() -> bool:
            kvs = self._coordinator.read(self._prefix).kvs
            found = [decode(Entry, kv.value) for kv in kvs]
            self._there = {entry.node for entry in found}
            self.known |= {entry.node: entry for entry in found}
            return done()

        return _until(look, timeout_s)

    def all_in(self, names: list[str], phase: int) -> bool:
        """Whether all have come so far, or have gone."""
        return all(self.known[n].phase >= phase or n not in self._there for n in names)


def _wait_s(number: int) -> float:
    """More than all waits of the rounds before ``number``, counted from 0, and one pair."""
    return PAIR_S_MAX * (2.0 ** (number + 1) - 1)


def _until(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_S)
    return True


class _Pairs:
    """This node's part in all rounds."""

    def __init__(self, listener: socket.socket, known: dict[str, Entry], node: str) -> None:
        self._listener = listener
        self._known = known
        self._node = node
        self._early: dict[str, socket.socket] = {}
        """Who has called before its round, by name."""
        self._buffer = np.ones(BYTES // 4, np.float32)

    def run(self, rounds: tuple[tuple[tuple[str, str], ...], ...]) -> tuple[PairTime, ...]:
        found = []
        for number, pairs in enumerate(rounds):
            for a, b in pairs:
                if self._node in (a, b):
                    peer = b if self._node == a else a
                    found.append(PairTime(peer, self._measure(peer, _wait_s(number))))
        for connection in self._early.values():
            connection.close()
        return tuple(found)

    def _measure(self, peer: str, wait_s: float) -> float:
        try:
            mine = self._node < peer
            connection = self._call(peer) if mine else self._answer(peer, wait_s)
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # Both are there, and begin together.
                self._sum(connection, self._buffer[:1], wait_s)
                began_s = time.perf_counter()
                for _ in range(REPEATS):
                    self._sum(connection, self._buffer, PAIR_S_MAX)
                return (time.perf_counter() - began_s) / REPEATS
        except OSError:
            return -1.0

    def _call(self, peer: str) -> socket.socket:
        other = self._known[peer]
        connection = socket.create_connection((other.host, other.port), PAIR_S_MAX)
        connection.sendall(json.dumps(self._node).encode() + b"\n")
        return connection

    def _answer(self, peer: str, wait_s: float) -> socket.socket:
        deadline_s = time.monotonic() + wait_s
        while peer not in self._early:
            self._listener.settimeout(max(0.001, deadline_s - time.monotonic()))
            connection, _ = self._listener.accept()
            connection.settimeout(PAIR_S_MAX)
            with contextlib.suppress(ValueError):
                self._early[str(json.loads(_line(connection)))] = connection
        return self._early.pop(peer)

    def _sum(self, connection: socket.socket, values: NDArray[np.float32], limit_s: float) -> None:
        """Sends what it has while it receives what the other has, and adds."""
        failed: list[OSError] = []
        connection.settimeout(limit_s)

        def send() -> None:
            try:
                connection.sendall(values.data.cast("B"))
            except OSError as error:
                failed.append(error)

        sender = threading.Thread(target=send, name="probe-send", daemon=True)
        sender.start()
        theirs = np.empty_like(values)
        rest = theirs.data.cast("B")
        deadline_s = time.monotonic() + limit_s
        while len(rest):
            if time.monotonic() > deadline_s:
                raise TimeoutError("the other is too slow")
            if not (got := connection.recv_into(rest)):
                raise ConnectionError("the other has gone")
            rest = rest[got:]
        theirs += values
        sender.join(limit_s)
        if failed or sender.is_alive():
            raise ConnectionError("the other does not take it")


def _line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(found) > HELLO_BYTES_MAX:
            raise ConnectionError("no greeting")
        found += byte
    return found
