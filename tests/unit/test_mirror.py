"""The live copy of a job's keys."""

from __future__ import annotations

import pytest

from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import KeyValue, Put, Snapshot, Transaction
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.errors import CoordinationError
from tests.sim.model_etcd import ModelCoordinator, ModelEtcd

KEYS = schema.Keys("job")


def put(coordinator: ModelCoordinator, key: str, value: bytes) -> None:
    assert coordinator.transact(Transaction((), (Put(key, value),))).succeeded


def test_it_follows_changes() -> None:
    woken: list[int] = []
    coordinator = ModelCoordinator(ModelEtcd(lambda: 0.0))
    put(coordinator, KEYS.leader, b"a.1")
    mirror = JobMirror(coordinator, KEYS, lambda: woken.append(1))
    mirror.start()
    before = mirror.state()
    assert before.leader is not None and before.leader.value == "a.1"
    put(coordinator, KEYS.leader, b"b.1")
    assert mirror.state() is before
    coordinator.deliver()
    after = mirror.state()
    assert woken
    assert after.leader is not None and after.leader.value == "b.1"
    assert mirror.revision_of(KEYS.leader) == after.leader.mod_revision


def test_other_jobs_are_not_seen() -> None:
    coordinator = ModelCoordinator(ModelEtcd(lambda: 0.0))
    put(coordinator, schema.Keys("job2").leader, b"x.1")
    mirror = JobMirror(coordinator, KEYS, lambda: None)
    mirror.start()
    assert mirror.state().leader is None


def test_what_is_not_ours_is_named() -> None:
    coordinator = ModelCoordinator(ModelEtcd(lambda: 0.0))
    put(coordinator, KEYS.head, b"{}")
    mirror = JobMirror(coordinator, KEYS, lambda: None)
    mirror.start()
    with pytest.raises(CoordinationError, match=KEYS.head):
        mirror.state()


def test_an_etcd_that_has_lost_data_is_not_believed() -> None:
    coordinator = ModelCoordinator(ModelEtcd(lambda: 0.0))
    put(coordinator, KEYS.leader, b"a.1")
    mirror = JobMirror(coordinator, KEYS, lambda: None)
    mirror.start()
    mirror._reset_and_notify(Snapshot(1, (KeyValue(KEYS.leader, b"b.1", 1, 1),)))
    with pytest.raises(CoordinationError, match="lost data"):
        mirror.state()
