"""What a serving group is told of versions that were published."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from paddle_ft.agent.ipc import Published
from paddle_ft.agent.registrar import Registrar
from paddle_ft.coordination.kv import Put, Snapshot, Transaction, TxnResult
from paddle_ft.errors import CoordinationError
from paddle_ft.serve import registry
from paddle_ft.serve.register import register
from paddle_ft.serve.registry import Keys
from tests.sim.model_etcd import ModelCoordinator, ModelEtcd

KEYS = Keys("readers")


def etcd() -> ModelCoordinator:
    return ModelCoordinator(ModelEtcd(lambda: 0.0))


def models(coordinator: ModelCoordinator) -> dict[str, tuple[int, str]]:
    group = registry.parse(KEYS, coordinator.read(KEYS.prefix).kvs)
    return {name: (made.version, made.store) for name, made in group.published.items()}


def test_an_older_version_never_takes_the_place_of_a_newer_one() -> None:
    coordinator = etcd()
    told = [
        register(coordinator, "readers", name, registry.Published(version, "s3://shop", 1.0))
        for name, version in [("digits", 2), ("digits", 1), ("digits2", 1), ("digits", 3)]
    ]
    assert told == [True, False, True, True]
    assert not register(coordinator, "readers", "digits", registry.Published(3, "s3://shop", 2.0))
    assert models(coordinator) == {"digits": (3, "s3://shop"), "digits2": (1, "s3://shop")}
    assert register(coordinator, "readers", "digits", registry.Published(1, "s3://other", 1.0))
    assert models(coordinator)["digits"] == (1, "s3://other")


def test_of_two_who_register_at_once_the_newer_version_stays() -> None:
    class Overtaken(ModelCoordinator):
        """Version 5 comes between the first look and the write."""

        def transact(self, txn: Transaction) -> TxnResult:
            if not models(self):
                super().transact(
                    Transaction(
                        (),
                        (Put(KEYS.model("digits"), b'{"version":5,"store":"s3://shop","at":1}'),),
                    )
                )
            return super().transact(txn)

    coordinator = Overtaken(ModelEtcd(lambda: 0.0))
    assert not register(coordinator, "readers", "digits", registry.Published(4, "s3://shop", 1.0))
    assert models(coordinator) == {"digits": (5, "s3://shop")}


def test_what_another_program_wrote_there_is_named() -> None:
    coordinator = etcd()
    coordinator.transact(Transaction((), (Put(KEYS.model("digits"), b"five"),)))
    with pytest.raises(CoordinationError, match="/paddle_ft/readers/serving/models/digits"):
        register(coordinator, "readers", "digits", registry.Published(1, "s3://shop", 1.0))


def test_the_agent_registers_once_etcd_answers(wait_for: Callable[..., None]) -> None:
    coordinator, said = etcd(), list[str]()
    tried = threading.Event()

    class Shy(ModelCoordinator):
        def read(self, prefix: str) -> Snapshot:
            tried.set()
            return super().read(prefix)

    shy = Shy(coordinator.etcd)
    shy.available = False
    registrar = Registrar(shy, "readers", said.append)
    try:
        for version in (1, 2):
            registrar.take(Published("digits", version, "s3://shop"))
        assert tried.wait(20)
        assert not models(coordinator)
        shy.available = True
        wait_for(lambda: models(coordinator) == {"digits": (2, "s3://shop")})
    finally:
        registrar.close()
    assert said[-1] == "published digits 2 to s3://shop"


def test_the_end_of_an_agent_waits_no_longer_than_it_may(
    caplog: pytest.LogCaptureFixture,
) -> None:
    coordinator = etcd()
    coordinator.available = False
    registrar = Registrar(coordinator, "readers", lambda _: None)
    registrar.take(Published("digits", 1, "s3://shop"))
    registrar.close(timeout_s=0.1)
    assert "digits 1 is in s3://shop, but etcd does not know of it" in caplog.text
