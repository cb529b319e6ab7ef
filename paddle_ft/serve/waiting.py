"""Takes back what waits at a replica that stands still.

nginx would wait for its time-out, which cannot be short: on a busy machine a short one repeats
everything. Here it is known which replica it is, so its connections alone are broken, and nginx
asks another one at once.

Invariant: only connections with ``SO_KEEPALIVE`` are broken. The configuration sets it for requests
that any replica may answer twice; a change of the state stays where it is, since the replica would
still make it when it goes on. Where the kernel (before 5.6) or a sandbox does not let one process
reach the sockets of its children, nothing is done, and the time-out holds.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress

_PIDFD_GETFD = 438
"""The number of that system call, the same on all processors; the C library may not have it."""
Address = tuple[str, int]


def take_back(pids: Collection[int], addresses: Collection[Address]) -> int:
    """Breaks what the processes ``pids`` have open to these addresses; gives how many it broke.

    Args:
        addresses: host and port; a host that is not an IP address is never found.
    """
    broken, wanted = 0, {(_plain(host), port) for host, port in addresses}
    for pid in pids:
        with suppress(OSError):  # it has ended, or is out of reach
            for connection in _sockets(pid):
                with connection, suppress(OSError):
                    broken += _break(connection, wanted)
    return broken


def _break(connection: socket.socket, wanted: Collection[Address]) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    host, port = connection.getpeername()[:2]
    marked = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if not marked or (_plain(host), port) not in wanted:
        return False
    connection.shutdown(socket.SHUT_RDWR)
    return True


def _sockets(pid: int) -> Iterator[socket.socket]:
    """Duplicates of the sockets that a process has open."""
    folder = f"/proc/{pid}/fd"
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(folder):
            try:
                if not os.readlink(f"{folder}/{name}").startswith("socket:"):
                    continue
                number = _duplicate(process, int(name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EBADF):  # closed meanwhile
                    raise
            else:
                yield socket.socket(fileno=number)
    finally:
        os.close(process)


def _duplicate(process: int, number: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.syscall(_PIDFD_GETFD, process, number, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return found


def _plain(host: str) -> str:
    with suppress(ValueError):
        found = ipaddress.ip_address(host.partition("%")[0])
        return str(getattr(found, "ipv4_mapped", None) or found)
    return host
