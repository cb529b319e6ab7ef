"""One launcher in the simulator: the product's pure decisions in a shell of virtual threads.

Follows ``paddle_ft.agent.agent``: one loop that observes, decides and acts; a lease that is kept
alive beside it; small transactions one at a time; commits, parts and restores beside the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paddle_ft.agent import supervise as local
from paddle_ft.agent.reserve import spares_due
from paddle_ft.coordination import actions, schema
from paddle_ft.coordination import view as cluster
from paddle_ft.coordination.decide import decide
from paddle_ft.coordination.kv import Event, KeyValue, Snapshot, Transaction, TxnResult
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.errors import CoordinationError, EtcdUnavailable
from paddle_ft.health.judge import HealthRecord
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    Member,
    NodeRecord,
    NodeStatus,
    Part,
    Recovery,
    Versioned,
)
from tests.sim.clock import Process
from tests.sim.committer import Committer
from tests.sim.crew import Crew
from tests.sim.keeper import Keeper, RestoreFailed
from tests.sim.network import Sent
from tests.sim.task import Steps, Task
from tests.sim.training import SAY_S, End, SimWorker, State, WorkerOwner

if TYPE_CHECKING:
    from tests.sim.world import World

TICK_S = 0.4
PAUSE_S = 0.3
"""Between two tries of a write that etcd refused or did not answer."""


class _Watch:
    """The coordinator of a ``JobMirror`` that is fed by the simulated network."""

    def __init__(self) -> None:
        self.first = Snapshot(0, ())
        self.on_events: Callable[[int, tuple[Event, ...]], None]
        self.on_reset: Callable[[Snapshot], None]

    def read(self, prefix: str) -> Snapshot:
        return self.first

    def watch(self, prefix: str, revision: int, on_events: Any, on_reset: Any) -> Any:
        self.on_events, self.on_reset = on_events, on_reset
        return lambda: None


@dataclass(slots=True)
class _Lease:
    number: int
    until_s: float
    lost: bool = False


class SimAgent(WorkerOwner):
    def __init__(self, world: World, node: str, slots: int) -> None:
        self.world = world
        self.node = node
        self.slots = slots
        self.config = world.config
        self.keys = world.keys
        self.process = Process(world.clock, node)
        self.me = ""
        self.seen_revision = 0
        self.watching = False
        self.delivery_due = False
        self._watch = _Watch()
        self.mirror = JobMirror(self._watch, self.keys, self._wake)  # type: ignore[arg-type]
        self._turn_due = False
        self._lease: _Lease | None = None
        self._record: NodeRecord | None = None
        self._record_revision = 0
        self._joining = False
        self._busy = False
        self._not_before_s = 0.0
        self._wrote_revision = 0
        self._marks = cluster.Marks()
        self._found: tuple[CommitRef, ...] | None = None
        self._scanning = False
        self.commit_running = False
        self._told_manifest = ""
        self._told_reason = ""
        self._restore_failed = ""
        self._damaged: tuple[str, ...] = ()
        self._blamed_s: tuple[float, ...] = ()
        self._leaving_since_s: float | None = None
        self._hurried = False
        self._ending = False
        self.registered_s = -1.0
        self.crew = Crew(self)
        self.keeper = Keeper(self)
        self.committer = Committer(self)

    def note(self, *what: object) -> None:
        self.world.note(self.node, *what)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        Task(self.process, self._run)

    def _run(self, task: Task) -> Steps:
        network, prefix = self.world.network, self.keys.prefix
        while True:
            try:
                self._watch.first = yield network.call(task, self.node, lambda e: e.read(prefix))
                break
            except EtcdUnavailable:
                yield task.sleep(PAUSE_S)
        self.mirror.start()
        self.seen_revision = self._watch.first.revision
        self.watching = True
        network.watchers.append(self)
        network.deliver_soon(self)
        yield from self._await_end_of_run_before(task)
        yield from self._join(task)
        self._tick()

    def _await_end_of_run_before(self, task: Task) -> Steps:
        clock = self.world.clock
        until_s = clock.now + 3 * self.config.etcd.lease_ttl_s
        while (outcome := self.mirror.state().outcome) is not None:
            if not self.mirror.state().nodes or clock.now >= until_s:
                txn = schema.begin_run(self.keys, outcome.mod_revision)
                try:
                    yield self.world.network.transact(task, self.node, txn, Sent("", "begin"))
                except EtcdUnavailable:
                    pass
            yield task.sleep(TICK_S)

    def _join(self, task: Task) -> Steps:
        """Registers a new incarnation of this node, as long as it takes."""
        self._joining = True
        network, ttl_s = self.world.network, self.config.etcd.lease_ttl_s
        margin_s = self.config.etcd.rpc_timeout_s
        while True:
            try:
                sent_s = self.world.clock.now
                number = yield network.call(task, self.node, lambda e: e.grant(ttl_s))
                lease = _Lease(number, sent_s + ttl_s - margin_s)
                member = self._newcomer()
                record = NodeRecord(
                    member, NodeStatus(damaged=self._damaged), self._leaving_since_s is not None
                )
                txn = schema.register(self.keys, record, number)
                result = yield network.transact(task, self.node, txn, Sent(member.id, "register"))
                if result.succeeded:
                    break
            except (EtcdUnavailable, CoordinationError):
                pass
            yield task.sleep(PAUSE_S)
        self.me = member.id
        self._lease, self._record, self._record_revision = lease, record, result.revision
        if self.registered_s < 0:
            self.registered_s = self.world.clock.now
        self._joining = False
        self.note("registered as", self.me)
        Task(self.process, lambda task: self._keep_alive(task, lease))
        self._wake()

    def _newcomer(self) -> Member:
        number = self.world.next_incarnation(self.node)
        base = 1000 * (1 + self.world.names.index(self.node))
        ports = tuple(base + self.world.next_port() for _ in range(self.slots + 1))
        return Member(self.node, f"i{number}", self.node, self.slots, ports)

    def _keep_alive(self, task: Task, lease: _Lease) -> Steps:
        while True:
            yield task.sleep(self.config.etcd.renew_interval_s)
            if self._lease is not lease or self._ending:
                return
            sent_s = self.world.clock.now
            try:
                ttl_s = yield self.world.network.call(
                    task, self.node, lambda e: e.keep_alive(lease.number)
                )
            except EtcdUnavailable:
                continue
            if ttl_s <= 0:
                lease.lost = True
                self._wake()
                return
            lease.until_s = sent_s + ttl_s - self.config.etcd.rpc_timeout_s

    def lose_lease(self) -> None:
        """A fault: etcd gives the lease up, though this node lives."""
        lease = self._lease
        if lease is not None and not lease.lost:
            self.world.network.etcd.revoke(lease.number)

    def terminate(self) -> None:
        """SIGTERM; the second one hurries."""
        self.process.after(0.0, self._on_signal)

    def _on_signal(self) -> None:
        self.note("SIGTERM")
        if self._leaving_since_s is None:
            self._leaving_since_s = self.world.clock.now
        else:
            self._hurried = True
        self._wake()

    def blame(self) -> None:
        """A fault: a worker hangs; the monitor ends it, and this is told."""
        self._blamed_s = (*self._blamed_s, self.world.clock.now + 1e9)
        self._wake()

    def kill(self) -> None:
        """SIGKILL: the workers lose their agent and end, too."""
        self.process.kill()
        self.watching = False
        for worker in self.crew.processes():
            worker.kill(stopped=False)

    def _leave(self, task: Task, end: local.Leave) -> Steps:
        """Tells how it ended, and gives the lease back."""
        self.note("leaves", end.exit_code, end.reason)
        for worker in self.crew.processes():
            worker.kill(stopped=True)
        self._ending = True
        self.watching = False
        self.world.exited(self, end.exit_code, 143 if self._leaving_since_s is not None else 0)
        lease = self._lease
        if lease is not None and not lease.lost:
            try:
                yield self.world.network.call(task, self.node, lambda e: e.revoke(lease.number))
            except EtcdUnavailable:
                pass
        self.process.kill()

    # ------------------------------------------------------------ one turn

    def watched(self, revision: int, events: tuple[Event, ...]) -> None:
        self._watch.on_events(revision, events)

    def read_anew(self, revision: int, kvs: tuple[KeyValue, ...]) -> None:
        self._watch.on_reset(Snapshot(revision, kvs))

    def _wake(self) -> None:
        if not self._turn_due and not self._ending:
            self._turn_due = True
            self.process.after(0.002, self._turn)

    def _tick(self) -> None:
        if not self._ending:
            self._wake()
            self.process.after(TICK_S, self._tick)

    def _turn(self) -> None:
        self._turn_due = False
        if self._joining or self._ending or self._record is None:
            return
        if self._lease is not None and self._lease.lost:
            self.note("lost its lease")
            Task(self.process, self._join)
            return
        state = self.mirror.state()
        now_s = self.world.clock.now
        self._marks = cluster.observe(self._marks, state, now_s)
        self.committer.follow_head(state)
        for action in local.supervise(
            self._local_view(state),
            local.Publish(self._record.status, self._record.leaving),
            now_s,
            self.config.job,
        ):
            if isinstance(action, local.Leave):
                self._ending = True
                Task(self.process, lambda task, end=action: self._leave(task, end))
                return
            self._act_locally(action, state)
        self._tell_health(state)
        self._decide(state, now_s)
        self._refill(state)

    # ------------------------------------------------------------ workers

    def _local_view(self, state: schema.JobState) -> local.LocalView:
        if not self.world.minds_since and state.generation is not None:
            state = without_since(state)
        return local.LocalView(
            me=self.me,
            state=state,
            group=self.crew.facts(),
            launched=self.crew.generation,
            pending_step=self.keeper.pending_step,
            damaged=self._damaged,
            restore_failed=self._restore_failed,
            leaving_since_s=self._leaving_since_s,
            leaving_code=143,
            hurried=self._hurried,
            at_the_door=self.crew.at_the_door,
        )

    def _act_locally(self, action: local.LocalAction, state: schema.JobState) -> None:
        if isinstance(action, local.Publish):
            self._publish(action)
        elif isinstance(action, local.StopWorkers):
            self.crew.stop(action.gently, action.reason)
        elif isinstance(action, local.TellPause):
            self.crew.tell_pause()
        elif isinstance(action, local.Dismiss):
            self.crew.dismiss(action.generation)
        else:
            assert isinstance(action, local.StartWorkers | local.OrderWorkers)
            assert state.generation is not None
            starts = isinstance(action, local.StartWorkers)
            (self.crew.start if starts else self.crew.order)(state.generation)

    def _refill(self, state: schema.JobState) -> None:
        due = spares_due(self._local_view(state), self.config.job)
        if due is not None:
            self.crew.refill(due[1])

    def turned_to(self, versioned: Versioned[Generation], ranks: Sequence[int]) -> None:
        self._restore_failed = ""
        self.keeper.begin(versioned.value, versioned.mod_revision, ranks)

    def worker_said_hello(
        self, worker: SimWorker, generation: int, rank: int, recovery: Recovery
    ) -> None:
        self._hear(self.crew.hello, worker, generation, rank, recovery)

    def worker_lost_peer(self, worker: SimWorker) -> None:
        self._hear(self.crew.lost_peer, worker)

    def worker_ended(
        self, worker: SimWorker, how: End, exit_code: int, step: int, stopped: bool = False
    ) -> None:
        if how != "killed":
            self._hear(self.crew.farewell, worker, how, step)
        self.process.after(
            0.005, self._took, self.crew.ended, worker, how, exit_code, step, stopped
        )

    def worker_wants_state(self, worker: SimWorker) -> None:
        self.process.after(SAY_S, self.keeper.wait_restored, worker, worker.generation)

    def _hear(self, take: Callable[..., None], *what: object) -> None:
        self.process.after(SAY_S, self._took, take, *what)

    def _took(self, take: Callable[..., None], *what: object) -> None:
        take(*what)
        self._wake()

    def snapshot(self, worker: SimWorker, state: State) -> None:
        self.keeper.arrived(worker, state)

    def buffers_free(self, generation: int) -> bool:
        return self.process.running and self.keeper.buffers_free(generation)

    def cannot_restore(self, event: RestoreFailed) -> None:
        if event.generation != self.generation:
            return
        self.note("cannot restore", event.manifest)
        self._restore_failed = event.reason
        if event.manifest not in self._damaged:
            self._damaged = (*self._damaged, event.manifest)
        self._wake()

    def tell_committed(self, head: Head) -> None:
        newest = head.newest
        self._told_manifest = newest.manifest
        self.keeper.committed(newest)
        if newest.generation == self.generation:
            self.world.acknowledged(newest)
            self.crew.tell_committed(newest.step)
        self._wake()

    @property
    def told_manifest(self) -> str:
        return self._told_manifest

    @property
    def generation(self) -> int:
        return self.crew.generation

    def workers(self) -> list[SimWorker]:
        return self.crew.alive()

    def changed(self) -> None:
        self._wake()

    def part_written(self, part: Part, generation_revision: int) -> None:
        def announce(task: Task) -> Steps:
            txn = schema.add_part(self.keys, part, generation_revision)
            while part.generation == self.generation:
                try:
                    yield self.world.network.transact(
                        task, self.node, txn, Sent(part.member, "part")
                    )
                    return
                except EtcdUnavailable:
                    yield task.sleep(PAUSE_S)

        Task(self.process, announce)

    # ------------------------------------------------------------ etcd

    def _send(
        self, kind: str, txn: Transaction, term: int = 0, record: NodeRecord | None = None
    ) -> None:
        """Sends one small transaction; the next one waits until this has come back."""
        if self._busy or self.world.clock.now < self._not_before_s:
            return
        self._busy = True
        sent = Sent(self.me, kind, term, self.mirror.revision)
        Task(self.process, lambda task: self._transact(task, txn, sent, record))

    def _transact(
        self, task: Task, txn: Transaction, sent: Sent, record: NodeRecord | None
    ) -> Steps:
        if self.world.trapped(self, sent.kind):
            yield task.sleep(0.0)  # frozen between the decision and the sending
        result = TxnResult(False, 0)
        try:
            result = yield self.world.network.transact(task, self.node, txn, sent)
        except CoordinationError:
            pass
        self._busy = False
        if result.succeeded:
            self._wrote_revision = result.revision
        if record is not None and record.member.id != self.me:
            return  # sent before the lease was lost: this node is somebody else by now
        if result.succeeded and record is not None:
            self._record, self._record_revision = record, result.revision
        elif sent.kind == "publish":  # refused or not known: go by what etcd holds
            self._record_revision = self.mirror.revision_of(self.keys.node(self.me))
            known = self.mirror.state().nodes.get(self.me)
            if known is not None:
                self._record = known.value
        if not result.succeeded:
            self._not_before_s = self.world.clock.now + PAUSE_S
        self._wake()

    def _publish(self, action: local.Publish) -> None:
        assert self._record is not None and self._lease is not None
        record = NodeRecord(self._record.member, action.status, action.leaving)
        txn = schema.update_record(self.keys, record, self._lease.number, self._record_revision)
        self._send("publish", txn, record=record)

    def _tell_health(self, state: schema.JobState) -> None:
        if self.node in state.quarantine:
            self._blamed_s = ()
        own, lease = state.nodes.get(self.me), self._lease
        known = state.health.get(self.me)
        told = known.value.blamed if known else ()
        if own is not None and lease is not None and told != self._blamed_s:
            record = HealthRecord(self.generation, blamed=self._blamed_s)
            self._send("health", schema.tell_health(self.keys, own, record, lease.number))

    # ------------------------------------------------------------ the leader's part

    def _decide(self, state: schema.JobState, now_s: float) -> None:
        assert self._lease is not None
        if self.mirror.revision < max(self._wrote_revision, self.committer.moved_revision):
            return  # what was done last is not to be seen yet, and would be done again
        if not self.world.minds_quarantine:
            state = replace(state, quarantine=frozenset())
        view = cluster.View(
            me=self.me,
            state=state,
            marks=self._marks,
            acting_until_s=self._lease.until_s,
            wall_s=now_s + 1e9,
            commit_running=self.commit_running,
            commit_failed=self.committer.failed,
            found=self._found,
            store="model",
        )
        decision = decide(view, now_s, self.config)
        if decision.reason != self._told_reason:
            self._told_reason = decision.reason
            self.note("decides:", decision.reason)
        if decision.action is not None:
            self._act(decision.action, self._lease.number, state)

    def _act(self, action: actions.Action, lease: int, state: schema.JobState) -> None:
        keys = self.keys
        if isinstance(action, actions.Campaign):
            self._send("campaign", schema.campaign(keys, self.me, lease))
        elif isinstance(action, actions.ScanStore):
            if not self._scanning:
                self._scanning = True
                Task(self.process, self.committer.scan, self._scanned)
        elif isinstance(action, actions.ImportHead):
            txn = schema.commit(keys, action.head, (), action.fences)
            self._send("import", txn, action.fences.leader)
        elif isinstance(action, actions.Propose):
            txn = schema.propose(keys, action.generation, action.fences)
            self._send("propose", txn, action.fences.leader)
        elif isinstance(action, actions.RequestPause):
            txn = schema.request_pause(keys, action.pause, action.fences)
            self._send("pause", txn, action.fences.leader)
        elif isinstance(action, actions.Finish):
            txn = schema.finish(keys, action.outcome, action.fences)
            self._send("finish", txn, action.fences.leader)
        elif isinstance(action, actions.Bar):
            txn = schema.quarantine(keys, action.node, action.reason, action.fences)
            self._send("bar", txn, action.fences.leader)
        elif not self.commit_running:
            self.commit_running = True
            Task(self.process, lambda task: self.committer.commit(task, action), self.committed)

    def _scanned(self, found: tuple[CommitRef, ...]) -> None:
        self._found, self._scanning = found, False
        self._wake()

    def committed(self, head: Head | None) -> None:
        self.commit_running = False
        if head is not None:
            self.tell_committed(head)
        self._wake()


def without_since(state: schema.JobState) -> schema.JobState:
    """As if all members had been there from the beginning; for tests."""
    assert state.generation is not None
    generation = state.generation.value
    if not generation.in_place:
        return state
    since = (1,) * len(generation.members)
    return replace(
        state, generation=replace(state.generation, value=replace(generation, since=since))
    )
