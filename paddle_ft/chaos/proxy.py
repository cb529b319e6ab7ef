"""A TCP proxy between launchers and the S3 store that fails on demand.

Bytes pass as they are, so signatures stay valid. While it fails, connections that stand are reset,
and new ones get an answer ``503``, a ``reset``, or none (``stall``).
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from urllib.parse import urlsplit

from typing_extensions import Self

from paddle_ft.agent.net import address_towards

CONNECT_TIMEOUT_S = 5.0
CHUNK_BYTES = 64 * 1024
CONNECTIONS_MAX = 256
_BODY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>chaos</Message></Error>"
_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%s" % (len(_BODY), _BODY)
)


class StoreProxy:
    """Passes everything on to ``target`` (http://host:port) until ``fail`` is called.

    It listens at the address of this machine that leads to ``target``: whoever shares a network
    with that, in another namespace too, reaches the proxy as well.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.target = target
        self._to = (parts.hostname or "", parts.port or 80)
        self._answer = ""
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._closed = False
        host = address_towards((f"{self._to[0]}:{self._to[1]}",))
        self._server = socket.create_server((host, 0), backlog=64)
        self._thread = threading.Thread(target=self._accept, name="chaos-proxy", daemon=True)

    @property
    def endpoint(self) -> str:
        host, port = self._server.getsockname()
        return f"http://{host}:{port}"

    def fail(self, answer: str) -> None:
        """``503``, ``reset`` or ``stall`` from now on; "": everything passes."""
        with self._changed:
            self._answer = answer
            self._changed.notify_all()
            standing = list(self._open)
        for each in standing if answer else ():
            _reset(each)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(timeout=5.0)
        for each in list(self._open):
            _reset(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with self._changed:
                room = len(self._open) < 2 * CONNECTIONS_MAX
                if room:
                    self._open.add(client)
            if not room:
                _reset(client)
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        upstream: socket.socket | None = None
        try:
            with self._changed:
                while self._answer == "stall" and not self._closed:
                    self._changed.wait()
                answer = self._answer
            if answer == "503":
                client.settimeout(CONNECT_TIMEOUT_S)
                client.recv(CHUNK_BYTES)
                client.sendall(_BUSY)
                return
            if answer == "reset":
                _reset(client)
                return
            upstream = socket.create_connection(self._to, CONNECT_TIMEOUT_S)
            upstream.settimeout(None)
            with self._changed:
                self._open.add(upstream)
            back = threading.Thread(target=_pump, args=(upstream, client), daemon=True)
            back.start()
            _pump(client, upstream)
            back.join()
        except OSError:
            _reset(client)
        finally:
            with self._changed:
                self._open -= {client, upstream} if upstream else {client}
            for each in (client, upstream):
                if each is not None:
                    each.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Ends it at once, also for a thread that waits in it."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
