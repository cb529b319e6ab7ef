"""One replica taking part in its group: the loop that carries out what ``seat`` decides.

It joins etcd (``member``), messages (``stream``) and the known deaths of others (``agent.peers``)
on one event loop. Whoever uses it is told what is acknowledged, what has changed the state, and
when this replica has become the primary or is one no longer.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from paddle_ft.agent.net import endpoint
from paddle_ft.agent.peers import PeerLinks
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.kv import TxnResult
from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve import elect
from paddle_ft.serve.broadcast import HOLD_S, Answer, Append, Install, Primary
from paddle_ft.serve.ledger import Bounds
from paddle_ft.serve.log import Entry, Kind, Position
from paddle_ft.serve.member import Member
from paddle_ft.serve.registry import Group, Keys, ReplicaRecord
from paddle_ft.serve.seat import PATIENCE_S, Deed, Seat
from paddle_ft.serve.stream import Link, Peers, PeerServer, PeerTls, is_loopback

log = logging.getLogger("paddle_ft")

TURN_S = 0.05


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """One replica of one group."""

    etcd: EtcdConfig
    group: str
    node: str
    """No two processes that live have the same node and place."""
    host: str = "127.0.0.1"
    """Under which the others reach it."""
    http_port: int = 0
    grpc_port: int = 0
    in_sync_min: int = 1
    """So many replicas, with the primary, must have a change before it is acknowledged; however
    many are in sync, all of them must."""
    patience_s: float = PATIENCE_S
    """How long a replica may be behind before nobody waits for it."""
    bounds: Bounds = field(default_factory=Bounds)
    """Of what the group keeps."""
    tls: PeerTls | None = None
    """Between replicas."""
    plain: bool = False
    """Without TLS, although ``host`` can be reached from other machines."""
    observe_s: float = HOLD_S
    """How long a primary whose lease has ended must have been silent, too, before another one
    takes its place."""
    place: str = "0"
    """Of the machine: there ``node`` is this process's alone."""
    listen: str = ""
    """Address to listen on for the others; empty: ``host``."""
    peer_port: int = 0
    """For the others' state, and the one after it to notice its death; 0: any two."""


class Listener(Protocol):
    """Who uses it."""

    def acknowledged(self, entries: Sequence[Entry]) -> None:
        """Of this primary's; only while ``Participant.leads()`` may anybody be told."""
        ...

    def applied(self, entries: Iterator[Entry]) -> None:
        """What has changed the state, in order; they may be taken later."""
        ...

    def role_changed(self) -> None: ...


class Participant:
    def __init__(
        self,
        settings: GroupSettings,
        listener: Listener,
        on_put: Callable[[Kind, str, bytes | None, float, int], Awaitable[Position]],
    ) -> None:
        """Opens nothing yet; raises ConfigError."""
        listens = settings.listen or settings.host
        if settings.tls is None and not settings.plain and not is_loopback(listens):
            raise ConfigError(
                f"replicas on {listens} would talk to each other without TLS: give "
                "certificates, or say that the network is trusted"
            )
        self._settings = settings
        self._listener = listener
        self.member = Member(settings.etcd, settings.group, self._wake_soon)
        self.peers = Peers(settings.group, settings.tls)
        self.seat = self._new_seat()
        self._server = PeerServer(settings.group, lambda: self.seat.name, self._hear, on_put)
        self._watched: PeerLinks | None = None
        self._links: dict[str, Link] = {}
        self._record = ReplicaRecord(
            self.seat.name, settings.host, settings.http_port, settings.grpc_port, 0
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: tuple[ReplicaRecord, Position, tuple[str, ...]] | None = None
        self._was: Primary | None = None
        self._wake = asyncio.Event()
        self._changes: set[asyncio.Future[None]] = set()
        self._run_task: asyncio.Task[None] | None = None
        self._deed: asyncio.Task[None] | None = None
        self._closing_links: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="serving group")
        self._closing = False

    def _new_seat(self) -> Seat:
        s = self._settings
        name = f"{s.node}.{s.place}-{uuid.uuid4().hex[:12]}"
        return Seat(name, Keys(s.group), s.in_sync_min, s.patience_s, s.observe_s)

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Listens, registers, and takes part from now on; raises CoordinationError, ConfigError."""
        self._loop = asyncio.get_running_loop()
        s = self._settings
        port = await self._server.start(s.listen or s.host, s.tls, s.peer_port)
        link_port = s.peer_port + 1 if s.peer_port else 0
        try:
            self._watched = PeerLinks(
                s.host, self.member.coordinator, self._is_dead, listen=s.listen, port=link_port
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {endpoint(s.listen or s.host, link_port)}: {error.strerror}"
            ) from None
        self._watched.watch(self.seat.name, {})
        self._record = replace(self._record, peer_port=port, link=self._watched.address)
        await self.in_thread(self.member.start, self._record)
        self._run_task = self._loop.create_task(self._run())
        self._run_task.add_done_callback(_tell_end)

    async def close(self) -> None:
        """Leaves the group at once. Waits for etcd."""
        self._closing = True
        self._wake.set()
        if self._run_task is not None:
            await asyncio.wait([self._run_task])
        self.seat.leave()
        self._settle()
        await asyncio.gather(*self._closing_links)
        await self.in_thread(self.member.close)
        if self._watched is not None:
            self._watched.close()
        await self._server.close()
        await self.peers.close()
        self._threads.shutdown(wait=False)

    async def in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    # ------------------------------------------------------------ for who uses it

    @property
    def group(self) -> Group:
        return self.seat.group

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done once it takes part no longer; with an exception if by a defect."""
        assert self._run_task is not None
        return self._run_task

    def leads(self) -> bool:
        """Whether this replica may answer changes now."""
        if self._run_task is not None and self._run_task.done():
            return False
        deadline_s = self.member.deadline_s(self.seat.group.primary_lease)
        return self.seat.leads(time.monotonic(), deadline_s)

    def put(self, kind: Kind, key: str, value: bytes | None) -> Entry:
        """The primary's: takes a change in and sends it. ``acknowledged`` tells when it is done,
        unless that is so at once: call ``advance`` when you are ready for it."""
        entry = self.seat.put(kind, key, value)
        for link in self._links.values():
            link.wake()
        return entry

    def advance(self) -> None:
        if self.seat.primary is not None:
            self._took(self.seat.primary.advance())

    def tell(self, **changes: Any) -> None:
        """Sets fields of this replica's record."""
        self._record = replace(self._record, **changes)
        self._wake.set()

    async def change(self, until_s: float) -> bool:
        """Waits for a change of the group or of the role; False if there is none in time."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.add(waiting)
        try:
            await asyncio.wait_for(waiting, max(0.0, until_s - time.monotonic()))
            return True
        except asyncio.TimeoutError:
            return False
        finally:
            self._changes.discard(waiting)

    # ------------------------------------------------------------ from other threads

    def _wake_soon(self) -> None:
        self._soon(self._wake.set)

    def _is_dead(self, name: str) -> None:
        self._soon(self._note_death, name)

    def _soon(self, call: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(call, *args)

    def _note_death(self, name: str) -> None:
        self.seat.died(name)
        self._wake.set()

    # ------------------------------------------------------------ turns

    async def _run(self) -> None:
        while not self._closing:
            self._turn()
            timer = asyncio.get_running_loop().call_later(TURN_S, self._wake.set)
            await self._wake.wait()  # wait_for would make a task each time
            timer.cancel()
            self._wake.clear()
        if self._deed is not None:
            await self._deed

    def _turn(self) -> None:
        seat, now_s = self.seat, time.monotonic()
        self.member.turned()
        before = seat.group
        self._took(seat.saw(self.member.group(), now_s))
        if seat.group is not before:
            self._follow(seat.group)
        if seat.replica.undone:
            self._begin_anew()
            return
        if self._deed is None or self._deed.done():
            deed = seat.due(now_s, self.member.lease, time.time())
            if deed is not None:
                self._deed = asyncio.get_running_loop().create_task(self._do(deed))
        self._settle()
        now = (self._record, seat.replica.log.last, seat.outlived)
        if now != self._told:
            self._told, (record, last, outlived) = now, now
            self.member.tell(
                replace(record, term=last.term, sequence=last.sequence, outlived=outlived)
            )

    def _follow(self, group: Group) -> None:
        """The group has changed."""
        for name in elect.outlived(self.seat.name, group.replicas):
            if name not in self.seat.dead:  # its lease need not run out
                self.seat.died(name)
                log.info("%s has ended: this process has taken its place", name)
                self._threads.submit(self.member.end, group.leases[name])
        if self._watched is not None:
            links = {n: (r.link, group.leases[n]) for n, r in group.replicas.items()}
            self._watched.watch(self.seat.name, links)
        self._tell_change()

    def _tell_change(self) -> None:
        for waiting in self._changes:
            if not waiting.done():
                waiting.set_result(None)

    async def _do(self, deed: Deed) -> None:
        """One transaction; its outcome goes to the seat it was decided at."""
        seat = self.seat
        result: TxnResult | None = await self.in_thread(self.member.transact, deed.transaction)
        succeeded = None if result is None else result.succeeded
        revision = 0 if result is None else result.revision
        log.debug("%s: %s %s", seat.name, deed.kind, succeeded)
        if succeeded and deed.kind in ("begin", "force"):
            _tell_loss(seat, deed)
        if seat is self.seat:
            self._took(seat.ended(deed, succeeded, revision))
            self._wake.set()

    def _took(self, entries: Sequence[Entry]) -> None:
        """``entries`` are acknowledged by this primary."""
        if entries:
            self._listener.acknowledged(entries)
            for link in self._links.values():
                link.wake()
        self._settle()

    def _settle(self) -> None:
        """After whatever may have changed the state or the role."""
        primary = self.seat.primary
        self._listener.applied(self.seat.replica.fresh())
        if primary is not self._was:
            self._was = primary
            for link in self._take_links(set()):
                self._let_go(link)
            if primary is not None:
                log.info("%s is the primary, term %d", self.seat.name, primary.term)
            self._listener.role_changed()
            self._tell_change()
        if primary is not None:
            self._hold_links()

    def _begin_anew(self) -> None:
        """A forced promotion has lost changes that this replica has: it begins without them."""
        old = self.seat.replica.state.items
        log.warning("%s begins anew: a forced promotion has lost changes", self.seat.name)
        gone = [Entry(Position(), kind, key, None) for kind, key in old]
        group, dead = self.seat.group, self.seat.dead
        self.seat = self._new_seat()
        self.seat.saw(group, time.monotonic())
        self.seat.died(*dead)
        self._listener.applied(iter(gone))
        self._record = replace(self._record, name=self.seat.name)
        self.member.tell(self._record)
        self._settle()

    # ------------------------------------------------------------ messages

    def _hear(self, message: Append | Install) -> Answer:
        answer = self.seat.hear(message, time.monotonic())
        self._settle()
        if self.seat.replica.undone:
            self._wake.set()
        return answer

    def _hold_links(self) -> None:
        """One to each other replica that is registered."""
        replicas = self.group.replicas
        others = replicas.keys() - {self.seat.name} - self.seat.dead
        if others == self._links.keys():
            return
        for link in self._take_links(others):
            self._let_go(link)
        for name in others - self._links.keys():
            self._links[name] = self._link(replicas[name])

    def _link(self, record: ReplicaRecord) -> Link:
        primary, name = self.seat.primary, record.name
        assert primary is not None

        def message() -> Append | Install:
            return primary.message(name, time.monotonic())

        def on_answer(message: Append | Install, answer: Answer) -> bool:
            if self.seat.primary is not primary:
                return False
            self._took(self.seat.answered(answer, time.monotonic()))
            if self.seat.handing_over:  # it may be due now
                self._wake.set()
            known = message.acknowledged if isinstance(message, Append) else 0
            return not primary.told(name) or known < primary.acknowledged

        address = endpoint(record.host, record.peer_port)
        return Link(self.peers, self._settings.group, name, address, message, on_answer)

    def _take_links(self, kept: set[str]) -> list[Link]:
        return [self._links.pop(name) for name in self._links.keys() - kept]

    def _let_go(self, link: Link) -> None:
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing_links.add(task)
        task.add_done_callback(self._closing_links.discard)


def _tell_loss(seat: Seat, deed: Deed) -> None:
    if deed.in_sync:
        how = "it was forced" if deed.kind == "force" else "all of them have ended"
        log.warning(
            "%s becomes the primary without the changes that only %s had: %s",
            seat.name,
            ", ".join(sorted(deed.in_sync)),
            how,
        )


def _tell_end(task: asyncio.Task[None]) -> None:
    """The turns have ended by themselves: the lease is renewed no longer, and the others go on."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        defect = None if isinstance(error, PaddleFTError) else error
        log.critical("this replica takes part no longer: %s", error, exc_info=defect)
