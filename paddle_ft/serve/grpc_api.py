"""GRPCInferenceService and grpc.health.v1 over grpc.aio. The same answers as HTTP's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf import json_format  # type: ignore[import-untyped]

from paddle_ft.agent.net import endpoint
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError
from paddle_ft.serve import answers, grpc_messages, grpc_tensors
from paddle_ft.serve.bodies import gently
from paddle_ft.serve.budget import Charge
from paddle_ft.serve.grpc_messages import parsing, serialize
from paddle_ft.serve.http import TIMEOUT_HEADER, Services, timeout_s
from paddle_ft.serve.tensors import BadRequest, nbytes_of
from paddle_ft.serve.tls import ServerTls
from paddle_ft.serve.types import ServeError, Unavailable
from paddle_ft.serve_config import ServeConfig

LOG = logging.getLogger(__name__)

INFERENCE_SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"
STREAM_REQUESTS_MAX = 64
"""Of one stream under way at once, answers that its client has not read among them."""
STREAMS_MAX = 256
"""Calls of one connection at once."""
IDLE_S = 300.0
"""A connection without calls is then ended, of which a client notices nothing: it makes a new one
for its next call."""
SPARE_CALLS = 64
"""Above those of inference: for health checks."""

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    421: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

Method = Callable[[Any, Any], Awaitable[Any]]


def server(config: ServeConfig) -> Any:
    """A grpc.aio server with this project's bounds, without services and ports."""
    return grpc.aio.server(
        maximum_concurrent_rpcs=config.requests_max + SPARE_CALLS,
        options=[
            ("grpc.max_allowed_incoming_connections", config.connections_max),
            ("grpc.server_handshake_timeout_ms", int(config.silent_timeout_s * 1e3)),
            ("grpc.max_connection_idle_ms", int(IDLE_S * 1e3)),
            ("grpc.max_concurrent_streams", STREAMS_MAX),
            ("grpc.max_receive_message_length", config.body_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
        ],
    )


def bind(server: Any, host: str, port: int, tls: ServerTls | None = None) -> int:
    """Opens ``port`` (0: any free one) and says which it is; raises ConfigError if it is taken."""
    address = endpoint(host, port)
    try:
        if tls is None:
            found: int = server.add_insecure_port(address)
        else:
            cert, key, authority = tls.read()
            credentials = grpc.ssl_server_credentials(
                [(key, cert)], authority if tls.required else None, tls.required
            )
            found = server.add_secure_port(address, credentials)
    except RuntimeError:
        found = 0
    if not found:
        raise ConfigError(f"cannot listen on {address} for gRPC: is it taken? See serve.grpc_port")
    return found


class GrpcApi:
    """The two services, to be added to a server."""

    def __init__(self, services: Services) -> None:
        self._catalog, self._access, self._control, self._budget = services
        self._messages_max = self._budget.messages(self._access.body_bytes_max)
        self._reading = asyncio.Semaphore(self._messages_max)
        self._streams = 0
        self._leaving = asyncio.Event()
        self.term: Callable[[], dict[str, str]] = dict
        """As that of ``HttpApi``: goes in the trailing metadata."""
        self._api = grpc_messages.inference()

    def leave(self) -> None:
        """Ends what would never end by itself: ``Watch``, and streams once what they have asked is
        answered."""
        self._leaving.set()

    def add_to(self, server: Any) -> None:
        api, health = self._api, grpc_messages.health()
        methods: dict[str, tuple[Method, Any]] = {
            "ServerLive": (self._server_live, api.ServerLiveRequest),
            "ServerReady": (self._server_ready, api.ServerReadyRequest),
            "ModelReady": (self._model_ready, api.ModelReadyRequest),
            "ServerMetadata": (self._server_metadata, api.ServerMetadataRequest),
            "ModelMetadata": (self._model_metadata, api.ModelMetadataRequest),
            "ModelConfig": (self._model_config, api.ModelConfigRequest),
            "ModelStatistics": (self._statistics, api.ModelStatisticsRequest),
            "RepositoryIndex": (self._index, api.RepositoryIndexRequest),
            "RepositoryModelLoad": (self._load, api.RepositoryModelLoadRequest),
            "RepositoryModelUnload": (self._unload, api.RepositoryModelUnloadRequest),
        }
        handlers = {name: _unary(method, kind) for name, (method, kind) in methods.items()}
        handlers["ModelInfer"] = grpc.stream_unary_rpc_method_handler(
            _answering(self._model_infer), parsing(api.ModelInferRequest), serialize
        )
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream, parsing(api.ModelInferRequest), serialize
        )
        checks = {
            "Check": _unary(self._check, health.HealthCheckRequest),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._watch, parsing(health.HealthCheckRequest), serialize
            ),
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(INFERENCE_SERVICE, handlers),
                grpc.method_handlers_generic_handler(HEALTH_SERVICE, checks),
            )
        )

    # ------------------------------------------------------------ inference

    async def _server_live(self, request: Any, context: Any) -> Any:
        return self._api.ServerLiveResponse(live=True)

    async def _server_ready(self, request: Any, context: Any) -> Any:
        return self._api.ServerReadyResponse(ready=self._catalog.ready())

    async def _model_ready(self, request: Any, context: Any) -> Any:
        ready = self._catalog.ready(_named(request.name), request.version)
        return self._api.ModelReadyResponse(ready=ready)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return self._api.ServerMetadataResponse(**answers.server())

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        found = answers.model(self._catalog, _named(request.name), request.version)
        return json_format.ParseDict(found, self._api.ModelMetadataResponse())

    async def _model_config(self, request: Any, context: Any) -> Any:
        found = answers.config(self._catalog, _named(request.name), request.version)
        for feature in (*found["input"], *found["output"]):
            feature["data_type"] = grpc_messages.DATA_TYPES[feature["data_type"]]
        return json_format.ParseDict({"config": found}, self._api.ModelConfigResponse())

    async def _statistics(self, request: Any, context: Any) -> Any:
        found = answers.statistics(self._catalog, request.name, request.version)
        return json_format.ParseDict(found, self._api.ModelStatisticsResponse())

    async def _index(self, request: Any, context: Any) -> Any:
        return self._api.RepositoryIndexResponse(models=answers.index(self._catalog, request.ready))

    async def _load(self, request: Any, context: Any) -> Any:
        self._admit(context)
        parameters = {key: grpc_tensors.value(each) for key, each in request.parameters.items()}
        await answers.control(self._control).load(_named(request.model_name), parameters)
        context.set_trailing_metadata(tuple(self.term().items()))
        return self._api.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, context: Any) -> Any:
        self._admit(context)
        await answers.control(self._control).unload(_named(request.model_name))
        context.set_trailing_metadata(tuple(self.term().items()))
        return self._api.RepositoryModelUnloadResponse()

    def _admit(self, context: Any) -> None:
        client, *_ = context.auth_context().get("x509_common_name", (b"",))
        self._access.admit(_metadata(context).get("authorization", ""), client.decode())

    async def _model_infer(self, requests: Any, context: Any) -> Any:
        charge = self._budget.request()
        context.add_done_callback(lambda _: charge.close())  # sent, or given up
        return await self._inferred(await self._received(context), context, charge)

    async def _received(self, context: Any) -> Any:
        """The message of a call. How large it is is known once it is there: so only as many are
        read at once as fit into the budget however large they are. Raises BadRequest."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        async with self._reading:
            until_s = loop.time() + self._access.body_timeout_s
            late = loop.call_at(until_s, task.cancel)
            try:
                request = await context.read()  # not the iterator: 0.05 ms less
            except asyncio.CancelledError:
                if loop.time() < until_s:
                    raise
                raise BadRequest("the request did not come in time", 408) from None
            finally:
                late.cancel()
        if request is grpc.aio.EOF:
            raise BadRequest("the call brings no request")
        return request

    async def _inferred(self, request: Any, context: Any, charge: Charge) -> Any:
        if isinstance(request, BadRequest):
            raise request
        bounds = self._access.bounds
        charge.add(sum(map(len, request.raw_input_contents)))
        batcher = self._catalog.find(_named(request.model_name), request.model_version)
        asked = grpc_tensors.decode(request, batcher.info, bounds)
        if not request.raw_input_contents:
            charge.add(nbytes_of(asked.inputs))
        metadata = _metadata(context)
        limits_s = [self._access.request_timeout_s, timeout_s(metadata)]
        if (left_s := context.time_remaining()) is not None:
            limits_s.append(left_s)
        if asked.timeout_us:
            limits_s.append(asked.timeout_us / 1e6)
        session = metadata.get("x-session-id", "")
        outputs = await batcher.submit(asked.inputs, max(min(limits_s), 1e-3), session)
        charge.add(nbytes_of(outputs))
        return await gently(grpc_tensors.encoding(batcher.info, asked, outputs, bounds))

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Each request is answered on its own, as it is done; an error does not end the stream."""
        if self._streams >= self._messages_max:  # each may be sending its next one
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"{self._streams} streams are open here already: ask another replica, or set a "
                "larger serve.in_flight_bytes_max or a smaller serve.body_bytes_max",
            )
        self._streams += 1
        try:
            await self._stream_on(requests, context)
        finally:
            self._streams -= 1

    async def _stream_on(self, requests: AsyncIterator[Any], context: Any) -> None:
        room = asyncio.Semaphore(STREAM_REQUESTS_MAX)
        writing = asyncio.Lock()
        tasks: set[asyncio.Task[None]] = set()
        over = asyncio.Event()
        leaving = asyncio.create_task(_first(self._leaving, over))
        try:
            while (request := await _next(requests, leaving)) is not None:
                await room.acquire()
                task = asyncio.create_task(self._answer(request, context, writing, over))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: room.release())
            while tasks and not over.is_set():
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (leaving, *tasks):
                task.cancel()
        if over.is_set():
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"nothing was read for {self._access.send_timeout_s:g} s",
            )
        if self._leaving.is_set():
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "this replica is leaving: ask another one"
            )

    async def _answer(
        self, request: Any, context: Any, writing: asyncio.Lock, over: asyncio.Event
    ) -> None:
        """Answers one request of a stream; returns once that is sent. ``over``: it cannot be."""
        reply = self._api.ModelStreamInferResponse()
        with contextlib.ExitStack() as held:
            try:
                charge = held.enter_context(self._budget.request())
                reply.infer_response.CopyFrom(await self._inferred(request, context, charge))
            except ServeError as error:
                reply.error_message = str(error)
            except Exception:
                LOG.exception("a defect in answering ModelStreamInfer")
                reply.error_message = str(_defect())
            if reply.error_message:
                reply.infer_response.id = getattr(request, "id", "")
            async with writing:
                with contextlib.suppress(Exception):  # the client is gone, or does not read
                    await asyncio.wait_for(context.write(reply), self._access.send_timeout_s)
                    return
            over.set()

    # ------------------------------------------------------------ health

    async def _check(self, request: Any, context: Any) -> Any:
        status = self._health(request.service)
        if status == grpc_messages.SERVICE_UNKNOWN:
            raise BadRequest(f"there is no service {request.service[:60]!a}", 404)
        return grpc_messages.health().HealthCheckResponse(status=status)

    async def _watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if isinstance(request, BadRequest):
            await context.abort(_STATUS[request.status], str(request))
        changed = asyncio.Event()
        stop = self._catalog.watch(changed.set)
        last: int | None = None
        try:
            while True:
                changed.clear()
                status = self._health(request.service)
                if status != last:
                    yield grpc_messages.health().HealthCheckResponse(status=status)
                    last = status
                if self._leaving.is_set():
                    return
                await _first(changed, self._leaving)
        finally:
            stop()

    def _health(self, service: str) -> int:
        """Of all ("" or the service of inference), or of the model of that name."""
        try:
            ready = self._catalog.ready("" if service == INFERENCE_SERVICE else service)
        except BadRequest:
            return grpc_messages.SERVICE_UNKNOWN
        return grpc_messages.SERVING if ready else grpc_messages.NOT_SERVING


def _unary(method: Method, request: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(_answering(method), parsing(request), serialize)


def _answering(method: Method) -> Method:
    """``method``, with a status for what it raises."""

    async def call(message: Any, context: Any) -> Any:
        try:
            if isinstance(message, BadRequest):
                raise message
            return await method(message, context)
        except ServeError as error:
            failure = error
        except Exception:
            LOG.exception("a defect in answering %s", method.__name__)
            failure = _defect()
        if isinstance(failure, Unavailable):
            after = str(max(1, math.ceil(failure.retry_after_s)))
            context.set_trailing_metadata((("retry-after", after),))
        return await context.abort(
            _STATUS.get(failure.status, grpc.StatusCode.INTERNAL), str(failure)
        )

    return call


def _defect() -> ServeError:
    return ServeError("a defect of the server, which its log tells of")


async def _next(requests: AsyncIterator[Any], leaving: asyncio.Task[Any]) -> Any:
    """The next one; None: there is none, or ``leaving`` is over."""
    coming = asyncio.ensure_future(anext(requests, None))
    try:
        await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _named(name: str) -> str:
    if not name:
        raise BadRequest("the request names no model")
    return name


def _metadata(context: Any) -> dict[str, str]:
    wanted = ("authorization", "x-session-id", TIMEOUT_HEADER)
    return {key: value for key, value in context.invocation_metadata() or () if key in wanted}
