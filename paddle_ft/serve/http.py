"""The Open Inference Protocol over HTTP, as a raw ASGI application. Paths: ``http_paths``.

Whatever is wrong with a request, its answer is ``{"error": "one sentence"}`` with the right status;
503 and 429 carry ``Retry-After``, and the ``progress`` of a model that is being loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from paddle_ft.serve import answers, wire
from paddle_ft.serve.bodies import (
    COMPRESS_BYTES_MIN,
    Disconnected,
    Receive,
    accepted,
    gently,
    pack,
    read_body,
)
from paddle_ft.serve.budget import Budget, Charge
from paddle_ft.serve.catalog import Catalog, Control, Loading
from paddle_ft.serve.http_paths import NotAllowed, Route, find
from paddle_ft.serve.tensors import BadRequest, nbytes_of
from paddle_ft.serve.types import ServeError, Unavailable

LOG = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TIMEOUT_HEADER = "x-request-timeout-ms"
JSON_LENGTH_HEADER = "inference-header-content-length"
TIMEOUT_MS_MAX = 3_600_000
LARGE_JSON_BYTES = 2**18
"""What is larger is parsed in a thread. ``json.loads`` holds the interpreter all the same, which is
why ``Bounds.json_bytes`` is low; the rest of it lets others in between."""
CONTROL_BYTES_MAX = 2**20
"""Of the JSON of a call that is not inference."""
SEND_BYTES = 2**18
"""Of an answer at a time: so much waits for a client that does not read."""
JOIN_BYTES_MAX = 2**16
"""An answer that is smaller goes out with its head in one piece."""
_UNCOUNTED = frozenset({"live", "ready", "model_ready"})

CONNECTION = "paddle_ft.connection"
"""Key of the ASGI scope's ``state``, for a ``Connected``."""


class Connected(Protocol):
    """The connection on which a request came."""

    @property
    def client_name(self) -> str:
        """Name in the verified certificate of the client, or ""."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the body of the request is there."""
        ...

    def join(self) -> None:
        """The next two parts that are sent are sent at once."""
        ...

    def cancel_if_lost(self, future: asyncio.Future[Any]) -> None:
        """Cancels ``future`` once the client is gone; replaces the one given before."""
        ...


@dataclass(frozen=True, slots=True)
class Access:
    """What a request may cost, and who may administer. Shared by HTTP and gRPC."""

    body_bytes_max: int = 64 * 2**20
    body_timeout_s: float = 30.0
    request_timeout_s: float = 60.0
    """For those that bring no limit of their own, and at most."""
    admin_token: str = field(default="", repr=False)
    """Empty: nobody administers over the network, but ``admin_clients``."""
    admin_clients: frozenset[str] = frozenset()
    """Names in certificates."""
    send_timeout_s: float = 30.0
    bounds: wire.Bounds = wire.BOUNDS

    def admit(self, authorization: str, client: str = "") -> None:
        """Raises BadRequest (401, 403) unless ``authorization``, or ``client``, the name in a
        verified certificate, is an administrator's."""
        if client and client in self.admin_clients:
            return
        if not self.admin_token:
            raise BadRequest("no admin token is set on this server: it takes no such calls", 403)
        wanted = ("Bearer " + self.admin_token).encode()
        if not hmac.compare_digest(authorization.encode("utf-8", "replace"), wanted):
            raise BadRequest("this call needs the header 'Authorization: Bearer TOKEN'", 401)


@dataclass(slots=True)
class Reply:
    status: int = 200
    parts: list[bytes] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    names: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    connection: Connected
    charge: Charge

    @property
    def model(self) -> tuple[str, str]:
        return self.names["model"], self.names.get("version", "")


def json_reply(value: object, status: int = 200) -> Reply:
    text = json.dumps(value, separators=(",", ":")).encode()
    return Reply(status, [text], {"content-type": "application/json"})


def refusal(error: ServeError) -> Reply:
    body: dict[str, Any] = {"error": str(error)}
    headers: dict[str, str] = {}
    if isinstance(error, Loading):
        body["progress"] = round(error.progress, 4)
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, NotAllowed):
        headers["allow"] = error.allowed
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    reply = json_reply(body, error.status)
    reply.headers |= headers
    return reply


class Services(NamedTuple):
    """What requests are answered from, whichever way they come."""

    catalog: Catalog
    access: Access
    control: Control | None
    budget: Budget


class HttpApi:
    """The ASGI application."""

    def __init__(self, services: Services) -> None:
        self._catalog, self._access, self._control, self._budget = services
        self._health = Budget(2**62)
        self.more: dict[str, Callable[[Call], Awaitable[Reply]]] = {}
        """Operations of others, by the name in ``http_paths``."""
        self.term: Callable[[], dict[str, str]] = dict
        """Gives the headers that say up to where an answer knows the changes of the group."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: closed before it is accepted is a 403
            await send({"type": "websocket.close"})
            return
        headers = {
            name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]
        }
        connection: Connected = scope["state"][CONNECTION]
        with contextlib.ExitStack() as held:
            try:
                route, names = find(scope["method"], _path(scope))
                counted = self._health if route.operation in _UNCOUNTED else self._budget
                charge = held.enter_context(counted.request())
                if route.admin:
                    self._access.admit(headers.get("authorization", ""), connection.client_name)
                body = await self._body(route, headers, receive, charge, connection.whole)
                call = Call(names, headers, body, connection, charge)
                reply = await self._operation(route)(call)
            except ServeError as error:
                reply = refusal(error)
            except Disconnected:
                return
            except Exception:
                LOG.exception("a defect in answering %s %a", scope["method"], scope["path"][:100])
                reply = refusal(ServeError("a defect of the server, which its log tells of"))
            encoding = accepted(headers.get("accept-encoding", ""))
            if 0 < sum(map(len, reply.parts)) <= JOIN_BYTES_MAX and scope["method"] != "HEAD":
                connection.join()
            await _send(reply, encoding, send)

    async def _body(
        self,
        route: Route,
        headers: Mapping[str, str],
        receive: Receive,
        charge: Charge,
        whole: bool,
    ) -> bytes:
        if route.method not in ("POST", "PUT"):
            return b""
        access = self._access
        bytes_max = min(access.body_bytes_max, route.body_bytes_max)
        timeout_s = None if whole else access.body_timeout_s
        return await read_body(receive, headers, bytes_max, timeout_s, charge.add)

    def _operation(self, route: Route) -> Callable[[Call], Awaitable[Reply]]:
        if route.operation in self.more:
            return self.more[route.operation]
        found: Callable[[Call], Awaitable[Reply]] = getattr(self, f"_{route.operation}")
        return found

    # ------------------------------------------------------------ operations

    async def _server(self, call: Call) -> Reply:
        return json_reply(answers.server())

    async def _live(self, call: Call) -> Reply:
        return Reply()

    async def _ready(self, call: Call) -> Reply:
        if self._catalog.ready():
            return Reply()
        others = [entry for entry in self._catalog.index() if entry.state != "READY"]
        waiting = ", ".join(f"{e.name} {e.version} {e.state} ({e.reason})" for e in others)
        raise Unavailable(f"not ready: {waiting or 'there is no model, or no more requests'}")

    async def _model_ready(self, call: Call) -> Reply:
        self._catalog.find(*call.model)
        if not self._catalog.ready(*call.model):
            raise Unavailable("this replica is leaving: ask another one")
        return Reply()

    async def _model(self, call: Call) -> Reply:
        return json_reply(answers.model(self._catalog, *call.model))

    async def _config(self, call: Call) -> Reply:
        return json_reply(answers.config(self._catalog, *call.model))

    async def _stats(self, call: Call) -> Reply:
        name, version = call.names.get("model", ""), call.names.get("version", "")
        return json_reply(answers.statistics(self._catalog, name, version))

    async def _index(self, call: Call) -> Reply:
        asked = _object(call.body)
        ready = asked.get("ready", False)
        if not isinstance(ready, bool):
            raise BadRequest("ready must be true or false")
        return json_reply(answers.index(self._catalog, ready))

    async def _load(self, call: Call) -> Reply:
        parameters = _object(_object(call.body).get("parameters", {}))
        await answers.control(self._control).load(call.names["model"], parameters)
        return Reply(headers=self.term())

    async def _unload(self, call: Call) -> Reply:
        _object(_object(call.body).get("parameters", {}))
        await answers.control(self._control).unload(call.names["model"])
        return Reply(headers=self.term())

    async def _infer(self, call: Call) -> Reply:
        batcher = self._catalog.find(*call.model)
        json_bytes = json_length(call.headers)
        bounds = self._access.bounds
        texts = any(feature.datatype == "BYTES" for feature in batcher.info.inputs)
        slow = len(call.body) if json_bytes is None or texts else json_bytes
        if slow >= LARGE_JSON_BYTES:
            request = await asyncio.to_thread(
                wire.decode, call.body, json_bytes, batcher.info, bounds
            )
            now = self._catalog.find(*call.model)
            if now is not batcher:  # another version has taken over meanwhile
                wire.check_inputs(now.info, dict(request.inputs))
                wire.check_outputs(now.info, [asked.name for asked in request.outputs])
                batcher = now
        else:
            request = wire.decode(call.body, json_bytes, batcher.info, bounds)
        limits_s = [self._access.request_timeout_s, timeout_s(call.headers)]
        if request.timeout_us:
            limits_s.append(request.timeout_us / 1e6)
        session = call.headers.get("x-session-id", "")
        outputs = await while_connected(
            batcher.submit(request.inputs, min(limits_s), session), call.connection
        )
        call.charge.add(nbytes_of(outputs))
        steps = wire.encoding(batcher.info, request, outputs, bounds)
        parts, json_bytes = await gently(steps)
        if json_bytes is None:
            return Reply(200, parts, {"content-type": "application/json"})
        headers = {"content-type": "application/octet-stream", JSON_LENGTH_HEADER: str(json_bytes)}
        return Reply(200, parts, headers)


# ---------------------------------------------------------------- parts


def _path(scope: Mapping[str, Any]) -> str:
    """As it was sent, without the query: ``scope["path"]`` no longer tells %2F from a slash."""
    raw: bytes | None = scope.get("raw_path")
    return quote(scope["path"]) if raw is None else raw.partition(b"?")[0].decode("latin1")


async def while_connected(future: asyncio.Future[Any], connection: Connected) -> Any:
    """The result, unless the client goes first: then it is cancelled. Raises Disconnected."""
    connection.cancel_if_lost(future)
    try:
        return await future
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if future.cancelled() and task is not None and not getattr(task, "cancelling", int)():
            raise Disconnected from None
        raise
    finally:
        future.cancel()


async def _send(reply: Reply, encoding: str, send: Send) -> None:
    parts = reply.parts
    if encoding and sum(map(len, parts)) >= COMPRESS_BYTES_MIN:
        parts = [await pack(parts, encoding)]
        reply.headers["content-encoding"] = encoding
        reply.headers["vary"] = "accept-encoding"
    reply.headers["content-length"] = str(sum(map(len, parts)))
    headers = [(name.encode(), value.encode("latin1")) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    pieces = _grouped(parts)
    last = next(pieces, b"")
    for piece in pieces:
        await send({"type": "http.response.body", "body": last, "more_body": True})
        last = piece
    await send({"type": "http.response.body", "body": last})


def _grouped(parts: list[bytes]) -> Iterator[bytes]:
    """``parts`` as pieces of about SEND_BYTES, each of which waits until its client has read."""
    group: list[memoryview] = []
    size = 0
    for part in parts:
        for at in range(0, len(part), SEND_BYTES):
            group.append(memoryview(part)[at : at + SEND_BYTES])
            size += len(group[-1])
            if size >= SEND_BYTES:
                yield b"".join(group)
                group, size = [], 0
    if group:
        yield b"".join(group)


def json_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get(JSON_LENGTH_HEADER)
    return None if text is None else _whole(text, "Inference-Header-Content-Length", 0, 2**40)


def timeout_s(headers: Mapping[str, str]) -> float:
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return math.inf
    return _whole(text, f"{TIMEOUT_HEADER} (milliseconds)", 1, TIMEOUT_MS_MAX) / 1e3


def _whole(text: str, what: str, least: int, most: int) -> int:
    value = int(text) if re.fullmatch(r"[0-9]{1,15}", text) else -1
    if not least <= value <= most:
        raise BadRequest(f"{what} must be a whole number from {least} to {most}")
    return value


def _object(body: object) -> dict[str, Any]:
    if isinstance(body, bytes) and len(body) > CONTROL_BYTES_MAX:
        raise BadRequest(f"the body has more than {CONTROL_BYTES_MAX} bytes", 413)
    value = wire.parse_json(body) if isinstance(body, bytes) and body else body or {}
    if not isinstance(value, dict):
        raise BadRequest("the request must be a JSON object")
    return value
