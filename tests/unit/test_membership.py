"""A node's own place in etcd: registered, published, lost, joined again (A2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paddle_ft.agent.membership import Membership, Node, TransactionDone
from paddle_ft.agent.supervise import Publish
from paddle_ft.config import Config, EtcdConfig
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import Transaction, TxnResult
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.errors import EtcdUnavailable
from paddle_ft.types import NodeStatus
from tests.sim.model_etcd import ModelCoordinator, ModelEtcd

KEYS = schema.Keys(Config().job.id)


class Etcd(ModelCoordinator):
    """A model of etcd that can be told not to answer the next transactions."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(ModelEtcd(lambda: self.now_s))
        self.unanswered = 0

    def transact(self, txn: Transaction) -> TxnResult:
        result = super().transact(txn)
        if self.unanswered:
            self.unanswered -= 1
            raise EtcdUnavailable("no answer; it has taken effect all the same")
        return result


@contextmanager
def membership(etcd: Etcd) -> Iterator[Membership]:
    mirror = JobMirror(etcd, KEYS, lambda: None)
    mirror.start()
    config = Config(etcd=EtcdConfig(renew_interval_s=0.01))
    done: list[TransactionDone] = []
    node = Node("node", "127.0.0.1", Path(), Path())
    made = Membership(config, etcd, mirror, node, "", done.append, wake=lambda: None)
    try:
        yield made
    finally:
        made.close()
        mirror.close()


def ids(etcd: Etcd) -> list[str]:
    return sorted(schema.parse(KEYS, etcd.read(KEYS.prefix).kvs).nodes)


def test_a_node_that_could_not_join_again_still_has_to() -> None:
    etcd = Etcd()
    with membership(etcd) as node:
        node.join((), leaving=False)
        first = node.me
        assert not node.lost
        etcd.unanswered = 1
        with pytest.raises(EtcdUnavailable):
            node.join((), leaving=False)
        assert node.lost
        node.join((), leaving=False)
        assert not node.lost
        assert node.me != first
        assert ids(etcd) == [node.me], "what was half done is undone with its lease"


def test_an_answer_to_the_life_before_changes_nothing() -> None:
    etcd = Etcd()
    with membership(etcd) as node:
        node.join((), leaving=False)
        record = schema.parse(KEYS, etcd.read(KEYS.prefix).kvs).nodes[node.me].value
        node.join((), leaving=False)
        after = node.me
        node.done(TransactionDone("publish", True, 99, record))
        assert node.me == after
        assert node.published == Publish(NodeStatus(), False)
