"""Connections of HTTP: what one may hold without asking or reading anything.

uvicorn bounds neither the head of a request, nor the time until it is there, nor the time an
answer waits for its client, and refuses health checks with all else. Here a connection that sends
too much, is silent, or does not read is ended; beyond the bound the one that has been idle for
longest makes room for the new one.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from paddle_ft.serve.http import CONNECTION

_Base: Any = HttpToolsProtocol

_HEAD_BYTES_MAX = 65536
_CHUNK_OVERHEAD = 8
"""Bytes of framing for each byte of a body in chunks, at most."""


class Connection(_Base):  # type: ignore[misc]
    """uvicorn's protocol with these bounds."""

    def __init__(
        self, *positional: Any, connections_max: int, silent_s: float, unread_s: float, **named: Any
    ) -> None:
        super().__init__(*positional, **named)
        self.app_state: dict[str, Any]
        self._connections_max = connections_max
        self._silent_s = silent_s
        self._unread_s = unread_s
        self._silent: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Future[Any] | None = None
        self._quiet_since_s = self.loop.time()
        self._beside_bytes = 0
        """Came since the request began and are not of its body: head, framing, trailers."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.client_name = client_name(transport)
        self.app_state = {**self.app_state, CONNECTION: self}
        self._await_request()
        if len(self.connections) > self._connections_max:
            quiet = [each for each in self.connections if each is not self and not each.busy]
            idle = min(quiet, key=lambda each: each._quiet_since_s, default=self)
            idle.transport.abort()

    def cancel_if_lost(self, future: asyncio.Future[Any]) -> None:
        self._waiting = future
        if self.cycle.disconnected:
            future.cancel()
        self.flow.resume_reading()  # or the end of the connection is not seen

    @property
    def whole(self) -> bool:
        return not self.cycle.more_body

    def join(self) -> None:
        # Of requests sent without waiting for answers `cycle` is the last, and joined by each.
        if not isinstance(self.cycle.transport, _Joining):
            self.cycle.transport = _Joining(self.cycle.transport)

    @property
    def busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        self._beside_bytes += len(data)
        super().data_received(data)
        if self._beside_bytes > _HEAD_BYTES_MAX:
            self.transport.abort()
        self._await_request()

    def on_message_begin(self) -> None:
        self._beside_bytes = 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._beside_bytes = max(0, self._beside_bytes - (1 + _CHUNK_OVERHEAD) * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._beside_bytes = 0
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: an Upgrade header may be passed over, and uvicorn's advice is not for us."""

    def on_response_complete(self) -> None:
        self._quiet_since_s = self.loop.time()
        self._waiting = None  # an idle connection would hold the tensors of its last answer
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = _again(self._unread, self, self._unread_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _again(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silent, self._unread = _again(self._silent), _again(self._unread)
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def _await_request(self) -> None:
        """A request that has begun, or never begins, has so long to be there with its headers."""
        if self.busy:
            self._silent = _again(self._silent)
        elif self._silent is None and not self.transport.is_closing():
            self._silent = _again(None, self, self._silent_s)


class _Joining:
    """A transport to uvicorn, for one answer: what is written first waits for what comes next."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._first: bytes | None = None
        self._open = False

    def write(self, data: bytes) -> None:
        if self._open:
            self._transport.write(data)
        elif self._first is None:
            self._first = data
        else:
            self._open = True
            self._transport.write(self._first + data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _again(
    timer: asyncio.TimerHandle | None, of: Connection | None = None, seconds: float = 0.0
) -> asyncio.TimerHandle | None:
    """Ends ``timer``; a new one that ends the connection ``of``, if given."""
    if timer is not None:
        timer.cancel()
    if of is None:
        return None
    new: asyncio.TimerHandle = of.loop.call_later(seconds, of.transport.abort)
    return new


def protocol(connections_max: int, silent_s: float, unread_s: float) -> Any:
    """For ``uvicorn.Config(http=…)``."""

    class Bounded(Connection):
        __init__ = functools.partialmethod(
            Connection.__init__,
            connections_max=connections_max,
            silent_s=silent_s,
            unread_s=unread_s,
        )

    return Bounded


def client_name(transport: asyncio.Transport) -> str:
    """The common name in the client's certificate, which TLS has verified; "": it showed none."""
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert() if tls is not None else None
    subject: Any = certificate.get("subject", ()) if certificate else ()
    return next((value for part in subject for key, value in part if key == "commonName"), "")
