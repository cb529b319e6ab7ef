"""A replica of a serving group on the virtual clock: the product's decisions, modelled hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paddle_ft.coordination.kv import Snapshot, Transaction
from paddle_ft.errors import EtcdUnavailable, LeaseLost
from paddle_ft.serve import elect, registry
from paddle_ft.serve.broadcast import Answer, Append, Install, Primary
from paddle_ft.serve.log import Entry, Kind, Position
from paddle_ft.serve.registry import Keys, ReplicaRecord
from paddle_ft.serve.seat import Deed, Seat
from paddle_ft.serve.standstill import Standstill
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
MARKER = "\0"
LIMIT_S = 0.95
"""What clients give their changes; they wait a little longer."""
PRIMARY_S, AFTER_S, PAUSE_S = 0.5, 0.3, 0.005
"""As in ``passing``, whose PRIMARY_S is longer."""
Change = tuple[Kind, str, bytes | None]
NOTHING, UNKNOWN = "nothing was done", "not known"


class Server:
    """One incarnation of one replica; it is killed, and another one with its name begins anew."""

    def __init__(self, group: Group, node: str, incarnation: int) -> None:
        self.group = group
        self.node = node
        self.ahead_s = group.clock.between(0.0, 1000.0)
        self.name = f"{node}.x-{incarnation}"
        self.process = Process(group.clock, self.name)
        self.seat = Seat(self.name, KEYS, group.in_sync_min, observe_s=group.observe_s)
        self.seat.replica.kept = KEPT
        self.was: Primary | None = None
        self.watches = True
        """What etcd has is seen."""
        self.standstill = Standstill()
        self.waiting: dict[int, tuple[Waiting, Entry]] = {}
        """By sequence: whom to tell that it is acknowledged."""
        self.passed: dict[Waiting, str] = {}
        """Changes that were passed on, and to whom."""
        self.reads: list[tuple[Position, int, Any, str]] = []
        """What to wait for, and up to where, whom to tell, key."""
        self.leaving = False
        self.lease = 0
        self.renewed_s = float("-inf")
        for steps in (self._keep_lease, self._look, self._turn):
            Task(self.process, steps)

    @property
    def now(self) -> float:
        """By its own clock, which nobody else knows."""
        return self.group.clock.now + self.ahead_s

    @property
    def leads(self) -> bool:
        if self.group.without == "deadline":
            return self.seat.primary is not None and not self.seat.primary.deposed
        mine = self.lease == self.seat.group.primary_lease or self.group.without == "lease"
        return self.seat.leads(
            self.now, self.renewed_s + TTL_S - MARGIN_S if mine else float("-inf")
        )

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
                if self.watches:
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
        self._acknowledge(self.seat.saw(group, self.now))
        self._settle()
        for waiting, other in list(self.passed.items()):
            if group.primary != other:
                self.process.after(AFTER_S, waiting.end, UNKNOWN)

    def _settle(self) -> None:
        primary = self.seat.primary
        if primary is not self.was:
            self._role_changed()
            if primary is not None:
                self.group.history.leads(self.name, primary.term)

    # ------------------------------------------------------------ turns

    def _turn(self, task: Task) -> Steps:
        while True:
            self.standstill.turned(self.now)
            deed = self._due()
            self._settle()
            if self.seat.primary is not None:
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
            self._settle()
            return
        if self.group.without == "terms":
            self.seat.replica.term = 0
        if isinstance(message, Install):
            self.group.count("installed")
        self.group.send(self, sender, self.seat.hear(message, self.now))
        self._settle()
        if self.seat.replica.undone:
            self.group.history.undone(self.name)
            self.group.count("began without what was lost")
            self.group.restart(self)
        self._answer_reads()

    # ------------------------------------------------------------ changes, as ``passing`` does

    def put(self, ask: Any, kind: Kind, key: str, value: bytes | None) -> None:
        """A client asks for a change, whichever replica this is."""
        # What came in while it stood still is read in any order.
        self.process.after(self.group.jitter_s(), self._begin, ask, (kind, key, value))

    def _begin(self, ask: Any, change: Change) -> None:
        Task(self.process, lambda task: self._anywhere(task, change), ask.done)

    def _anywhere(self, task: Task, change: Change) -> Steps:
        left_s = LIMIT_S
        if self.group.without != "age":
            left_s -= self.standstill.age_s(self.now)
        until_s = self.now + left_s
        patient_s = min(until_s, self.now + PRIMARY_S)
        while True:
            other, pause_s = self._other(), LOOK_S
            if self.seat.primary is not None or other is None:
                outcome = yield from self._put(task, change, until_s)
            else:
                outcome = yield from self._to(task, other, change, until_s)
                pause_s = PAUSE_S
            if outcome is not NOTHING or self.now >= patient_s:
                return outcome
            yield task.sleep(min(pause_s, patient_s - self.now))

    def _put(self, task: Task, change: Change, until_s: float, term: int = 0) -> Steps:
        """As ``Replicated.put``: an entry, NOTHING or UNKNOWN."""
        if self.seat.handing_over and self.group.without != "handing":
            outcome = yield from self._after_hand_over(task, change, until_s, term > 0)
            if outcome is not None:
                return outcome
        primary = self.seat.primary
        if term and primary is not None and term != primary.term:
            return NOTHING
        if primary is None or not self.leads or self.now >= until_s:
            return NOTHING
        if not primary.accepts:
            return UNKNOWN  # it is told so at once; nothing was done
        entry = self._append(change)
        waiting = Waiting(task)
        self.waiting[entry.at.sequence] = waiting, entry
        if self.group.without == "replicas":  # acknowledged once the primary has it
            primary.acknowledged = entry.at.sequence
            self._acknowledge(self.seat.replica.apply(entry.at.sequence))
        else:
            self._acknowledge(primary.advance())
        outcome = yield lambda: waiting.begin(until_s - self.now)
        return outcome

    def _append(self, change: Change) -> Entry:
        if self.group.without == "joined" and change[0] == "states":
            first, *rest = Entry(Position(), *change).parts()
            for part in rest:
                self.process.after(0.005, self._append_later, part)
            return self.seat.put("state", first.key, first.value)
        return self.seat.put(*change)

    def _append_later(self, part: Entry) -> None:
        if self.seat.primary is not None and not self.seat.primary.deposed:
            self.seat.put("state", part.key, part.value)

    def _after_hand_over(self, task: Task, change: Change, until_s: float, passed: bool) -> Steps:
        while self.seat.handing_over:
            if self.now >= until_s:
                return NOTHING
            yield task.sleep(PAUSE_S)
        if passed:
            return None
        until_s = min(until_s, self.now + PRIMARY_S)
        while self.seat.primary is None:
            other = self._other()
            if other is not None:
                outcome = yield from self._to(task, other, change, until_s)
                if outcome is not NOTHING:
                    return outcome
            if self.now >= until_s:
                return NOTHING
            yield task.sleep(LOOK_S if other is None else PAUSE_S)
        return None

    def _other(self) -> str | None:
        """Another replica that is the primary, as far as is known, and lives."""
        name = self.seat.group.primary or ""
        if name == self.name or name in self.seat.dead or name not in self.seat.group.replicas:
            return None
        return name

    def _to(self, task: Task, other: str, change: Change, until_s: float) -> Steps:
        """Passes it on; an entry, NOTHING or UNKNOWN."""
        if self.now >= until_s:
            return NOTHING
        theirs_s, term = float("inf"), self.seat.group.term
        if self.group.without == "term":
            term = 0
        if self.group.without != "expiry":
            expires_s = self.seat.at_primary(other, until_s)
            if expires_s is None:
                return NOTHING
            theirs_s = expires_s
        waiting = Waiting(task)
        self.passed[waiting] = other
        self.group.count("passed on")
        self.group.pass_on(self, other, change, theirs_s, term, waiting.end)
        outcome = yield lambda: waiting.begin(until_s - self.now)
        del self.passed[waiting]
        return outcome

    def take(self, change: Change, until_s: float, term: int, end: Callable[[Any], None]) -> None:
        """Another replica passes a change on, for as long as this one's clock says."""
        self.process.after(self.group.jitter_s(), self._take, change, until_s, term, end)

    def _take(self, change: Change, until_s: float, term: int, end: Callable[[Any], None]) -> None:
        if until_s == float("inf"):
            until_s = self.now + LIMIT_S
        Task(self.process, lambda task: self._put(task, change, until_s, term), end)

    # ------------------------------------------------------------ reads

    def get(self, ask: Any, key: str, at_least: Position) -> None:
        """Once it has got to ``at_least``."""
        self.reads.append((at_least, self.seat.inherited(), ask, key))
        self._answer_reads()

    def read(self, ask: Any, key: str) -> None:
        """As a pipeline reads: whatever was acknowledged before, and the client need not say it."""
        if self.leads:
            return self.get(ask, key, Position())
        if self.group.without == "marker":
            return self.get(ask, key, Position())

        def noted(outcome: Any) -> None:
            if isinstance(outcome, Entry):
                self.get(ask, key, outcome.at)
            else:
                ask.done(outcome)

        Task(self.process, lambda task: self._anywhere(task, ("state", MARKER, None)), noted)
        return None

    def _acknowledge(self, entries: Any) -> None:
        for entry in entries:
            waiting, mine = self.waiting.pop(entry.at.sequence, (None, None))
            if waiting is None:
                continue
            outcome: Any = UNKNOWN
            if self.leads and self.seat.primary is not None:
                term = self.seat.primary.term
                if self.group.history.acknowledged(self.name, term, mine):
                    outcome = mine
            waiting.end(outcome)
        self.seat.replica.fresh()
        self._answer_reads()

    def _role_changed(self) -> None:
        """Whoever waited for this primary does not know."""
        waiting, self.waiting = self.waiting, {}
        for each, _ in waiting.values():
            each.end(UNKNOWN)
        self.was = self.seat.primary
        if self.was is not None and self.group.without == "inherited":
            self.was.inherited = 0

    def _answer_reads(self) -> None:
        waiting, self.reads = self.reads, []
        state = self.seat.replica.state
        for least, inherited, ask, key in waiting:
            found = self.seat.answers(least, inherited)
            if self.group.without == "reads":
                found = "yes"
            elif self.group.without == "anew" and least.sequence <= state.at.sequence:
                other = state.term_at(least.sequence) not in (least.term, None)
                found = "lost" if other else found
            if found == "lost":
                ask.lost()
                continue
            if found == "wait":
                self.reads.append((least, inherited, ask, key))
                continue
            one, other = (state.items.get(("state", name)) for name in (key, twin(key)))
            ask.read(one.value if one else b"0", other.value if other else b"0")


def twin(key: str) -> str:
    """What is always written together with ``key``."""
    return key + "'"


class Waiting:
    """Whoever waits for what becomes of a change, for a while."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._outcome: Any = None
        self._began = self._over = False

    def begin(self, timeout_s: float) -> None:
        self._began = True
        if self._over:
            self._task.process.after(0.0, self._task.resume, self._outcome)
        else:
            self._task.process.after(max(0.0, timeout_s), self.end, UNKNOWN)

    def end(self, outcome: Any) -> None:
        if self._over:
            return
        self._over, self._outcome = True, outcome
        if self._began:
            self._task.process.after(0.0, self._task.resume, outcome)
