"""A replica of a serving group on the virtual clock: the product's decisions, modelled hands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paddle_ft.coordination.kv import Snapshot, Transaction
from paddle_ft.errors import EtcdUnavailable, LeaseLost
from paddle_ft.serve import elect, registry
from paddle_ft.serve.broadcast import Answer, Append, Install
from paddle_ft.serve.log import Entry, Position
from paddle_ft.serve.registry import Keys, ReplicaRecord
from paddle_ft.serve.seat import Deed, Seat
from tests.sim.clock import Process
from tests.sim.network import Sent
from tests.sim.task import Steps, Task

if TYPE_CHECKING:
    from tests.sim.serve.group import Group

TTL_S = 2
RENEW_S = 0.5
LOOK_S = 0.1
TURN_S = 0.05
MARGIN_S = 0.3
LEAVE_S = 2.0
KEPT = 8
"""Few, so that newcomers begin with an image."""
KEYS = Keys("g")


class Server:
    """One incarnation of one replica; it is killed, and another one with its name begins anew."""

    def __init__(self, group: Group, node: str, incarnation: int) -> None:
        self.group = group
        self.node = node
        self.name = f"{node}.x-{incarnation}"
        self.process = Process(group.clock, self.name)
        self.seat = Seat(self.name, KEYS, group.in_sync_min)
        self.seat.replica.kept = KEPT
        self.waiting: dict[int, list[tuple[Any, ...]]] = {}
        """By sequence: whom to tell that it is acknowledged."""
        self.reads: list[tuple[Position, Any, str]] = []
        """What to wait for, whom to tell, key."""
        self.leaving = False
        self.lease = 0
        self.renewed_s = float("-inf")
        for steps in (self._keep_lease, self._look, self._turn):
            Task(self.process, steps)

    @property
    def now(self) -> float:
        return self.group.clock.now

    @property
    def leads(self) -> bool:
        if self.group.without == "deadline":
            return self.seat.primary is not None and not self.seat.primary.deposed
        return self.seat.leads(self.now, self.renewed_s + TTL_S - MARGIN_S)

    # ------------------------------------------------------------ etcd

    def _keep_lease(self, task: Task) -> Steps:
        network = self.group.network
        while True:
            sent_s = self.now
            try:
                if not self.lease:
                    self.lease = yield network.call(task, self.node, lambda e: e.grant(TTL_S))
                    yield self._register(task)
                    self.renewed_s = sent_s
                elif (yield network.call(task, self.node, lambda e: e.keep_alive(self.lease))):
                    self.renewed_s = sent_s
                    yield self._register(task)  # where its log ends now
                else:
                    raise LeaseLost("it has ended")
            except LeaseLost:  # what it holds is what it held: the name stays
                self.lease, self.renewed_s = 0, float("-inf")
                continue
            except EtcdUnavailable:
                pass
            yield task.sleep(RENEW_S)

    def _register(self, task: Task) -> Any:
        last = self.seat.replica.log.last
        record = ReplicaRecord(
            self.name,
            "h",
            1,
            2,
            3,
            condition="draining" if self.leaving else "ready",
            term=last.term,
            sequence=last.sequence,
            outlived=self._outlived(),
        )
        txn = registry.register(KEYS, record, self.lease)
        return self.group.network.transact(task, self.node, txn, Sent(self.name, "register"))

    def _outlived(self) -> tuple[str, ...]:
        in_sync = self.seat.group.in_sync
        if self.group.without == "outlived" and in_sync is not None:  # who is away has ended
            return tuple(n for n in in_sync.names if n not in self.seat.group.replicas)
        return self.seat.outlived

    def _look(self, task: Task) -> Steps:
        """What the product's watch brings; here it is read again and again."""
        prefix = KEYS.prefix
        while True:
            try:
                view = yield self.group.network.call(task, self.node, lambda e: e.read(prefix))
                self._saw(view)
            except EtcdUnavailable:
                pass
            yield task.sleep(LOOK_S)

    def _saw(self, view: Snapshot) -> None:
        group = registry.parse(KEYS, view.kvs, view.revision)
        for name in elect.outlived(self.name, group.replicas):
            if name not in self.seat.dead:
                self.seat.died(name)
                self.group.network.etcd.revoke(group.leases[name])
        if self.group.without == "hold":
            self.seat._heard_s = float("-inf")
        before = self.seat.primary
        self._acknowledge(self.seat.saw(group, self.now))
        primary = self.seat.primary
        if primary is not before:
            self.waiting.clear()
            if primary is not None:
                self.group.history.leads(self.name, primary.term)

    # ------------------------------------------------------------ turns

    def _turn(self, task: Task) -> Steps:
        while True:
            deed = self._due()
            if self.seat.primary is None:
                self.waiting.clear()
            else:
                self._broadcast()
            if deed is not None:
                yield from self._do(task, deed)
            yield task.sleep(TURN_S)

    def _due(self) -> Deed | None:
        seat = self.seat
        group = seat.group
        if self.group.without == "election" and seat.primary is None:  # anybody stands
            seat.group = replace(group, in_sync=None)
        deed = seat.due(self.now, self.lease)
        seat.group = group
        return deed

    def _do(self, task: Task, deed: Deed) -> Steps:
        primary = self.seat.primary
        term = primary.term if primary is not None else 0
        sent = Sent(self.name, deed.kind, term)
        txn = self._weakened(deed)
        try:
            result = yield self.group.network.transact(task, self.node, txn, sent)
        except (EtcdUnavailable, LeaseLost) as error:
            known = isinstance(error, LeaseLost)
            if self.group.without == "unknown" and self.seat.primary is not None:
                self.seat.primary.proposed = None  # as if it had not taken effect
            self.seat.ended(deed, False if known else None, 0)
            return
        if deed.kind == "hand_over" and result.succeeded:
            self.group.count("handed over")
        self._acknowledge(self.seat.ended(deed, result.succeeded, result.revision))

    def _weakened(self, deed: Deed) -> Transaction:
        """Without the comparison that is to be left out."""
        kind, _, key = self.group.without.partition("/")
        txn = deed.transaction
        if kind != deed.kind:
            return txn
        kept = tuple(c for c in txn.compares if not c.key.endswith(key))
        assert len(kept) < len(txn.compares), f"{kind} does not compare {key}"
        return replace(txn, compares=kept)

    def _broadcast(self) -> None:
        primary = self.seat.primary
        assert primary is not None
        for name in self.seat.group.replicas:
            if name != self.name:
                self.group.send(self, name, primary.message(name, self.now))

    # ------------------------------------------------------------ leaving

    def leave(self) -> None:
        """As the product does: it hands over, to one after another, and goes then."""
        self.leaving = True
        Task(self.process, self._leave)

    def _leave(self, task: Task) -> Steps:
        refused: set[str] = set()
        until_s = self.now + LEAVE_S
        while self.seat.primary is not None and self.now < until_s:
            promote = self.seat.group.promote
            if promote is not None and promote.refused:
                refused.add(promote.target)
            if promote is None or promote.refused:
                target = elect.next_primary(self.seat.group, refused)
                if target is not None:
                    self.group.ask_for(target)
            yield task.sleep(0.2)
        self.group.count("left with a successor" if self.seat.primary is None else "left alone")
        if self.seat.primary is None:
            self.group.network.etcd.revoke(self.lease)
            self.group.restart(self)
        else:
            self.leaving = False  # as a person who waits for another replica first

    # ------------------------------------------------------------ messages

    def hear(self, sender: str, message: Append | Install | Answer) -> None:
        if isinstance(message, Answer):
            self._acknowledge(self.seat.answered(message, self.now))
            return
        if self.group.without == "terms":
            self.seat.replica.term = 0
        if isinstance(message, Install):
            self.group.count("installed")
        self.group.send(self, sender, self.seat.hear(message, self.now))
        if self.seat.replica.undone:
            self.group.history.undone(self.name)
            self.group.count("began without what was lost")
            self.group.restart(self)
        self._answer_reads()

    def put(self, client: Any, key: str, value: bytes) -> None:
        primary = self.seat.primary
        if primary is None or not self.leads or not primary.accepts or self.seat.handing_over:
            return client.refused()
        entry = self.seat.put("state", key, value)
        self.waiting.setdefault(entry.at.sequence, []).append((client, entry))
        if self.group.without == "replicas":  # acknowledged once the primary has it
            primary.acknowledged = entry.at.sequence
            self._acknowledge(self.seat.replica.apply(entry.at.sequence))
        else:
            self._acknowledge(primary.advance())
        return None

    def get(self, client: Any, key: str, at_least: Position) -> None:
        self.reads.append((at_least, client, key))
        self._answer_reads()

    def _acknowledge(self, entries: Any) -> None:
        for entry in entries:
            for client, mine in self.waiting.pop(entry.at.sequence, ()):
                assert isinstance(mine, Entry)
                if self.leads and self.seat.primary is not None:
                    term = self.seat.primary.term
                    if self.group.history.acknowledged(self.name, term, mine):
                        client.done(mine)
        self.seat.replica.fresh.clear()
        self._answer_reads()

    def _answer_reads(self) -> None:
        waiting, self.reads = self.reads, []
        at = self.seat.replica.state.at
        for least, client, key in waiting:
            there = at.term >= least.term and at.sequence >= least.sequence
            if self.group.without != "reads" and not there:
                self.reads.append((least, client, key))
                continue
            held = self.seat.replica.state.items.get(("state", key))
            client.read(held.value if held else b"0")
