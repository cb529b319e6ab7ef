"""One launcher: the loop that observes, decides and acts for one node.

    etcd watch, worker ends, worker messages, timers  ->  events  ->  the loop (main thread)
        view = what is known now
        decide(view)      cluster-wide, if this node leads     ->  leader: membership, committer
        supervise(view)   this node's workers                  ->  worker group, membership

Only the loop changes the agent's own state. Whatever takes time runs elsewhere, one of a kind at
a time, and comes back as an event, so that a slow etcd or store never delays a look at the
workers.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from paddle_ft.agent.chronicle import Chronicle
from paddle_ft.agent.committer import Committer
from paddle_ft.agent.console import Console, Progress
from paddle_ft.agent.events import Changed, CommitDone, Defect, Scanned
from paddle_ft.agent.group import Said, WorkerGroup
from paddle_ft.agent.ipc import Published
from paddle_ft.agent.leader import Leader
from paddle_ft.agent.membership import Membership, Node, TransactionDone
from paddle_ft.agent.peers import PeerLinks
from paddle_ft.agent.registrar import Registrar
from paddle_ft.agent.reserve import spares_due
from paddle_ft.agent.signals import Signals
from paddle_ft.agent.snapshots import PartWritten, SnapshotKeeper, StateFailed
from paddle_ft.agent.supervise import (
    Dismiss,
    Leave,
    LocalAction,
    LocalView,
    Publish,
    StartWorkers,
    StopWorkers,
    TellPause,
    supervise,
)
from paddle_ft.agent.workers import WorkerEnded
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.config import Config
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import Coordinator
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.coordination.view import who_marks
from paddle_ft.errors import CoordinationError
from paddle_ft.health.monitor import HealthMonitor
from paddle_ft.types import Head

log = logging.getLogger("paddle_ft")

TICK_S = 0.2
"""How long the loop sleeps when nothing happens; also how soon a signal is noticed."""
EVENTS_MAX = 10_000


class Agent:
    """Runs one node of the job until it ends.

    Args:
        command: script and arguments, as the bootstrap takes them.
        coordinator: a reachable etcd.
        room: the job's checkpoint store.
        node: this launcher itself.
        tend: called now and then on the main thread, to keep a private etcd alive.
    """

    def __init__(
        self,
        config: Config,
        command: Sequence[str],
        coordinator: Coordinator,
        room: CheckpointRoom,
        *,
        node: Node,
        console: Console,
        tend: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._coordinator = coordinator
        self._room = room
        self._console = console
        self._tend = tend
        self._closed = False
        self._events: queue.Queue[Any] = queue.Queue(maxsize=EVENTS_MAX)
        keys = self._keys = schema.Keys(config.job.id)
        self._mirror = JobMirror(coordinator, keys, self._wake)
        self._peers = PeerLinks(node.host, coordinator)
        link, emit, wake = self._peers.address, self._emit, self._wake
        self._membership = Membership(config, coordinator, self._mirror, node, link, emit, wake)
        self._snapshots = SnapshotKeeper(room, node.shared_dir, config.checkpoint.buffers, emit)
        self._group = WorkerGroup(config, command, node.run_dir, self._snapshots, console, emit)
        self._chronicle = Chronicle(config, node.name, self._group)
        health = (node.name, node.run_dir, self._group, self._chronicle.log, wake)
        self._health = HealthMonitor(config, *health)
        self._committer = Committer(coordinator, keys, self._mirror, room, lambda: self._closed)
        self._leader = Leader(
            config, self._mirror, room, self._membership, self._committer, self._in_background
        )
        self._registrar = Registrar(coordinator, config.job.id, console.say)
        self._damaged: tuple[str, ...] = ()
        self._told_manifest = ""
        self._signals = Signals(self._group.ask_to_save, console.say, config.job.stop_grace_s)

    # ------------------------------------------------------------ life

    def run(self) -> int:
        """Runs until the job has ended or this node has left it; gives the exit code."""
        with self._signals:
            try:
                self._mirror.start()
                self._await_end_of_run_before()
                self._room.bind(self._membership.claim_store)
                self._group.listen()
                self._membership.join(self._damaged, False)
                while (end := self._turn()) is None:
                    pass
                self._chronicle.end(end.exit_code, end.reason, self._console)
                return end.exit_code
            finally:
                self._close()

    def _await_end_of_run_before(self) -> None:
        """A run of the same name that has ended gets a few seconds to go; then another begins."""
        until_s = time.monotonic() + 3 * self._config.etcd.lease_ttl_s
        while not self._signals.pending:
            state = self._mirror.state()
            if state.outcome is None:
                return
            if not state.nodes or time.monotonic() >= until_s:
                revision = state.outcome.mod_revision
                self._coordinator.transact(schema.begin_run(self._keys, revision))
            time.sleep(TICK_S)

    def _close(self) -> None:
        self._closed = True
        self._health.close()
        self._group.close()
        self._snapshots.close()
        self._registrar.close()
        self._mirror.close()
        self._membership.close()
        self._peers.close()
        self._chronicle.close()
        self._console.close()

    # ------------------------------------------------------------ one turn

    def _emit(self, event: object) -> None:
        self._events.put(event)

    def _wake(self) -> None:
        if self._events.empty():  # else the loop is about to look anyway
            self._events.put(Changed())

    def _turn(self) -> Leave | None:
        """Takes what has happened, decides, acts; gives the end when there is one."""
        try:
            event = self._events.get(timeout=TICK_S)
            while True:
                self._chronicle.took(event)
                self._take(event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass
        self._signals.take()
        self._tend()
        now_s = time.monotonic()
        self._rejoin_if_lost()
        state = self._mirror.state()
        self._peers.follow(self._membership.me, state.nodes)
        if self._membership.me in state.drain:
            self._signals.leave()
        self._follow_head(state)
        end = self._supervise(state, now_s)
        self._chronicle.look(state, self._membership.me)
        self._health.look(state, self._membership)
        if end is None:
            self._leader.decide(state, now_s)
            self._refill(state)
        self._console.progress(self._progress(state))
        return end

    def _take(self, event: object) -> None:
        if isinstance(event, WorkerEnded):
            self._group.ended(event)
        elif isinstance(event, Said):
            self._group.said(event)
        elif isinstance(event, PartWritten):
            group, revision = self._group, self._group.generation_revision
            self._in_background(
                lambda: self._committer.announce(event.part, revision, lambda: group.generation),
                "part",
            )
        elif isinstance(event, StateFailed):
            self._restore_failed(event)
        elif isinstance(event, Published):
            self._registrar.take(event)
        elif isinstance(event, (TransactionDone, CommitDone, Scanned)):
            self._leader.took(event)
            if isinstance(event, TransactionDone):
                self._membership.done(event)
            elif isinstance(event, CommitDone) and event.head is not None:
                self._tell_committed(event.head)
        elif isinstance(event, Defect):
            raise event.error

    def _rejoin_if_lost(self) -> None:
        """Whose lease has ended is dead to the others and comes back as a newcomer."""
        if not self._membership.lost:
            return
        self._console.say("the lease of this node has ended: joining again as a newcomer")
        try:
            self._membership.join(self._damaged, self._signals.leaving_since_s is not None)
        except CoordinationError as error:
            log.warning("%s", error)

    def _in_background(self, work: Callable[[], object], name: str) -> None:
        """Runs ``work`` on a thread; its result, if any, comes back as an event."""

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001  the loop raises it
                result = Defect(error)
            if result is not None:
                self._emit(result)

        threading.Thread(target=run, name=name, daemon=True).start()

    # ------------------------------------------------------------ this node's workers

    def _local_view(self, state: schema.JobState) -> LocalView:
        return LocalView(
            me=self._membership.me,
            state=state,
            group=self._group.facts(),
            launched=self._group.generation,
            pending_step=self._snapshots.pending_step,
            damaged=self._damaged,
            restore_failed=self._group.restore_failed,
            restore_fatal=self._group.restore_fatal,
            leaving_since_s=self._signals.leaving_since_s,
            leaving_code=self._signals.leaving_code,
            hurried=self._signals.hurried,
            at_the_door=self._group.at_the_door,
        )

    def _supervise(self, state: schema.JobState, now_s: float) -> Leave | None:
        view = self._local_view(state)
        for action in supervise(view, self._membership.published, now_s, self._config.job):
            if isinstance(action, Leave):
                return action
            self._act(action, state)
        return None

    def _act(self, action: LocalAction, state: schema.JobState) -> None:
        if isinstance(action, Publish):
            self._membership.publish(action)
        elif isinstance(action, StopWorkers):
            self._group.stop(gently=action.gently)
        elif isinstance(action, TellPause):
            self._group.tell_pause(action.reason)
        elif isinstance(action, Dismiss):
            self._group.dismiss(action.generation)
        else:
            assert state.generation is not None
            sequence = state.head.value.newest.sequence if state.head else 0
            turn = self._group.start if isinstance(action, StartWorkers) else self._group.order
            turn(state.generation, self._membership.me, sequence)

    def _refill(self, state: schema.JobState) -> None:
        due = spares_due(self._local_view(state), self._config.job)
        if due is not None:
            self._group.refill(*due, state.generation.value if state.generation else None)

    def _restore_failed(self, event: StateFailed) -> None:
        self._group.cannot_restore(event)
        if event.damaged and event.manifest not in self._damaged:
            self._damaged = (*self._damaged, event.manifest)

    # ------------------------------------------------------------ what is committed

    def _follow_head(self, state: schema.JobState) -> None:
        """Lets the workers know of a commit; the leader's own after the marker is written."""
        head = state.head.value if state.head else None
        who = who_marks(state, self._membership.me)
        if head is None or head.newest.manifest == self._told_manifest or not who:
            return
        if who == "another":
            self._tell_committed(head)
        else:
            self._leader.acknowledge(head)

    def _tell_committed(self, head: Head) -> None:
        self._told_manifest = head.newest.manifest
        self._snapshots.committed(head.newest)
        self._group.tell_committed(head.newest)

    def _progress(self, state: schema.JobState) -> Progress:
        generation = state.generation.value if state.generation else None
        return Progress(
            reading=self._group.reading(),
            generation=generation.number if generation else 0,
            world_size=generation.world_size if generation else 0,
            committed_step=state.head.value.newest.step if state.head else -1,
            store_trouble=self._snapshots.trouble,
            doing=self._leader.reason,
        )
