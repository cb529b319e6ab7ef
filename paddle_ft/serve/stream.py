"""The broadcast between replicas over gRPC: one stream from the primary to each of the others.

The primary writes a message, and writes the next one when it has been answered: what came in
meanwhile goes together. So a stream holds one message at a time, whoever is slow. A replica that
does not answer within ANSWER_S, or whose stream breaks, is connected to again for as long as it is
registered; that it is waited for no longer is ``broadcast``'s decision, and comes much earlier.

A change that has to go to the primary is passed on by a call of its own (``Put``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_ft.agent.net import endpoint
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError
from paddle_ft.serve.broadcast import Answer, Append, Install
from paddle_ft.serve.frames import (
    Joiner,
    decode_position,
    decode_put,
    encode,
    encode_position,
    encode_put,
    frames,
)
from paddle_ft.serve.log import Kind, Position
from paddle_ft.serve.types import Full, NoPrimary, NotPrimary, ServeError, TooLarge, Unavailable

log = logging.getLogger("paddle_ft")

SERVICE = "paddle_ft.serve.Peers"
HEARTBEAT_S = 0.1
"""Between two messages when there is nothing to say."""
ANSWER_S = 5.0
"""To a whole message; and so long may one slice of an image take."""
RETRY_S = 0.05
RETRY_DEFECT_S = 1.0
CLOSE_S = 1.0
CHANNELS_MAX = 8
"""To other replicas, for changes that are passed on."""
STREAMS_MAX = 64
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)

_CODES = {
    NotPrimary.status: grpc.StatusCode.FAILED_PRECONDITION,
    Unavailable.status: grpc.StatusCode.UNAVAILABLE,
    TooLarge.status: grpc.StatusCode.OUT_OF_RANGE,
    Full.status: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Of a change that is passed on and refused; grpc itself uses RESOURCE_EXHAUSTED, too, for messages
that are too large, which changes are not."""
_NOTHING_DONE = (_CODES[NotPrimary.status], grpc.StatusCode.PERMISSION_DENIED)
"""It is not the primary, or not there: another one has its address."""
_UNREACHED = "failed to connect"
"""What grpc says of a call that it never sent."""


@dataclass(frozen=True, slots=True)
class PeerTls:
    """Mutual TLS between replicas: PEM files. Each certificate names the host it is for."""

    ca_file: str
    cert_file: str
    key_file: str

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Authority, certificate, key. Raises ConfigError, naming the file that is wrong.

        grpc ends the process on a bad one, so Python's ssl looks at them first.
        """
        found = []
        for path in (self.ca_file, self.cert_file, self.key_file):
            try:
                found.append(Path(path).read_bytes())
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        context = ssl.create_default_context()
        try:
            context.load_verify_locations(self.ca_file)
            context.load_cert_chain(self.cert_file, self.key_file, password=lambda: b"")
        except ssl.SSLError as error:
            raise ConfigError(
                f"{self.ca_file}, {self.cert_file} and {self.key_file} are not an authority, a "
                f"certificate and its key in PEM form ({error.reason or 'unreadable'})"
            ) from None
        return found[0], found[1], found[2]


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches ``host``; an unknown name may be anywhere."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _metadata(group: str, name: str) -> tuple[tuple[str, str], ...]:
    return (("paddle-ft-group", group), ("paddle-ft-replica", name))


class PeerServer:
    """The end of a replica: answers the primary's messages and takes changes that are passed on.

    Args:
        group: its name; who comes for another group, or for a replica that was here before, is
            sent away.
        name: of this replica, now.
        on_message: answers at once.
        on_put: raises ServeError; with how long it may take, in seconds, and in which term.
    """

    def __init__(
        self,
        group: str,
        name: Callable[[], str],
        on_message: Callable[[Append | Install], Answer],
        on_put: Callable[[Kind, str, bytes | None, float, int], Awaitable[Position]],
    ) -> None:
        self._group = group
        self._name = name
        self._on_message = on_message
        self._on_put = on_put
        self._server: Any = None
        self._closing = asyncio.Event()

    async def start(self, host: str, tls: PeerTls | None, port: int = 0) -> int:
        """Listens on ``port`` of ``host`` (0: any) and gives it; raises ConfigError."""
        options = [*_OPTIONS, ("grpc.max_concurrent_streams", STREAMS_MAX)]
        self._server = grpc.aio.server(options=options)
        handlers = {
            "Follow": grpc.stream_stream_rpc_method_handler(self._follow),
            "Put": grpc.unary_unary_rpc_method_handler(self._put),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((handler,))
        where = endpoint(host, port)
        try:
            if tls is None:
                port = self._server.add_insecure_port(where)
            else:
                ca, cert, key = tls.read()
                port = self._server.add_secure_port(
                    where, grpc.ssl_server_credentials([(key, cert)], ca, True)
                )
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {where}: is it an address of this machine, and free?"
            ) from None
        await self._server.start()
        return int(port)

    async def close(self) -> None:
        """Ends the streams first: grpc would cancel their handlers, and print that."""
        self._closing.set()
        if self._server is not None:
            await self._server.stop(CLOSE_S)

    async def _follow(self, _: Any, context: Any) -> None:
        await self._admit(context)
        joiner = Joiner()
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            while (frame := await _unless(closing, context.read())) is not None:
                try:
                    message = joiner.take(frame)
                except ValueError as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                    return
                if message is None:
                    continue
                if isinstance(message, Answer):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "an answer is no message")
                    return
                await context.write(encode(self._on_message(message)))
        finally:
            closing.cancel()

    async def _put(self, request: bytes, context: Any) -> bytes:
        await self._admit(context)
        try:
            kind, key, value, term, until_s = decode_put(request)
            left_s = until_s - time.monotonic()
            if left_s <= 0:  # held up on its way: whoever asked may have gone on without it
                await context.abort(_CODES[NotPrimary.status], "this change comes too late")
            return encode_position(await self._on_put(kind, key, value, left_s, term))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except NoPrimary as error:
            await context.abort(_CODES[NotPrimary.status], str(error))
        except ServeError as error:
            await context.abort(_CODES.get(error.status, grpc.StatusCode.UNKNOWN), str(error))
        raise AssertionError("abort raises")

    async def _admit(self, context: Any) -> None:
        found = dict(context.invocation_metadata() or ())
        for key, mine in _metadata(self._group, self._name()):
            if found.get(key) != mine:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this is {mine}")


class Peers:
    """The primary's end: one link to each of the others, and calls that pass changes on."""

    def __init__(self, group: str, tls: PeerTls | None) -> None:
        """Raises ConfigError."""
        self._group = group
        self._credentials = None
        if tls is not None:
            ca, cert, key = tls.read()
            self._credentials = grpc.ssl_channel_credentials(ca, key, cert)
        self._channels: dict[str, Any] = {}
        """By address, for changes that are passed on."""

    async def close(self) -> None:
        """Ends the channels that changes go over."""
        while self._channels:
            await self._channels.popitem()[1].close(CLOSE_S)

    def channel(self, address: str) -> Any:
        options = list(_OPTIONS)
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self._credentials, options=options)

    async def put(
        self,
        name: str,
        address: str,
        change: tuple[Kind, str, bytes | None],
        timeout_s: float,
        term: int,
        until_s: float,
    ) -> Position | None:
        """Where the change stands; None if ``name`` is not the primary and has done nothing.

        It does not make it in another ``term``, nor after ``until_s`` by its own clock.

        Raises TooLarge, and Unavailable; it is not known then whether the change was made.
        """
        if address not in self._channels:
            if len(self._channels) == CHANNELS_MAX:
                await self._channels.pop(next(iter(self._channels))).close(CLOSE_S)
            self._channels[address] = self.channel(address)
        try:
            answer = await self._channels[address].unary_unary(f"/{SERVICE}/Put")(
                encode_put(*change, term, until_s),
                timeout=timeout_s,
                metadata=_metadata(self._group, name),
            )
            return decode_position(answer)
        except grpc.RpcError as error:
            code = error.code()
            if code in _NOTHING_DONE or str(error.details()).startswith(_UNREACHED):
                return None
            for kind in (TooLarge, Full):
                if code == _CODES[kind.status]:
                    raise kind(str(error.details())) from None
            raise Unavailable(
                f"the primary {name} did not confirm the change ({error.details()}), and "
                "whether it was made is not known"
            ) from None


class Link:
    """The primary's stream to one replica, connected again and again until ``close``.

    Args:
        message: what the replica is told next.
        on_answer: takes its answer; True if there is more to say at once.
    """

    def __init__(
        self,
        peers: Peers,
        group: str,
        name: str,
        address: str,
        message: Callable[[], Append | Install],
        on_answer: Callable[[Append | Install, Answer], bool],
    ) -> None:
        self._peers = peers
        self._metadata = _metadata(group, name)
        self._address = address
        self._message = message
        self._on_answer = on_answer
        self._more = asyncio.Event()
        self._closed = False
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link {name}")

    def wake(self) -> None:
        """There is something to say."""
        self._more.set()

    async def close(self) -> None:
        self._closed = True  # before Python 3.12, wait_for may swallow the cancellation
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while not self._closed:
            try:
                async with self._peers.channel(self._address) as channel:
                    while not self._closed:
                        await self._stream(channel)
                        await asyncio.sleep(RETRY_S)
            except Exception:  # a replica without its stream would never be in sync again
                log.exception("the stream to %s begins anew after a defect", self._address)
            await asyncio.sleep(RETRY_DEFECT_S)

    async def _stream(self, channel: Any) -> None:
        """Until it breaks."""
        call = channel.stream_stream(f"/{SERVICE}/Follow")(metadata=self._metadata)
        try:
            while not self._closed:
                await self._say(call)
        except (grpc.RpcError, asyncio.TimeoutError, asyncio.InvalidStateError, EOFError):
            pass
        finally:
            call.cancel()

    async def _say(self, call: Any) -> None:
        """One message, its answer, and the wait for the next."""
        self._more.clear()
        message = self._message()
        answer = await _exchange(call, message)
        if self._on_answer(message, answer):
            return
        timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._more.set)
        try:
            await self._more.wait()  # wait_for would make a task each time
        finally:
            timer.cancel()


async def _exchange(call: Any, message: Append | Install) -> Answer:
    for frame in frames(message):
        await _within(ANSWER_S, call.write(frame))
    data = await _within(ANSWER_S, call.read())
    if data is grpc.aio.EOF:
        raise EOFError
    try:
        answer = Joiner().take(data)
    except ValueError:
        raise EOFError from None
    if not isinstance(answer, Answer):
        raise EOFError
    return answer


async def _within(timeout_s: float, work: Awaitable[Any]) -> Any:
    doing = asyncio.ensure_future(work)
    doing.add_done_callback(_seen)
    return await asyncio.wait_for(doing, timeout_s)


async def _unless(ending: asyncio.Future[Any], reading: Awaitable[Any]) -> bytes | None:
    """What is read; None at the end of the stream, or once ``ending`` is done."""
    read = asyncio.ensure_future(reading)
    read.add_done_callback(_seen)
    try:
        await asyncio.wait((read, ending), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not read.done():
            read.cancel()
    if not read.done() or (data := read.result()) is grpc.aio.EOF:
        return None
    found: bytes = data
    return found


def _seen(future: asyncio.Future[Any]) -> None:
    """Its error is no news to who waits for it no longer."""
    if not future.cancelled():
        future.exception()
