"""An HTTP proxy in front of one S3 server that answers some requests wrongly, on demand.

    with FaultProxy(server.endpoint) as proxy:
        proxy.faults[:] = ["500", "reset"]     # the next two requests; later ones pass

``500``/``503``: an S3 error, the server is not asked. ``reset``: the connection is reset before an
answer. ``lost``: the server is asked, the answer is lost. ``half``: half of the body, then the end.
``flip``: one bit of the body is altered. ``stall``: no answer until the client has gone.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from typing_extensions import Self

_XML = "<?xml version='1.0'?><Error><Code>{}</Code><Message>a test wants it</Message></Error>"
_CODES = {"500": "InternalError", "503": "SlowDown"}


class FaultProxy:
    """Passes everything to ``target`` (http://host:port) but what ``faults`` names."""

    def __init__(self, target: str) -> None:
        self.faults: list[str] = []
        """Taken from the front, one a request; an empty string lets one pass."""
        self.requests: list[str] = []
        """``METHOD /path`` of all that came."""
        self.headers: list[dict[str, str]] = []
        """The headers of each, names in lower case."""
        parts = urlsplit(target)
        assert parts.hostname and parts.port
        self._target = (parts.hostname, parts.port)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def _serve(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = _read_body(handler)
        with self._lock:
            self.requests.append(f"{handler.command} {handler.path}")
            self.headers.append({n.lower(): v for n, v in handler.headers.items()})
            fault = self.faults.pop(0) if self.faults else ""
        if fault in _CODES:
            _answer(handler, int(fault), {}, _XML.format(_CODES[fault]).encode())
            return
        if fault == "reset":
            _reset(handler)
            return
        if fault == "stall":
            while not self._closing.wait(0.05) and not _gone(handler.connection):
                pass
            _reset(handler)
            return
        status, headers, content = self._forward(handler, body)
        if fault == "lost" or (fault == "half" and not content):
            _reset(handler)
        elif fault == "half":
            _answer(handler, status, headers, content[: len(content) // 2], len(content))
            _reset(handler)
        elif fault == "flip" and content:
            _answer(handler, status, headers, bytes([content[0] ^ 1]) + content[1:])
        else:
            _answer(handler, status, headers, content)

    def _forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(*self._target, timeout=30)
        try:
            upstream.putrequest(
                handler.command, handler.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in handler.headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "expect"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    chunks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return b"".join(chunks)


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    content: bytes,
    promised: int | None = None,
) -> None:
    handler.send_response_only(status)
    length = headers.pop("Content-Length", None)
    if handler.command == "HEAD" and length is not None:
        promised, content = int(length), b""
    for name, value in headers.items():
        if name.lower() not in ("transfer-encoding", "connection"):
            handler.send_header(name, value)
    if status != 204:
        handler.send_header("Content-Length", str(len(content) if promised is None else promised))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Ends the connection by RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def _gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
