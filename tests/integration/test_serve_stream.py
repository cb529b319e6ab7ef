"""The broadcast over real gRPC: TLS both ways, who is sent away, bytes that are no message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError
from paddle_ft.serve import stream
from paddle_ft.serve.broadcast import Answer, Append, Install, Primary, Replica
from paddle_ft.serve.log import Kind, Position
from paddle_ft.serve.participant import GroupSettings
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.stream import SERVICE, Link, Peers, PeerServer, PeerTls
from paddle_ft.serve.types import Full, NotPrimary, TooLarge, Unavailable
from tests.integration.authority import HOST, Authority


def tls(authority: Authority, who: str) -> PeerTls:
    authority.issue(who)
    return PeerTls(*(authority.file(name) for name in ("ca.crt", f"{who}.crt", f"{who}.key")))


def later() -> float:
    return time.monotonic() + 5.0


async def refuse(
    kind: Kind, key: str, value: bytes | None, timeout_s: float, term: int
) -> Position:
    if key == "other":
        raise NotPrimary("c.1", "h:1")
    if key == "nobody":
        raise Unavailable("there is no primary")
    if key == "large":
        raise TooLarge("a value has at most")
    if key == "full":
        raise Full("the state would exceed")
    return Position(3, len(value or b""))


@asynccontextmanager
async def follower(secure: PeerTls | None = None) -> AsyncIterator[tuple[Replica, str]]:
    """A replica b.1 of the group g, and its address."""
    replica = Replica("b.1")
    server = PeerServer("g", lambda: "b.1", replica.hear, refuse)
    port = await server.start(HOST, secure)
    try:
        yield replica, f"{HOST}:{port}"
    finally:
        await server.close()


class Leader:
    """The primary a.1, which writes to b.1."""

    def __init__(self, address: str, secure: PeerTls | None = None, name: str = "b.1") -> None:
        self.primary = Primary(Replica("a.1"), 3, ["a.1", "b.1"], 2, 0.0)
        self.link = Link(Peers("g", secure), "g", name, address, self._message, self._answered)

    def _message(self) -> Append | Install:
        return self.primary.message("b.1", 0.0)

    def _answered(self, message: Append | Install, answer: Answer) -> bool:
        self.primary.hear(answer, 0.0)
        known = message.acknowledged if isinstance(message, Append) else 0
        return not self.primary.told("b.1") or known < self.primary.acknowledged

    async def write(self, *values: bytes) -> None:
        for number, value in enumerate(values):
            self.primary.put("state", f"k{number}", value)
        self.link.wake()


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), timeout_s)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_an_image_that_is_larger_than_a_frame_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    made = stream.frames

    def frames(message: Append | Install) -> Iterator[bytes]:
        for frame in made(message):
            written.append(len(frame))
            yield frame

    monkeypatch.setattr(stream, "frames", frames)

    async def work() -> None:
        async with follower() as (replica, address):
            before = Replica("a.1", kept=0)
            early = Primary(before, 2, ["a.1"], 1, 0.0)
            for number in range(8):
                early.put("state", f"k{number}", bytes([number]) * 2**20)
                early.advance()
            assert not before.log.entries  # all that is held is the state
            leader = Leader(address)
            leader.primary = Primary(before, 3, ["a.1", "b.1"], 2, 0.0)
            await leader.write(b"after")
            await until(lambda: leader.primary.acknowledged == 9 and replica.state.at.sequence == 9)
            assert replica.state.items == before.state.items
            assert replica.state.terms == before.state.terms == [Position(2, 1), Position(3, 9)]
            assert sum(size > 2**20 for size in written) == 8  # one by one
            await leader.link.close()

    run(work)


def test_a_stream_is_begun_anew_after_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "RETRY_DEFECT_S", 0.01)

    async def work() -> None:
        async with follower() as (replica, address):
            leader = Leader(address)
            good = leader.primary.message

            def defect(name: str, now_s: float) -> Append | Install:
                leader.primary.message = good  # type: ignore[method-assign]
                raise ZeroDivisionError

            leader.primary.message = defect  # type: ignore[method-assign]
            await leader.write(b"v")
            await until(lambda: replica.state.at.sequence == 1)
            await leader.link.close()

    run(work)


def test_a_server_ends_its_streams_quietly(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        async with follower() as (replica, address):
            leader = Leader(address)
            await leader.write(b"v")
            await until(lambda: replica.state.at.sequence == 1)
        await leader.link.close()

    run(work)
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR", "CRITICAL")]
    assert "Error" not in capfd.readouterr().err


def test_with_tls_only_those_of_one_authority_talk(tmp_path: Path) -> None:
    ours, theirs = Authority.make(tmp_path / "ours"), Authority.make(tmp_path / "theirs")
    mine, other = tls(ours, "a"), tls(theirs, "x")

    async def work() -> None:
        async with follower(tls(ours, "b")) as (replica, address):
            leader = Leader(address, mine)
            await leader.write(b"v")
            await until(lambda: replica.state.at.sequence == 1)
            await leader.link.close()
            for secure in (other, None):
                peers = Peers("g", secure)  # nothing was done
                assert (
                    await peers.put("b.1", address, ("state", "k", b"v"), 2.0, 3, later()) is None
                )
            assert await Peers("g", mine).put("b.1", address, ("state", "k", b"v"), 5.0, 3, later())

    run(work)


def test_files_that_are_no_certificates_are_named(tmp_path: Path) -> None:
    good = tls(Authority.make(tmp_path / "ours"), "a")
    with pytest.raises(ConfigError, match="nowhere"):
        Peers("g", PeerTls("nowhere", good.cert_file, good.key_file))
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(ConfigError, match="PEM"):
        Peers("g", PeerTls(good.ca_file, str(tmp_path / "text"), good.key_file))


def test_on_other_addresses_tls_must_be_given_or_refused_by_name() -> None:
    etcd = EtcdConfig(endpoints=("127.0.0.1:1",))
    with pytest.raises(ConfigError, match="without TLS"):
        Replicated(GroupSettings(etcd, "g", "n0", host="192.0.2.1"))
    Replicated(GroupSettings(etcd, "g", "n0", host="192.0.2.1", plain=True))


def test_who_comes_for_somebody_else_is_sent_away() -> None:
    async def work() -> None:
        async with follower() as (replica, address):
            leader = Leader(address, name="b.0")  # the process that was here before
            await leader.write(b"v")
            for group, name in (("g", "b.0"), ("h", "b.1")):
                peers = Peers(group, None)  # nothing was done
                assert await peers.put(name, address, ("state", "k", b"v"), 5.0, 3, later()) is None
            assert replica.log.last == Position()
            await leader.link.close()

    run(work)


def test_a_change_is_passed_on_and_its_refusal_comes_back() -> None:
    async def work() -> None:
        async with follower() as (_, address):
            peers = Peers("g", None)

            async def put(key: str, until_s: float | None = None) -> Position | None:
                change: tuple[Kind, str, bytes] = ("state", key, b"four")
                return await peers.put("b.1", address, change, 5.0, 3, until_s or later())

            assert await put("k") == Position(3, 4)
            assert await put("k", time.monotonic()) is None  # too late: it was not made
            assert await put("other") is None  # nothing was done: ask whoever is the primary
            with pytest.raises(Unavailable):
                await put("nobody")
            with pytest.raises(Full, match="would exceed"):
                await put("full")
            with pytest.raises(TooLarge, match="at most") as caught:
                await put("large")
            assert caught.type is TooLarge
            await peers.close()

    run(work)


def test_bytes_that_are_no_message_end_the_stream_and_nothing_else() -> None:
    async def work() -> None:
        async with follower() as (replica, address):
            metadata = (("paddle-ft-group", "g"), ("paddle-ft-replica", "b.1"))
            for data in (b"", b"\xff" * 50, b"\x02" + b"\0" * 29, b"\x03" + b"x" * 100):
                async with grpc.aio.insecure_channel(address) as channel:
                    call: Any = channel.stream_stream(f"/{SERVICE}/Follow")(metadata=metadata)
                    await call.write(data)
                    if data[:1] == b"\x03":  # a part, and then something else
                        await call.write(b"\0")
                    with pytest.raises(grpc.RpcError) as caught:
                        await call.read()
                    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            leader = Leader(address)
            await leader.write(b"v")
            await until(lambda: replica.state.at.sequence == 1)
            await leader.link.close()

    run(work)


def test_what_is_too_large_is_refused_before_it_is_sent() -> None:
    async def work() -> None:
        group = Replicated(GroupSettings(EtcdConfig(endpoints=("127.0.0.1:1",)), "g", "n0"))
        with pytest.raises(TooLarge, match="value"):
            await group.put("state", "k", b"x" * (2**21 + 1))
        with pytest.raises(TooLarge, match="key"):
            await group.put("state", "k" * 513, b"")
        with pytest.raises(Unavailable, match="no primary"):
            await group.put("state", "k", b"")
        with pytest.raises(Unavailable):
            await group.get("state", "k", at_least=Position(1, 1), timeout_s=0.01)

    run(work)
