"""Between the nodes and etcd: requests that take time, get lost, come late or twice; watches.

A request can be lost before it takes effect or its answer after it; both look the same to the
sender. It can arrive long after the sender has given up, also after the sender has died.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from paddle_ft.coordination.kv import Event, KeyValue, Transaction
from paddle_ft.errors import EtcdUnavailable, LeaseLost
from tests.sim.clock import Clock, Process
from tests.sim.model_etcd import Batch, ModelEtcd
from tests.sim.task import Effect, Task

CALL_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Sent:
    """Who sent a transaction, what it is, the term (0: not a leader's) and the view's revision it
    was decided upon."""

    sender: str
    kind: str
    term: int = 0
    seen: int = 0


class Recorder(Protocol):
    def etcd_changed(self, batch: Batch, sent: Sent | None) -> None: ...

    def sprung(self, sent: Sent) -> None: ...


class Watcher(Protocol):
    """An agent's end of a watch."""

    node: str
    process: Process
    seen_revision: int
    watching: bool
    delivery_due: bool

    def watched(self, revision: int, events: tuple[Event, ...]) -> None: ...

    def read_anew(self, revision: int, kvs: tuple[KeyValue, ...]) -> None: ...


class Network:
    """``cut``: nodes that cannot reach etcd. ``flaky``: share of requests that go wrong."""

    def __init__(self, clock: Clock, recorder: Recorder, prefix: str) -> None:
        self.clock = clock
        self.cut: set[str] = set()
        self.flaky = 0.0
        self.watch_delay_s = (0.002, 0.05)
        self.watchers: list[Watcher] = []
        self.traps: dict[str, tuple[str, float]] = {}
        """By kind of transaction: what happens to the next one, and for how long."""
        self.without: tuple[str, str] | None = None
        """(kind of transaction, last part of a key): that comparison is left out; for tests."""
        self._recorder = recorder
        self._prefix = prefix
        self._sent: Sent | None = None
        self.lives = 0
        self.restart_empty()

    def restart_empty(self) -> None:
        """etcd comes back without its data."""
        self.etcd = ModelEtcd(lambda: self.clock.now, on_commit=self._committed)
        self.lives += 1

    # ------------------------------------------------------------ requests

    def transact(self, task: Task, node: str, txn: Transaction, sent: Sent) -> Effect:
        if self.without is not None and self.without[0] == sent.kind:
            left_out = self.without[1]
            kept = tuple(c for c in txn.compares if not c.key.endswith(left_out))
            assert len(kept) < len(txn.compares), f"{sent.kind} does not compare {left_out}"
            txn = replace(txn, compares=kept)
        return self._call(task, node, lambda etcd: etcd.transact(txn), sent)

    def call(self, task: Task, node: str, request: Callable[[ModelEtcd], Any]) -> Effect:
        return self._call(task, node, request, None)

    def _call(
        self, task: Task, node: str, request: Callable[[ModelEtcd], Any], sent: Sent | None
    ) -> Effect:
        return lambda: self._send(task, node, request, sent)

    def _send(
        self, task: Task, node: str, request: Callable[[ModelEtcd], Any], sent: Sent | None
    ) -> None:
        clock, etcd = self.clock, self.etcd
        delay_s = clock.between(0.001, 0.01)
        lost_answer = False
        if sent is not None and sent.kind in self.traps:
            how, lasts_s = self.traps.pop(sent.kind)
            lost_answer = how == "deaf"
            delay_s = lasts_s if how == "late" else delay_s
            self._recorder.sprung(sent)
        elif self.flaky and clock.chance(self.flaky):
            fate = clock.random.randrange(4)
            if fate == 0:  # lost on the way there
                task.process.after(CALL_TIMEOUT_S, task.resume, _unavailable())
                return
            if fate == 1:
                lost_answer = True
            elif fate == 2:
                delay_s = clock.between(0.2, 6.0)
            else:
                again_s = clock.between(0.01, 4.0)
                clock.after(delay_s + again_s, self._apply, etcd, node, request, sent)
        if delay_s >= CALL_TIMEOUT_S:
            task.process.after(CALL_TIMEOUT_S, task.resume, _unavailable())
            clock.after(delay_s, self._apply, etcd, node, request, sent)
        else:
            clock.after(
                delay_s, self._arrive, etcd, task, node, request, sent, delay_s, lost_answer
            )

    def _arrive(
        self,
        etcd: ModelEtcd,
        task: Task,
        node: str,
        request: Callable[[ModelEtcd], Any],
        sent: Sent | None,
        took_s: float,
        lost_answer: bool,
    ) -> None:
        result = self._apply(etcd, node, request, sent)
        if lost_answer or isinstance(result, EtcdUnavailable):
            task.process.after(CALL_TIMEOUT_S - took_s, task.resume, _unavailable())
        else:
            back_s = self.clock.between(0.001, 0.01)
            task.process.after(back_s, task.resume, result)

    def _apply(
        self, etcd: ModelEtcd, node: str, request: Callable[[ModelEtcd], Any], sent: Sent | None
    ) -> Any:
        if node in self.cut or etcd is not self.etcd:
            return _unavailable()
        etcd.tick()
        self._sent = sent
        try:
            return request(etcd)
        except LeaseLost as error:
            return error
        finally:
            self._sent = None

    # ------------------------------------------------------------ watches

    def _committed(self, batch: Batch) -> None:
        self._recorder.etcd_changed(batch, self._sent)
        for watcher in self.watchers:
            self.deliver_soon(watcher)

    def deliver_soon(self, watcher: Watcher, least_s: float = 0.0) -> None:
        """The watch is brought up to now, after its delay; what comes meanwhile has its own."""
        if watcher.delivery_due or not watcher.watching or watcher.node in self.cut:
            return
        watcher.delivery_due = True
        delay_s = least_s + self.clock.between(*self.watch_delay_s)
        until = self.etcd.revision if self.clock.chance(0.5) else 0
        self.clock.after(delay_s, self._deliver, watcher, self.etcd, until)

    def _deliver(self, watcher: Watcher, etcd: ModelEtcd, until: int) -> None:
        watcher.delivery_due = False
        if etcd is not self.etcd or watcher.node in self.cut or not watcher.process.alive:
            return
        events: list[Event] = []
        revision = watcher.seen_revision
        for batch in etcd.events(self._prefix, watcher.seen_revision):
            if until and batch.revision > until:
                self.deliver_soon(watcher)
                break
            revision = batch.revision
            events += batch.events
        if events:
            watcher.seen_revision = revision
            watcher.process.after(0.0, watcher.watched, revision, tuple(events))

    def reconnect(self, node: str) -> None:
        """The node reaches etcd again: its watch goes on, or finds that it must read anew."""
        self.cut.discard(node)
        for watcher in self.watchers:
            if watcher.node != node or not watcher.watching:
                continue
            if self.clock.chance(0.5):
                self.deliver_soon(watcher, 0.05)
            else:
                self.clock.after(self.clock.between(0.05, 0.3), self._read_anew, watcher)

    def _read_anew(self, watcher: Watcher) -> None:
        if watcher.node in self.cut or not watcher.process.alive:
            return
        snapshot = self.etcd.read(self._prefix)
        watcher.seen_revision = snapshot.revision
        watcher.process.after(0.0, watcher.read_anew, snapshot.revision, snapshot.kvs)


def _unavailable() -> EtcdUnavailable:
    return EtcdUnavailable("etcd does not answer")
