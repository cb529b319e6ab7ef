"""What the group keeps for each session: its size, its age, and what there is no room for.

A session is a name that clients choose; its keys are ``name_of(session, key)`` in the log. It is as
old as the last change to any of its keys, by the clock of whoever looks: a replica that has begun
with an image counts from then on. So a session lasts for its time to live at least, and longer
after a promotion of such a replica. The primary alone deletes, by entries of its log like any
others, and so all replicas agree on what there is.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field

from paddle_ft.serve.log import Entry, Kind, Position, State, size_of
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import Full, TooLarge

KEY_BYTES_MAX = 512
"""With the name of the session."""
VALUE_BYTES_MAX = 2 * 2**20
_SESSION = re.compile(r"[\x21-\x7e]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BETWEEN = "\0"


def name_of(session: str, key: str) -> str:
    """The key in the log; raises BadRequest for what is no name of a session or of its key."""
    if not _SESSION.fullmatch(session):
        raise BadRequest("a session is 1 to 128 visible characters of ASCII, as headers can hold")
    if not key or _CONTROL.search(key):
        raise BadRequest("a key is not empty, and has no control characters")
    if {session, key} & {".", ".."}:
        raise BadRequest("neither a session nor a key is . or .., which paths leave out")
    name = session + _BETWEEN + key
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadRequest("a key is text that can be written as UTF-8") from None
    return name


def marker_of(session: str) -> str:
    """A key in the log of that session which never holds anything, and no client can name."""
    return session + _BETWEEN


def session_of(name: str) -> str:
    return name.partition(_BETWEEN)[0]


@dataclass(frozen=True, slots=True)
class Bounds:
    state_bytes: int = 2**28
    session_bytes: int = 2**24
    session_ttl_s: float = 3600.0
    """0: sessions do not end by themselves."""


@dataclass(slots=True)
class _Session:
    since_s: float
    sizes_bytes: dict[str, int] = field(default_factory=dict)
    """By the key in the log."""
    size_bytes: int = 0


class Ledger:
    """Of one replica; told of every change, whoever is the primary."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        """The one that has not changed for longest comes first."""

    def check(self, state: State, kind: Kind, name: str, value: bytes | None) -> None:
        """Raises TooLarge and Full if there is no room for the change; what removes something, or
        makes it no larger, is never refused."""
        if value is not None and len(value) > VALUE_BYTES_MAX:
            raise TooLarge(f"a value has at most {VALUE_BYTES_MAX} bytes, and this {len(value)}")
        more_bytes = 0
        for part in Entry(Position(), kind, name, value).parts():
            if len(part.key.encode()) > KEY_BYTES_MAX:
                raise TooLarge(f"a key has at most {KEY_BYTES_MAX} bytes, with its session")
            old = state.items.get((part.kind, part.key))
            more_bytes += part.size_bytes if part.value is not None else 0
            more_bytes -= size_of(part.key, old.value) if old else 0
        if value is None or more_bytes <= 0:
            return
        if (
            kind in ("state", "states")
            and self.size_bytes(name) + more_bytes > self.bounds.session_bytes
        ):
            raise TooLarge(
                f"a session has at most {self.bounds.session_bytes} bytes "
                "(serve.session_bytes_max): delete keys of it first"
            )
        if state.size_bytes + more_bytes > self.bounds.state_bytes:
            raise Full(
                f"the state of the group has at most {self.bounds.state_bytes} bytes "
                "(serve.state_bytes_max): delete sessions, or let them expire sooner "
                "(serve.session_ttl_s)"
            )

    def size_bytes(self, name: str) -> int:
        """Of the session that the key ``name`` belongs to."""
        session = self._sessions.get(session_of(name))
        return session.size_bytes if session is not None else 0

    def wrote(self, name: str, now_s: float) -> None:
        """A change is on its way: what is old by now is not deleted after it."""
        found = self._sessions.get(session_of(name))
        if found is not None:
            found.since_s = now_s
            self._sessions.move_to_end(session_of(name))

    def took(self, entry: Entry, now_s: float) -> None:
        """``entry`` has changed the state."""
        if entry.kind != "state":
            return
        name = session_of(entry.key)
        session = self._sessions.get(name)
        if session is None:
            if entry.value is None:
                return
            session = self._sessions[name] = _Session(now_s)
        session.size_bytes -= session.sizes_bytes.pop(entry.key, 0)
        if entry.value is not None:
            session.sizes_bytes[entry.key] = entry.size_bytes
            session.size_bytes += entry.size_bytes
            self.wrote(entry.key, now_s)
        elif not session.sizes_bytes:
            del self._sessions[name]

    def due(self, now_s: float, most: int) -> list[str]:
        """Keys in the log that are to be deleted now, at most about ``most``.

        They are given again after another time to live, should they be there still.
        """
        found: list[str] = []
        while self._sessions and self.bounds.session_ttl_s and len(found) < most:
            session = next(iter(self._sessions.values()))
            if now_s - session.since_s <= self.bounds.session_ttl_s:
                break
            names = list(session.sizes_bytes)
            found += names
            self.wrote(names[0], now_s)
        return found
