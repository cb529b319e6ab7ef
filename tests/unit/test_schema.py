"""Keys, the state read from them, and the fences of every write (A3)."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import KeyValue, Transaction
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    NodeRecord,
    NodeStatus,
    Outcome,
    Part,
    Pause,
    encode,
)
from tests.sim.model_etcd import ModelEtcd
from tests.unit.members import member

KEYS = schema.Keys("job")
A = member("a", slots=2)
REF = CommitRef(1, 10, 1, "manifest", "digest")
HEAD = Head(REF)
GENERATION = Generation(1, (A,), "host:1")
LOOKS = 4000
MAX_OPERATIONS = 128
"""What etcd takes in one transaction unless it is told otherwise."""


class Job:
    """A job in a model of etcd, led by ``a.1``."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.etcd = ModelEtcd(lambda: self.now_s)
        self.lease = self.etcd.grant(5)
        assert self.run(schema.register(KEYS, NodeRecord(A), self.lease))
        assert self.run(schema.campaign(KEYS, A.id, self.lease))

    def run(self, txn: Transaction) -> bool:
        return self.etcd.transact(txn).succeeded

    def state(self) -> schema.JobState:
        return schema.parse(KEYS, self.etcd.read(KEYS.prefix).kvs)

    def fences(self) -> schema.Fences:
        return self.state().fences()

    def add(self, part: Part) -> bool:
        generation = self.state().generation
        return self.run(schema.add_part(KEYS, part, generation.mod_revision if generation else 0))


def part(step: int, member: str = A.id, generation: int = 1) -> Part:
    return Part(generation, step, member, f"part-{step}", "digest")


# ---------------------------------------------------------------- keys and state


def test_no_job_contains_another() -> None:
    assert not schema.Keys("job2").head.startswith(KEYS.prefix)


def test_what_is_written_is_read() -> None:
    job = Job()
    assert job.run(schema.propose(KEYS, GENERATION, job.fences()))
    assert job.add(part(10))
    assert job.run(schema.request_pause(KEYS, Pause(1, "why"), job.fences()))
    assert job.run(schema.claim_store(KEYS, "store"))
    state = job.state()
    assert state.nodes[A.id].value.member == A
    assert state.leader is not None and state.leader.value == A.id
    assert state.generation is not None and state.generation.value == GENERATION
    assert state.parts == (part(10),)
    assert state.pause is not None and state.pause.value == Pause(1, "why")
    assert state.store is not None and state.store.value == "store"
    assert job.run(schema.commit(KEYS, HEAD, [part(10)], job.fences()))
    assert job.run(schema.finish(KEYS, Outcome(0, "done"), job.fences()))
    state = job.state()
    assert state.parts == ()
    assert state.head is not None and state.head.value == HEAD
    assert state.outcome is not None and state.outcome.value == Outcome(0, "done")


def test_a_value_that_is_not_ours_is_named() -> None:
    with pytest.raises(ValueError, match=KEYS.head):
        schema.parse(KEYS, [KeyValue(KEYS.head, b"nonsense", 1, 1)])


def test_keys_of_a_later_version_are_left_alone() -> None:
    state = schema.parse(KEYS, [KeyValue(f"{KEYS.prefix}primary", b"?", 1, 1)])
    assert state == schema.JobState()


def test_the_newest_incarnation_of_a_node_counts() -> None:
    older = member("a", "9")
    kvs = [
        KeyValue(KEYS.node(m.id), encode(NodeRecord(m)), created, created)
        for created, m in ((5, older), (8, A))
    ]
    state = schema.parse(KEYS, kvs)
    assert set(state.nodes) == {"a.9", "a.1"}
    assert set(state.live) == {"a.1"}


def test_quarantined_nodes_do_not_count() -> None:
    kvs = [
        KeyValue(KEYS.node(A.id), encode(NodeRecord(A)), 5, 5),
        KeyValue(f"{KEYS.quarantine}a", b"slow", 6, 6),
    ]
    assert schema.parse(KEYS, kvs).live == {}


# ---------------------------------------------------------------- fences


def propose(job: Job, fences: schema.Fences) -> Transaction:
    return schema.propose(KEYS, GENERATION, fences)


def commit(job: Job, fences: schema.Fences) -> Transaction:
    return schema.commit(KEYS, HEAD, (), fences)


def pause(job: Job, fences: schema.Fences) -> Transaction:
    return schema.request_pause(KEYS, Pause(1, "why"), fences)


def finish(job: Job, fences: schema.Fences) -> Transaction:
    return schema.finish(KEYS, Outcome(0, "done"), fences)


LEADERS = [propose, commit, pause, finish]


@pytest.mark.parametrize("write", LEADERS)
def test_a_leader_writes(write: object) -> None:
    job = Job()
    assert job.run(write(job, job.fences()))


@pytest.mark.parametrize("write", LEADERS)
def test_who_led_before_writes_nothing(write: object) -> None:
    job = Job()
    before = job.fences()
    job.etcd.revoke(job.lease)
    assert not job.run(write(job, before)), "nobody leads"
    other = job.etcd.grant(5)
    assert job.run(schema.campaign(KEYS, "b.1", other))
    assert not job.run(write(job, before)), "somebody else leads"


@pytest.mark.parametrize("write", LEADERS)
def test_nothing_is_written_for_an_earlier_generation(write: object) -> None:
    job = Job()
    before = job.fences()
    assert job.run(schema.propose(KEYS, GENERATION, before))
    assert not job.run(write(job, before))


@pytest.mark.parametrize("write", [propose, commit, finish])
def test_nothing_is_written_upon_an_earlier_head(write: object) -> None:
    job = Job()
    before = job.fences()
    assert job.run(schema.commit(KEYS, HEAD, (), before))
    assert not job.run(write(job, before))


@pytest.mark.parametrize("write", LEADERS)
def test_what_arrives_twice_has_one_effect(write: object) -> None:
    job = Job()
    txn = write(job, job.fences())
    assert job.run(txn)
    assert not job.run(txn)


def test_who_leads_is_not_replaced() -> None:
    job = Job()
    assert not job.run(schema.campaign(KEYS, "b.1", job.etcd.grant(5)))


def test_a_new_generation_begins_without_parts_and_pause() -> None:
    job = Job()
    assert job.run(schema.propose(KEYS, GENERATION, job.fences()))
    assert job.add(part(10))
    assert job.run(schema.request_pause(KEYS, Pause(1, "why"), job.fences()))
    assert job.run(schema.propose(KEYS, Generation(2, (A,), "host:1"), job.fences()))
    assert (job.state().parts, job.state().pause) == ((), None)


def test_a_part_is_not_announced_to_a_later_generation() -> None:
    job = Job()
    assert job.run(schema.propose(KEYS, GENERATION, job.fences()))
    late = schema.add_part(KEYS, part(10), job.fences().generation)
    assert job.run(schema.propose(KEYS, Generation(2, (A,), "host:1"), job.fences()))
    assert not job.run(late)


def test_a_commit_removes_the_parts_of_its_step_and_older_ones_only() -> None:
    job = Job()
    assert job.run(schema.propose(KEYS, GENERATION, job.fences()))
    for step in (1, 10, 100):
        assert job.add(part(step))
    served = [p for p in job.state().parts if p.step <= 10]
    assert job.run(schema.commit(KEYS, HEAD, served, job.fences()))
    assert [p.step for p in job.state().parts] == [100]


def test_a_commit_of_thousands_of_nodes_is_one_small_transaction() -> None:
    parts = [part(10, f"n{i}.1") for i in range(10_000)]
    txn = schema.commit(KEYS, HEAD, parts, schema.Fences(1, 1, 0))
    assert len(txn.operations) < MAX_OPERATIONS


# ---------------------------------------------------------------- a node's own record


def test_an_incarnation_is_used_once() -> None:
    job = Job()
    assert not job.run(schema.register(KEYS, NodeRecord(A), job.lease))


def test_a_delayed_record_does_not_undo_a_newer_one() -> None:
    job = Job()
    revision = job.state().nodes[A.id].mod_revision
    running = NodeRecord(A, NodeStatus("running", 1))
    failed = NodeRecord(A, NodeStatus("failed", 1))
    assert job.run(schema.update_record(KEYS, failed, job.lease, revision))
    assert not job.run(schema.update_record(KEYS, running, job.lease, revision))
    assert job.state().nodes[A.id].value == failed


def test_a_node_that_is_gone_is_gone() -> None:
    job = Job()
    job.now_s = 10.0
    state = job.state()
    assert (state.nodes, state.leader) == ({}, None)


# ---------------------------------------------------------------- the end and what follows


def test_the_outcome_outlives_whoever_wrote_it() -> None:
    job = Job()
    assert job.run(schema.finish(KEYS, Outcome(0, "done"), job.fences()))
    job.etcd.revoke(job.lease)
    assert job.state().outcome is not None


def test_another_run_begins_once() -> None:
    job = Job()
    assert job.run(schema.finish(KEYS, Outcome(0, "done"), job.fences()))
    outcome = job.state().outcome
    assert outcome is not None
    begin = schema.begin_run(KEYS, outcome.mod_revision)
    assert job.run(begin)
    assert job.state().outcome is None
    assert not job.run(begin)


def test_a_job_is_bound_to_one_store() -> None:
    job = Job()
    assert job.run(schema.claim_store(KEYS, "one"))
    assert not job.run(schema.claim_store(KEYS, "two"))


def test_of_the_values_of_a_long_job_only_the_last_are_kept() -> None:
    still, generations = KeyValue(KEYS.generation, encode(GENERATION), 1, 1), []
    for revision in range(2, LOOKS):
        head = Head(replace(REF, step=revision))
        state = schema.parse(KEYS, [still, KeyValue(KEYS.head, encode(head), 2, revision)])
        assert state.head is not None and state.head.value == head
        assert state.generation is not None
        generations.append(state.generation.value)
    assert len(set(map(id, generations))) == 1, "what stays as it is, is decoded once"
    assert sum(isinstance(value, Head) for value in gc.get_objects()) < LOOKS / 4
