"""Connections between agents, so that the death of one is known long before its lease ends.

Every node listens, and holds a connection to the next two in the ring of all nodes. One that
breaks is a suspicion; if nobody listens any more where somebody did (the kernel refuses, or another
process answers), the agent there is dead for certain, and its lease is given back in its name:
everything else follows from its keys being gone, as when the lease had run out. A host that is
silent, and one that could never be reached (a firewall refuses, too), are left to their leases.

Being wrong costs that node its membership, and a rebuilt group: it joins again as a newcomer. It
cannot cost more, since every write of a leader is fenced.

Who asks for it on a connection gets back what it sends, within bounds: so links are measured where
reductions have become slow (``health.links``).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from paddle_ft.agent.net import endpoint
from paddle_ft.coordination.kv import Coordinator
from paddle_ft.errors import CoordinationError
from paddle_ft.health.links import echo
from paddle_ft.types import NodeRecord, Versioned

log = logging.getLogger("paddle_ft")

WATCHED = 2
ACCEPTED_MAX = 64
CONNECT_TIMEOUT_S = 1.0
RETRY_S = 0.5
AGAIN_S = 0.01
"""Before a look whether somebody listens where a connection has just ended."""
_NAME_BYTES_MAX = 512
_KEEP_ALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 6),
)


def watched(me: str, members: Iterable[str], count: int = WATCHED) -> tuple[str, ...]:
    """The ``count`` members after ``me`` in the ring of their sorted names."""
    others = sorted(member for member in members if member != me)
    after = [member for member in others if member > me]
    return tuple((after + others)[: min(count, len(others))])


@dataclass(slots=True)
class _Link:
    address: tuple[str, int]
    lease: int
    connection: socket.socket | None = None
    proven: bool = False
    """The member itself has answered there."""
    dropped: bool = False


class PeerLinks:
    """This node's end of all of them. ``follow`` is for the loop; nothing here blocks it.

    ``on_dead``: called on a thread of its own, with the name of a member that is dead.
    """

    def __init__(
        self,
        host: str,
        coordinator: Coordinator,
        on_dead: Callable[[str], None] | None = None,
        *,
        listen: str = "",
        port: int = 0,
    ) -> None:
        """``listen``: the address of this machine, where ``host`` is another's or a name; raises
        OSError if it cannot be had, or the ``port`` (0: any)."""
        self._coordinator = coordinator
        self._on_dead = on_dead
        place = listen or host
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        self._server = socket.create_server((place, port), family=family, backlog=128)
        self.address = endpoint(host, self._server.getsockname()[1])
        """host:port at which the others find this node."""
        self._me = ""
        self._seen: Mapping[str, Versioned[NodeRecord]] | None = None
        self._links: dict[str, _Link] = {}
        self._accepted: set[socket.socket] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._serve, name="peers", daemon=True).start()

    def follow(self, me: str, records: Mapping[str, Versioned[NodeRecord]]) -> None:
        """Holds connections to those of ``records`` that this node is to watch."""
        if records is self._seen:
            return
        self._me, self._seen = me, records
        self.watch(me, {m: (r.value.link, r.value.lease) for m, r in records.items()})

    def watch(self, me: str, members: Mapping[str, tuple[str, int]]) -> None:
        """The same for (host:port or "", lease) of each of ``members``, ``me`` among them."""
        self._me = me
        wanted = {m: members[m] for m in watched(me, members) if members[m][0]}
        for member in [m for m in self._links if m not in wanted]:
            self._drop(self._links.pop(member))
        for member, (address, lease) in wanted.items():
            if member in self._links:
                self._links[member].lease = lease
            else:
                host, _, port = address.rpartition(":")
                if not port.isdecimal():
                    continue  # of another version: its lease tells
                link = self._links[member] = _Link((host.strip("[]"), int(port)), lease)
                threading.Thread(
                    target=self._hold, args=(member, link), name=f"peer-{member}", daemon=True
                ).start()

    def close(self) -> None:
        self._closed.set()
        for link in self._links.values():
            self._drop(link)
        _shut(self._server)
        for connection in tuple(self._accepted):
            _shut(connection)

    # ------------------------------------------------------------ being watched

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                if self._closed.wait(RETRY_S):
                    return
                continue
            if len(self._accepted) >= ACCEPTED_MAX:
                connection.close()
                continue
            self._accepted.add(connection)
            threading.Thread(
                target=self._attend, args=(connection,), name="peer-there", daemon=True
            ).start()

    def _attend(self, connection: socket.socket) -> None:
        """Until the other end closes it: that this one does not is all that a watcher is told."""
        with contextlib.suppress(OSError), connection:
            for option, value in _KEEP_ALIVE:  # or who has gone without a word stays for ever
                connection.setsockopt(*option, value)
            connection.sendall(self._me.encode() + b"\n")
            echo(connection)
        self._accepted.discard(connection)

    # ------------------------------------------------------------ watching

    def _hold(self, member: str, link: _Link) -> None:
        """Until the other end is dead, or need not be watched any more."""
        while not (link.dropped or self._closed.is_set()):
            if self._is_dead(member, link):
                if self._on_dead is not None:
                    self._on_dead(member)
                self._give_lease_back(member, link)
                return
            quick = link.proven and link.connection is not None
            self._closed.wait(AGAIN_S if quick else RETRY_S)

    def _is_dead(self, member: str, link: _Link) -> bool:
        """Connects, and waits for the connection to end; True if nobody is there to connect to."""
        try:
            connection = socket.create_connection(link.address, timeout=CONNECT_TIMEOUT_S)
        except ConnectionRefusedError:
            link.connection = None
            return link.proven
        except OSError:
            link.connection = None
            return False  # the host or the network: its lease tells
        link.connection = connection
        if link.dropped or self._closed.is_set():
            _shut(connection)
            return False
        with connection:
            try:
                name = connection.makefile("rb").readline(_NAME_BYTES_MAX)
                if name != member.encode() + b"\n":
                    return link.proven and name.endswith(b"\n")  # somebody else has the port
                link.proven = True
                connection.settimeout(None)
                while connection.recv(64):
                    pass
            except OSError:
                pass
        return False

    def _give_lease_back(self, member: str, link: _Link) -> None:
        log.debug("node %s is dead: nobody listens there any more", member.partition(".")[0])
        while not (link.dropped or self._closed.is_set()):
            try:
                self._coordinator.revoke(link.lease)
                return
            except CoordinationError:
                self._closed.wait(RETRY_S)

    def _drop(self, link: _Link) -> None:
        link.dropped = True
        if link.connection is not None:
            _shut(link.connection)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
