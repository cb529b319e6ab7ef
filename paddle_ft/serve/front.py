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
from paddle_ft.serve import connections, grpc_api
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.budget import Budget
from paddle_ft.serve.catalog import Catalog, Control
from paddle_ft.serve.http import Access, HttpApi, Services
from paddle_ft.serve.settings import Settings
from paddle_ft.serve.state_api import StateApi
from paddle_ft.serve.tls import server_tls
from paddle_ft.serve.types import ServeError
from paddle_ft.serve.wire import Bounds
from paddle_ft.serve_config import ServeConfig

LOG = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""An idle connection lasts longer than a proxy keeps it (nginx: 60 s), which thus closes it first:
a request that crosses the server's close would be lost."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, silent_s: float) -> None:
        super().__init__(config)
        self._silent_s = silent_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but who begins TLS has as long for it as for a request: until that is done
        nobody counts the connection."""
        config = self.config

        def connection() -> asyncio.Protocol:
            made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        self.servers = [
            await asyncio.get_running_loop().create_server(
                connection,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=self._silent_s if config.ssl else None,
            )
            for each in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the front's


class Front:
    """Both servers over one catalog of models."""

    def __init__(self, config: ServeConfig, control: Control | None = None) -> None:
        """Opens nothing yet. ``control`` loads and unloads for administrators, if given.

        Raises ConfigError for files of TLS, and where TLS is missing.
        """
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
            frozenset(config.admin_clients),
            config.send_timeout_s,
            Bounds(config.json_bytes_max, config.elements_max, config.strings_max),
        )
        self.budget = Budget(config.requests_max, config.in_flight_bytes_max)
        self._tls = server_tls(config)
        self.catalog = Catalog(limits, config.drain_s)
        self._config = config
        self._access = access
        self.state = StateApi(Settings(config, self.catalog))
        services = Services(self.catalog, access, control, self.budget)
        http_api = HttpApi(services)
        http_api.more |= self.state.operations
        http_api.term = self.state.term
        self._http = _Server(
            uvicorn.Config(
                http_api,
                http=connections.protocol(
                    config.connections_max, config.silent_timeout_s, config.send_timeout_s
                ),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.drain_s) + 1,
                **(self._tls.of_uvicorn if self._tls else {}),
            ),
            config.silent_timeout_s,
        )
        self._grpc_api = grpc_api.GrpcApi(services)
        self._grpc_api.term = self.state.term
        self._grpc: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._stopping = False
        self.http_port = 0
        self.grpc_port = 0

    async def start(self) -> None:
        """Listens; returns once both answer. Raises ConfigError or MachineError."""
        listener = _listen(self._config.host, self._config.http_port)
        self.http_port = listener.getsockname()[1]
        self._grpc = grpc_api.server(self._config)
        self._grpc_api.add_to(self._grpc)
        try:
            self.grpc_port = grpc_api.bind(
                self._grpc, self._config.host, self._config.grpc_port, self._tls
            )
        except BaseException:
            listener.close()
            raise
        await self._grpc.start()
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        while not (self._http.started or self._serving.done()):
            await asyncio.sleep(0.005)
        if self._serving.done():
            await self._grpc.stop(None)
            listener.close()
            await self.ended()
        LOG.info(
            "serving on %s%s: HTTP %d, gRPC %d",
            self._config.host,
            " with TLS" if self._tls else "",
            self.http_port,
            self.grpc_port,
        )

    async def ended(self) -> None:
        """Returns once HTTP has stopped as it was asked to; raises ServeError if it ended by itself
        (a defect: nobody is answered any more)."""
        assert self._serving is not None, "start() comes first"
        await asyncio.wait([self._serving])
        if self._stopping:
            return
        error = None if self._serving.cancelled() else self._serving.exception()
        raise ServeError(f"the HTTP server has ended by itself ({error!r})") from error

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
        self._stopping = True
        self._grpc_api.leave()
        if self._serving is not None:
            self._http.should_exit = True
            await asyncio.gather(
                self._serving, self._grpc.stop(self._config.drain_s), return_exceptions=True
            )
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
