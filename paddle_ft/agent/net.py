"""Addresses and ports of this node, and the name it goes by."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import random
import re
import secrets
import socket
import struct
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from paddle_ft.errors import ConfigError

PORTS = range(20000, 32000)
"""Below Linux's ephemeral range, so that no outgoing connection takes one that was handed out."""
ELSEWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737)."""
YOUNG_S = 10.0
"""What was opened since is not a leftover."""
_SIOCGIFADDR = 0x8915


def free_ports(host: str, count: int) -> tuple[int, ...]:
    """``count`` different ports that could be bound on ``host`` a moment ago."""
    if ":" in host:
        raise ConfigError(
            f"--host {host} is an IPv6 address, which Paddle's process groups cannot use: give an "
            f"IPv4 address or a name of this machine (etcd may be reached over IPv6)"
        )
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
    except OSError as error:
        raise ConfigError(
            f"--host {host} cannot be resolved ({error.strerror}): give an IPv4 address or a name "
            f"of this machine"
        ) from error
    found: list[int] = []
    for port in _at_random(PORTS):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except PermissionError as error:
                raise ConfigError(f"cannot listen on {host}: {error.strerror}") from error
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise ConfigError(
                        f"{host} is not an address of this machine: correct --host"
                    ) from error
                continue
        found.append(port)
        if len(found) == count:
            return tuple(found)
    raise ConfigError(f"fewer than {count} free ports between 20000 and 32000 on {host}")


def _at_random(ports: range) -> Iterator[int]:
    """All of ``ports``, each once, from somewhere on; to shuffle them all would take 10 ms.

    The step has no divisor in common with their number, so that it meets every one of them.
    """
    step = random.choice([s for s in range(1009, 1100) if math.gcd(s, len(ports)) == 1])
    at = random.randrange(len(ports))
    for _ in ports:
        yield ports[at]
        at = (at + step) % len(ports)


def address_towards(endpoints: Sequence[str]) -> str:
    """IPv4 address of this machine that is used to reach the first of ``endpoints`` (host:port).

    Where that is reached over IPv6, the address towards the rest of the world: workers talk IPv4.
    """
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if host.startswith("[") and host != "[::1]":
            host = ELSEWHERE
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, int(port)))  # sends nothing
                return str(probe.getsockname()[0])
            except (OSError, ValueError):
                continue
    return "127.0.0.1"


def interface_of(host: str) -> str:
    """Name of the network interface of this machine whose address ``host`` is; "" if none is."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(found) == address:
                return name
    return ""


def is_local(host: str) -> bool:
    """Whether a process on this machine can listen on ``host``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
            return True
        except OSError:
            return False


def endpoint(host: str, port: int) -> str:
    """host:port, with brackets where ``host`` is an address of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class NodeName:
    """A name for this launcher that is its own while it lives and comes back with it.

    The host's name; a second launcher of the same job on the host gets ``<host>-2`` and so on.
    A lock on a file decides, so a name is free again the moment its launcher is dead.
    """

    def __init__(self, job: str, wanted: str = "", alone: bool = False) -> None:
        """``alone``: a name that is wanted is locked, too; raises ConfigError if another has it."""
        base = wanted or socket.gethostname().split(".")[0] or "node"
        base = re.sub(r"[^A-Za-z0-9-]", "-", base)
        self._lock: IO[str] | None = None
        if wanted:
            self.name = base
            if alone:
                self._lock = _try_lock(f"{_own_locks()}{job}-{base}.lock")
                if self._lock is None:
                    raise ConfigError(f"another process on this machine is --node {base} of {job}")
            return
        _remove_leftovers()
        for number in range(1, 1000):
            name = base if number == 1 else f"{base}-{number}"
            lock = _try_lock(f"{_own_locks()}{job}-{name}.lock")
            if lock is not None:
                self.name, self._lock = name, lock
                return
        raise ConfigError(f"a thousand launchers of job {job} run here already: set --node")

    def release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._lock.name)
            self._lock.close()
            self._lock = None


def place() -> str:
    """Four hexadecimal digits for where a ``NodeName`` is a process's own: the machine, user and
    directory of its lock. They stay over a restart of the machine if these do; another one each
    time where they cannot be told."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
        locks = os.stat(tempfile.gettempdir())
    except OSError:
        machine = ""
    card = uuid.getnode()
    if not machine or card >> 40 & 1:  # made up
        return secrets.token_hex(2)
    parts = (machine, card, os.getuid(), os.path.realpath(tempfile.gettempdir()))
    found = "/".join(map(str, (*parts, locks.st_dev, locks.st_ino)))
    return hashlib.sha256(found.encode()).hexdigest()[:4]


def _own_locks() -> str:
    """What the names of all lock files of this user begin with."""
    return f"paddle_ft-{os.getuid()}-"


def _remove_leftovers() -> None:
    """Removes the lock files of launchers that were killed.

    Whoever has opened one that goes finds that it is no longer the file of that name, and takes
    the next number; so that this hardly ever happens, one that was opened just now stays.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_own_locks()}*.lock"):
        with contextlib.suppress(OSError):
            young = time.time() - path.lstat().st_mtime <= YOUNG_S
            if not young and (lock := _try_lock(path.name, create=False)):
                path.unlink()
                lock.close()


def _try_lock(file_name: str, create: bool = True) -> IO[str] | None:
    """The file, open and locked; None if somebody else has it, or is meant by the name."""
    path = os.path.join(tempfile.gettempdir(), file_name)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        lock = open(path, "r+", opener=lambda name, _: os.open(name, flags, 0o600))  # noqa: SIM115
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if create:
            os.utime(lock.fileno())  # so that it is not taken for a leftover
        if os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    except OSError:
        pass
    lock.close()
    return None
