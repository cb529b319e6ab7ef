"""Random histories give the same answers, states and events on the model and on real etcd.

Revisions are compared from where a history began; leases by the order in which they were granted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from paddle_ft.coordination.kv import (
    Compare,
    Delete,
    Event,
    KeyValue,
    Put,
    Snapshot,
    Transaction,
)
from paddle_ft.errors import LeaseLost
from tests.contract.coordinators import Bench, EtcdBench, ModelBench, Seen

KEYS = ("a", "a/", "a/1", "a/2", "ab", "b/1", "é")
PREFIXES = ("", "a", "a/", "b", "nothing")

keys = st.sampled_from(KEYS)


@dataclass(frozen=True)
class Leased:
    """A lease by its number of granting; -1 is none, one too high was never granted."""

    number: int


@dataclass(frozen=True)
class Revision:
    """What a comparison names: 0, or one that the key or another has or had."""

    of: str
    field: str
    """``zero``, ``create_revision``, ``mod_revision``, or ``older`` (one before mod)."""


@dataclass(frozen=True)
class Step:
    """One call: ``what`` is grant, keep_alive, revoke, read, txn or compact."""

    what: str
    lease: int = 0
    prefix: str = ""
    compares: tuple[tuple[str, str, Revision], ...] = ()
    operations: tuple[tuple[str, int], ...] = ()
    """(key, lease) for a put; (key, -2) and (prefix, -3) for deletions."""


revisions = st.builds(
    Revision, keys, st.sampled_from(("zero", "create_revision", "mod_revision", "older"))
)
compares = st.tuples(keys, st.sampled_from(("create_revision", "mod_revision")), revisions)
operations = st.one_of(
    st.tuples(keys, st.integers(-1, 2)),
    st.tuples(keys, st.just(-1)),
    st.tuples(keys, st.just(-2)),
    st.tuples(st.sampled_from(PREFIXES), st.just(-3)),
)
transactions = st.builds(
    Step,
    st.just("txn"),
    compares=st.lists(compares, max_size=2).map(tuple),
    operations=st.lists(operations, max_size=3, unique_by=lambda o: o[0]).map(tuple),
)
steps = st.one_of(
    transactions,
    transactions,
    transactions,
    st.just(Step("grant")),
    st.builds(Step, st.sampled_from(("keep_alive", "revoke")), lease=st.integers(0, 2)),
    st.builds(Step, st.just("read"), prefix=st.sampled_from(PREFIXES)),
)


class Side:
    """One of the two, with its own numbers behind the common ones."""

    def __init__(self, bench: Bench, prefix: str) -> None:
        self.bench = bench
        self.prefix = prefix
        self.leases: list[int] = []
        self.base = bench.coordinator.read(prefix).revision
        self.seen = Seen()
        self.cancel = bench.coordinator.watch(
            prefix, self.base, self.seen.on_events, self.seen.on_reset
        )

    def run(self, step: Step) -> Any:
        coordinator = self.bench.coordinator
        if step.what == "grant":
            self.leases.append(coordinator.grant(100))
            return None
        if step.what == "keep_alive":
            return coordinator.keep_alive(self._lease(step.lease))
        if step.what == "revoke":
            return coordinator.revoke(self._lease(step.lease))
        if step.what == "read":
            return self.normal(coordinator.read(self.prefix + step.prefix))
        try:
            result = coordinator.transact(self._transaction(step))
        except (LeaseLost, ValueError) as error:
            return type(error)
        return replace(result, revision=result.revision - self.base)

    def _lease(self, number: int) -> int:
        if number < 0:
            return 0
        return self.leases[number] if number < len(self.leases) else 999_999

    def _transaction(self, step: Step) -> Transaction:
        kvs = {kv.key: kv for kv in self.bench.coordinator.read(self.prefix).kvs}

        def revision(wanted: Revision) -> int:
            kv = kvs.get(self.prefix + wanted.of)
            if kv is None or wanted.field == "zero":
                return 0
            if wanted.field == "older":
                return kv.mod_revision - 1
            return int(getattr(kv, wanted.field))

        def operation(key: str, code: int) -> Put | Delete:
            if code <= -2:
                return Delete(self.prefix + key, prefix=code == -3)
            return Put(self.prefix + key, key.encode(), self._lease(code))

        return Transaction(
            tuple(
                Compare(self.prefix + key, field, revision(wanted))  # type: ignore[arg-type]
                for key, field, wanted in step.compares
            ),
            tuple(operation(key, code) for key, code in step.operations),
        )

    def state(self) -> Any:
        return self.normal(self.bench.coordinator.read(self.prefix))

    def normal(self, snapshot: Snapshot) -> Any:
        return snapshot.revision - self.base, [self._normal_kv(kv) for kv in snapshot.kvs]

    def _normal_kv(self, kv: KeyValue) -> KeyValue:
        return KeyValue(
            kv.key.removeprefix(self.prefix),
            kv.value,
            kv.create_revision and kv.create_revision - self.base,
            kv.mod_revision - self.base,
            self.leases.index(kv.lease) + 1 if kv.lease else 0,
        )

    def events(self) -> list[Event]:
        """Everything up to now, once the watch has delivered a last mark."""
        mark = Transaction((), (Put(self.prefix + "mark", b""),))
        revision = self.bench.coordinator.transact(mark).revision
        self.bench.wait_until(lambda: self.seen.batches[-1:] == [revision])
        assert self.seen.resets == []
        return [Event(e.deleted, self._normal_kv(e.kv)) for e in self.seen.events]

    def close(self) -> None:
        self.cancel()
        for lease in self.leases:
            self.bench.coordinator.revoke(lease)


@pytest.mark.etcd
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=st.lists(steps, max_size=25))
def test_every_history_looks_the_same_on_the_model(
    real_bench: EtcdBench, history: list[Step]
) -> None:
    model = ModelBench()
    sides = (Side(model, model.prefix), Side(real_bench, model.prefix))
    try:
        for step in history:
            of_model, of_etcd = (side.run(step) for side in sides)
            note(f"{step}: {of_etcd}")
            assert of_model == of_etcd
        of_model, of_etcd = (
            side.normal(side.bench.coordinator.read(side.prefix)) for side in sides
        )
        assert of_model == of_etcd
        of_model, of_etcd = (side.events() for side in sides)
        assert of_model == of_etcd
    finally:
        for side in sides:
            side.close()
