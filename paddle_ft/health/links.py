"""Which link is slow, where reductions are: measured beside the training, between agents.

As soon as a node tells of slow reductions, each measures the link to the next one in the order of
ranks, which is where a ring sums, over the port at which agents watch each other; it tells the
others, and all come to the same conclusion (``figures.bad_links``). One measurement sends at most
``REPEATS`` times ``BYTES`` and takes at most ``LIMIT_S``, every ``AGAIN_S`` as long as it is slow.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from paddle_ft.coordination.schema import JobState
from paddle_ft.health.figures import Finding, PairTime, bad_links

ASK = b"echo\n"
BYTES = 256 * 2**10
REPEATS = 8
LIMIT_S = 3.0
AGAIN_S = 30.0
_NAME_BYTES_MAX = 512
_CHUNK_BYTES = 64 * 2**10


def echo(connection: socket.socket) -> None:
    """Waits for the other end, and sends back what it gets if that asks for it. Raises OSError."""
    if connection.recv(len(ASK), socket.MSG_WAITALL) != ASK:
        return
    connection.settimeout(LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    left, until_s = BYTES * REPEATS, time.monotonic() + 2 * LIMIT_S
    while left > 0 and time.monotonic() < until_s:
        data = connection.recv(min(left, _CHUNK_BYTES))
        if not data:
            return
        connection.sendall(data)
        left -= len(data)


def measure(address: str, member: str) -> float | None:
    """Seconds that ``BYTES`` take to ``member`` and back, the best of some times; -1.0: it failed.

    Of what is not back within ``LIMIT_S`` it is worked out from the part that is. None if it does
    not answer there at all, which says nothing of the link: a firewall, another node by now.
    """
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), LIMIT_S)
    except (OSError, ValueError):
        return None
    with connection:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if _line(connection) != member.encode() + b"\n":
                return None
        except OSError:
            return None
        return _best_s(connection)


def _best_s(connection: socket.socket) -> float:
    best_s, until_s = float("inf"), time.monotonic() + LIMIT_S
    try:
        connection.sendall(ASK)
        for _ in range(REPEATS):
            took_s, got = _there_and_back(connection, until_s)
            best_s = min(best_s, took_s * BYTES / got)
            if got < BYTES:
                break
    except OSError:
        return -1.0
    return best_s


def _there_and_back(connection: socket.socket, until_s: float) -> tuple[float, int]:
    """Seconds, and how many bytes were back by then. Raises OSError if it was none."""

    def send() -> None:
        with contextlib.suppress(OSError):
            connection.sendall(bytes(BYTES))

    began_s, got = time.monotonic(), 0
    threading.Thread(target=send, name="link-send", daemon=True).start()
    while got < BYTES and (left_s := until_s - time.monotonic()) > 0:
        connection.settimeout(max(left_s, 0.001))
        try:
            data = connection.recv(min(_CHUNK_BYTES, BYTES - got))
        except TimeoutError:
            break
        if not data:
            raise ConnectionError("the other has gone")
        got += len(data)
    if not got:
        raise TimeoutError("nothing came back")
    return time.monotonic() - began_s, got


def _line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n") and len(found) < _NAME_BYTES_MAX:
        byte = connection.recv(1)
        if not byte:
            break
        found += byte
    return found


class LinkWatch:
    """This node's part. ``look`` is for the agent's loop; ``wake`` makes that take a turn."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.times: tuple[PairTime, ...] = ()
        """What this node has measured, for the others."""
        self.findings: tuple[Finding, ...] = ()
        self._wake = wake
        self._generation = 0
        self._began_s = float("-inf")

    def look(self, state: JobState, me: str, generation: int, slow_here: bool) -> None:
        """Measures if anybody finds reductions slow; concludes once all have measured."""
        if generation != self._generation:
            self._generation, self._began_s, self.times = generation, float("-inf"), ()
        self.findings = ()
        if state.generation is None or state.generation.value.number != generation:
            return
        members = state.generation.value.member_ids()
        told = {m: v.value for m, v in state.health.items() if v.value.generation == generation}
        slow = slow_here or any(
            v.kind == "slow_link" for m, r in told.items() if m in members for v in r.verdicts
        )
        due = time.monotonic() - self._began_s > AGAIN_S
        if not slow or me not in members or len(members) < 2:
            if due:  # sooner, it may be slow again for the same cause
                self.times = ()
            return
        if due:
            self._began_s = time.monotonic()
            self._start(state, members[(members.index(me) + 1) % len(members)])
        every = {m: r.links for m, r in told.items() if m in members} | {me: self.times}
        if len(every) == len(members) and all(every.values()):
            self.findings = tuple(bad_links({_node(m): links for m, links in every.items()}))

    def _start(self, state: JobState, member: str) -> None:
        record, generation = state.nodes.get(member), self._generation
        if record is None or not record.value.link:
            return

        def work() -> None:
            taken_s = measure(record.value.link, member)
            if generation == self._generation and taken_s is not None:
                self.times = (PairTime(_node(member), round(taken_s, 6)),)
                self._wake()

        threading.Thread(target=work, name="link", daemon=True).start()


def _node(member: str) -> str:
    return member.rpartition(".")[0]
