"""Addresses of replicas that are registered by a host's name.

nginx refuses a whole configuration in which one name cannot be resolved, and its check waits for
name servers. So names are resolved here, on a thread of their own, and the gateway writes
addresses. Invariant: a name keeps its address as long as it is one of the name's, or no newer one
can be had; a replica whose name never had one is in no group that is given out.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from paddle_ft.serve.registry import Group
from paddle_ft.serve.routing import is_host

AGAIN_S = 10.0
SOON_S = 1.0
"""While a name has no address."""


class Hosts:
    """Args:
    notify: called on the thread when a name has got another address; must not block.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._known: Mapping[str, str] = {}
        self._wanted: frozenset[str] = frozenset()
        self._made: tuple[tuple[Group, Mapping[str, str]], tuple[Group, list[str]]] | None = None
        self._changed = threading.Event()
        self._ended = False
        # A name server that does not answer holds it up, and nobody waits for it.
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)

    def addressed(self, group: Group) -> tuple[Group, list[str]]:
        """``group`` by addresses alone, and sentences about whom that leaves out; the same
        objects as long as nothing changes."""
        wanted = frozenset(r.host for r in group.replicas.values() if is_name(r.host))
        if wanted != self._wanted:
            self._wanted = wanted
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.set()
        key = (group, self._known)
        if self._made is None or any(a is not b for a, b in zip(self._made[0], key, strict=True)):
            self._made = key, addressed(*key) if wanted else (group, [])
        return self._made[1]

    def close(self) -> None:
        self._ended = True
        self._changed.set()

    def _run(self) -> None:
        while not self._ended:
            wanted = self._wanted
            known = {name: address_of(name, self._known.get(name, "")) for name in wanted}
            found = {name: address for name, address in known.items() if address}
            if found != self._known:
                self._known = found
                self._notify()
            self._changed.wait(AGAIN_S if len(found) == len(wanted) else SOON_S)
            self._changed.clear()


def addressed(group: Group, known: Mapping[str, str]) -> tuple[Group, list[str]]:
    """``group`` with the ``known`` names replaced, and without those that are not. Pure."""
    replicas, left_out = {}, []
    for name, replica in group.replicas.items():
        address = known.get(replica.host, "") if is_name(replica.host) else replica.host
        if address:
            replicas[name] = replace(replica, host=address)
        else:
            left_out.append(
                f"replica {name!r:.110} is left out: its host {replica.host!r:.110} has no address"
            )
    return replace(group, replicas=replicas), left_out


def address_of(name: str, before: str) -> str:
    """An address of the host ``name``, as ``before`` if that is right still, or if none can be
    had; "" if there never was one."""
    try:
        told = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return before
    found = [str(address[0]) for *_, address in told]
    return before if before in found else next(iter(found), before)


def is_name(host: str) -> bool:
    """False for an address, and for what is neither."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return is_host(host)
    return False
