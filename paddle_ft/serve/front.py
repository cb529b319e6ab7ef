"""The front process of a replica: HTTP and gRPC on one event loop, bound before any model is there.

front = Front(config.serve)
await front.start()                  # answers, with 503 and progress, from here on
front.catalog.loading("digits", "3", 0.4)
front.catalog.serve(runner)
await front.run()                    # until SIGTERM or SIGINT; then drains
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from paddle_ft.errors import ConfigError, MachineError
from paddle_ft.serve import grpc_api
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.catalog import Catalog, Control
from paddle_ft.serve.http import Access, HttpApi
from paddle_ft.serve_config import ServeConfig

LOG = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""An idle connection lasts longer than a proxy keeps it (nginx: 60 s), which thus closes it first:
a request that crosses the server's close would be lost."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the front's


class Front:
    """Both servers over one catalog of models."""

    def __init__(self, config: ServeConfig, control: Control | None = None) -> None:
        """Opens nothing yet. ``control`` loads and unloads for administrators, if given."""
        limits = Limits(
            config.batch_rows_max,
            config.batch_wait_ms / 1e3,
            config.queue_max,
            config.queue_bytes_max,
        )
        access = Access(
            config.body_bytes_max,
            config.body_timeout_s,
            config.request_timeout_s,
            config.admin_token,
        )
        self.catalog = Catalog(limits, config.drain_s)
        self._config = config
        self._access = access
        self._http = _Server(
            uvicorn.Config(
                HttpApi(self.catalog, access, control),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=config.connections_max,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.drain_s) + 1,
            )
        )
        self._grpc_api = grpc_api.GrpcApi(self.catalog, access, control)
        self._grpc: Any = None
        self._serving: asyncio.Task[None] | None = None
        self.http_port = 0
        self.grpc_port = 0

    async def start(self) -> None:
        """Listens; returns once both answer. Raises ConfigError or MachineError."""
        listener = _listen(self._config.host, self._config.http_port)
        self.http_port = listener.getsockname()[1]
        self._grpc = grpc_api.server(self._access)
        self._grpc_api.add_to(self._grpc)
        try:
            self.grpc_port = grpc_api.bind(self._grpc, self._config.host, self._config.grpc_port)
        except BaseException:
            listener.close()
            raise
        await self._grpc.start()
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        while not (self._http.started or self._serving.done()):
            await asyncio.sleep(0.005)
        LOG.info(
            "serving on %s: HTTP %d, gRPC %d", self._config.host, self.http_port, self.grpc_port
        )

    async def run(self) -> None:
        """Returns after SIGTERM or SIGINT, when everything that was taken is answered."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        try:
            await asked.wait()
            LOG.info(
                "asked to stop: finishing what was taken, for up to %g s", self._config.drain_s
            )
            await self.stop()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def stop(self) -> None:
        """Not ready any more, no new connections, answers what was taken, ends the runners."""
        self.catalog.drain()
        if self._serving is not None:
            self._http.should_exit = True
            await asyncio.gather(self._serving, self._grpc.stop(self._config.drain_s))
        await self.catalog.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"serve.host = {host!r}: {error.strerror}") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it; without, the two parts of an answer wait for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is taken: end who has it, or set serve.http_port"
            ) from None
        raise MachineError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
