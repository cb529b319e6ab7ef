"""A replica of a serving group on the virtual clock: the product's decisions, modelled hands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from paddle_ft.coordination.kv import Compare, Put, Snapshot, Transaction
from paddle_ft.errors import EtcdUnavailable, LeaseLost
from paddle_ft.serve.broadcast import Answer, Append, Install, Primary, Replica
from paddle_ft.serve.elect import Candidate, Election, stands
from paddle_ft.serve.log import Entry, Position
from tests.sim.clock import Process
from tests.sim.network import Sent
from tests.sim.task import Steps, Task

if TYPE_CHECKING:
    from tests.sim.serve.group import Group

TTL_S = 2
RENEW_S = 0.5
LOOK_S = 0.1
TURN_S = 0.05
PATIENCE_S = 0.6
MARGIN_S = 0.3
PREFIX = "/g/"
PRIMARY = PREFIX + "primary"
IN_SYNC = PREFIX + "in_sync"
REPLICAS = PREFIX + "replicas/"


class Server:
    """One incarnation of one replica; it is killed, and another one with its name begins anew."""

    def __init__(self, group: Group, node: str, incarnation: int) -> None:
        self.group = group
        self.node = node
        self.name = f"{node}.{incarnation}"
        self.process = Process(group.clock, self.name)
        self.replica = Replica(self.name)
        self.primary: Primary | None = None
        self.waiting: dict[int, list[tuple[Any, ...]]] = {}
        """By sequence: whom to tell that it is acknowledged."""
        self.reads: list[tuple[int, Any, str]] = []
        """Sequence to wait for, whom to tell, key."""
        self.lease = 0
        self.renewed_s = float("-inf")
        self.view = Snapshot(0, ())
        self.vacant_since_s = 0.0
        self.writing = False
        for steps in (self._keep_lease, self._look, self._turn):
            Task(self.process, steps)

    @property
    def now(self) -> float:
        return self.group.clock.now

    @property
    def leads(self) -> bool:
        """It may answer writes: it is the primary, and its lease cannot have ended."""
        in_time = self.now < self.renewed_s + TTL_S - MARGIN_S
        return self.primary is not None and not self.primary.deposed and in_time

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
                self.lease = 0
                continue
            except EtcdUnavailable:
                pass
            yield task.sleep(RENEW_S)

    def _register(self, task: Task) -> Any:
        last = self.replica.log.last
        value = json.dumps([last.term, last.sequence]).encode()
        put = Put(REPLICAS + self.name, value, self.lease)
        return self.group.network.transact(
            task, self.node, Transaction((), (put,)), Sent(self.name, "register")
        )

    def _look(self, task: Task) -> Steps:
        """What the product's watch brings; here it is read again and again."""
        while True:
            try:
                view = yield self.group.network.call(task, self.node, lambda e: e.read(PREFIX))
                self._saw(view)
            except EtcdUnavailable:
                pass
            yield task.sleep(LOOK_S)

    def _saw(self, view: Snapshot) -> None:
        if view.revision < self.view.revision:
            return
        before = self._key(PRIMARY)
        self.view = view
        kv = self._key(PRIMARY)
        if kv is None and before is not None:
            self.vacant_since_s = self.now
        leading = kv is not None and kv.value.decode() == self.name
        if self.primary is not None and not (
            leading and kv is not None and kv.create_revision == self.primary.term
        ):
            self._step_down()
        if leading and kv is not None and self.primary is None:
            term = kv.create_revision
            if term > self.replica.log.last.term and term >= self.replica.term:
                members = self._members()
                assert members is not None
                minimum = self.group.in_sync_min
                self.primary = Primary(self.replica, term, members, minimum, self.now)
                self.group.history.leads(self.name, term)
        if self.primary is not None and self.primary.proposed is not None:
            members = self._members()
            if members == self.primary.proposed:
                self._acknowledge(self.primary.recorded_is(members))

    def _key(self, key: str) -> Any:
        return next((kv for kv in self.view.kvs if kv.key == key), None)

    def _members(self) -> frozenset[str] | None:
        kv = self._key(IN_SYNC)
        return None if kv is None else frozenset(json.loads(kv.value))

    def _live(self) -> dict[str, Candidate]:
        found = {}
        for kv in self.view.kvs:
            if kv.key.startswith(REPLICAS):
                name = kv.key.removeprefix(REPLICAS)
                found[name] = Candidate(name, Position(*json.loads(kv.value)), True)
        return found

    def _step_down(self) -> None:
        self.primary = None
        self.waiting.clear()

    # ------------------------------------------------------------ turns

    def _turn(self, task: Task) -> Steps:
        while True:
            try:
                if self.primary is not None and self.primary.deposed:
                    self._step_down()
                if self.primary is None:
                    yield from self._stand(task)
                else:
                    self._broadcast()
                    yield from self._record(task)
            except (EtcdUnavailable, LeaseLost):
                pass
            yield task.sleep(TURN_S)

    def _stand(self, task: Task) -> Steps:
        members = self._members()
        holder = self._key(PRIMARY)
        seen = Election(
            self.name,
            self._live(),
            None if self.group.without == "election" else members,
            holder.value.decode() if holder else "",
            self.vacant_since_s,
        )
        if not self.lease or not self.view.revision or not stands(seen, self.now):
            return
        kv = self._key(IN_SYNC)
        compares = [Compare(PRIMARY, "create_revision", 0)]
        if self.group.without != "campaign":
            compares.append(Compare(IN_SYNC, "mod_revision", kv.mod_revision if kv else 0))
        puts = [Put(PRIMARY, self.name.encode(), self.lease)]
        if members is None:
            puts.append(Put(IN_SYNC, json.dumps([self.name]).encode()))
        txn = Transaction(tuple(compares), tuple(puts))
        yield self.group.network.transact(task, self.node, txn, Sent(self.name, "campaign"))

    def _broadcast(self) -> None:
        assert self.primary is not None
        for name in self._live():
            if name != self.name:
                self.group.send(self, name, self.primary.message(name, self.now))

    def _record(self, task: Task) -> Steps:
        primary = self.primary
        assert primary is not None
        if not primary.record_due(self._live(), self.now, PATIENCE_S):
            return
        kv = self._key(IN_SYNC)
        proposed = primary.proposed
        assert proposed is not None
        compares = [Compare(PRIMARY, "create_revision", primary.term)]
        if self.group.without != "fence":
            compares.append(Compare(IN_SYNC, "mod_revision", kv.mod_revision))
        else:
            compares = []
        put = Put(IN_SYNC, json.dumps(sorted(proposed)).encode())
        txn = Transaction(tuple(compares), (put,))
        sent = Sent(self.name, "record", primary.term)
        try:
            result = yield self.group.network.transact(task, self.node, txn, sent)
        except EtcdUnavailable:
            if self.group.without == "unknown":  # as if it had not taken effect
                primary.proposed = None
            raise
        if result.succeeded and self.primary is primary:
            self._acknowledge(primary.recorded_is(proposed))

    # ------------------------------------------------------------ messages

    def hear(self, sender: str, message: Append | Install | Answer) -> None:
        if isinstance(message, Answer):
            if self.primary is not None:
                self._acknowledge(self.primary.hear(message, self.now))
            return
        if self.group.without == "terms":
            self.replica.term = 0
        if self.primary is not None and message.term < self.primary.term:
            self.group.send(self, sender, Answer(self.primary.term, self.name, False, 0))
            return
        self.group.send(self, sender, self.replica.hear(message))
        self._answer_reads()

    def put(self, client: Any, key: str, value: bytes) -> None:
        if not self.leads or self.primary is None or not self.primary.accepts:
            return client.refused()
        entry = self.primary.put("state", key, value)
        self.waiting.setdefault(entry.at.sequence, []).append((client, entry))
        if self.group.without == "replicas":  # acknowledged once the primary has it
            self.primary.acknowledged = entry.at.sequence
            self._acknowledge(self.replica.state.apply(self.primary.log, entry.at.sequence))
        else:
            self._acknowledge(self.primary.advance())
        return None

    def get(self, client: Any, key: str, sequence: int) -> None:
        self.reads.append((sequence, client, key))
        self._answer_reads()

    def _acknowledge(self, entries: Any) -> None:
        for entry in entries:
            for client, mine in self.waiting.pop(entry.at.sequence, ()):
                assert isinstance(mine, Entry)
                if self.leads and self.primary is not None:
                    self.group.history.acknowledged(self.name, self.primary.term, mine)
                    client.done(mine)
        self._answer_reads()

    def _answer_reads(self) -> None:
        waiting, self.reads = self.reads, []
        for sequence, client, key in waiting:
            if self.group.without != "reads" and self.replica.state.at.sequence < sequence:
                self.reads.append((sequence, client, key))
                continue
            held = self.replica.state.items.get(("state", key))
            client.read(held.value if held else b"0")
