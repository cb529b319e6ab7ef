"""The keys of one job, the state read from them, and the transaction for each write.

Invariant: **every write of a leader is one transaction that compares the leader key's
create_revision, the generation's mod_revision and the head's mod_revision** (``Fences``), so that
a leader that is no longer the leader, or that decided on an outdated view, changes nothing. The
simulator breaks when one of these comparisons is left out (tests/sim/test_fences.py).

    /paddle_ft/<job>/nodes/<node>.<incarnation>   NodeRecord   leased, written by that node only
    /paddle_ft/<job>/leader                       member id    leased; create_revision is the term
    /paddle_ft/<job>/store                        identity of the checkpoint store
    /paddle_ft/<job>/generation                   Generation   written by the leader
    /paddle_ft/<job>/head                         Head         written by the leader
    /paddle_ft/<job>/pause                        Pause        written by the leader
    /paddle_ft/<job>/parts/<gen>/<step>/<member>  Part         written by that member
    /paddle_ft/<job>/quarantine/<node>            reason
    /paddle_ft/<job>/drain/<node>.<incarnation>   asked to leave; leased with the node itself
    /paddle_ft/<job>/health/<node>.<incarnation>  HealthRecord leased, written by that node only
    /paddle_ft/<job>/figures/<node>               Figures      of nodes that ``--probe`` let in
    /paddle_ft/<job>/probe/<node>                 Entry        leased; of ``paddle-ft probe``
    /paddle_ft/<job>/outcome                      Outcome      written by the leader
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from paddle_ft.coordination.kv import Compare, Delete, KeyValue, Put, Transaction
from paddle_ft.health.judge import HealthRecord
from paddle_ft.types import (
    Generation,
    Head,
    NodeRecord,
    Outcome,
    Part,
    Pause,
    Versioned,
    decode,
    encode,
)

ROOT = "/paddle_ft"
VALUES_MIN = 256
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one job; ``prefix`` ends in a slash, so no job contains another."""

    job: str

    @property
    def prefix(self) -> str:
        return f"{ROOT}/{self.job}/"

    def node(self, member_id: str) -> str:
        return f"{self.prefix}nodes/{member_id}"

    def part(self, generation: int, step: int, member_id: str) -> str:
        return f"{self.parts}{generation}/{step}/{member_id}"

    @property
    def parts(self) -> str:
        return f"{self.prefix}parts/"

    @property
    def leader(self) -> str:
        return f"{self.prefix}leader"

    @property
    def store(self) -> str:
        return f"{self.prefix}store"

    @property
    def generation(self) -> str:
        return f"{self.prefix}generation"

    @property
    def head(self) -> str:
        return f"{self.prefix}head"

    @property
    def pause(self) -> str:
        return f"{self.prefix}pause"

    @property
    def outcome(self) -> str:
        return f"{self.prefix}outcome"

    @property
    def health(self) -> str:
        return f"{self.prefix}health/"

    @property
    def figures(self) -> str:
        return f"{self.prefix}figures/"

    @property
    def probe(self) -> str:
        return f"{self.prefix}probe/"

    @property
    def drain(self) -> str:
        return f"{self.prefix}drain/"

    @property
    def quarantine(self) -> str:
        return f"{self.prefix}quarantine/"


@dataclass(frozen=True, slots=True)
class JobState:
    """Everything etcd holds about one job, at one revision."""

    nodes: Mapping[str, Versioned[NodeRecord]] = field(default_factory=dict)
    leader: Versioned[str] | None = None
    generation: Versioned[Generation] | None = None
    head: Versioned[Head] | None = None
    pause: Versioned[Pause] | None = None
    parts: tuple[Part, ...] = ()
    quarantine: frozenset[str] = frozenset()
    drain: frozenset[str] = frozenset()
    """Members that were asked to leave by ``paddle-ft drain``."""
    health: Mapping[str, Versioned[HealthRecord]] = field(default_factory=dict)
    """By member id."""
    store: Versioned[str] | None = None
    outcome: Versioned[Outcome] | None = None
    live: Mapping[str, Versioned[NodeRecord]] = field(init=False)
    """Records that count, by member id: the newest incarnation of each node out of quarantine."""

    def __post_init__(self) -> None:
        newest: dict[str, Versioned[NodeRecord]] = {}
        for record in self.nodes.values():
            node = record.value.member.node
            other = newest.get(node)
            if node not in self.quarantine and (
                other is None or other.create_revision < record.create_revision
            ):
                newest[node] = record
        object.__setattr__(self, "live", {r.value.member.id: r for r in newest.values()})

    def fences(self) -> Fences:
        return Fences(
            leader=self.leader.create_revision if self.leader else 0,
            generation=self.generation.mod_revision if self.generation else 0,
            head=self.head.mod_revision if self.head else 0,
        )


@dataclass(frozen=True, slots=True)
class Fences:
    """The revisions a decision was based on; 0 means that the key did not exist."""

    leader: int
    """create_revision of the leader key: the term."""
    generation: int
    """mod_revision of the generation."""
    head: int
    """mod_revision of the head."""

    def compares(self, keys: Keys) -> tuple[Compare, ...]:
        return (
            Compare(keys.leader, "create_revision", self.leader),
            Compare(keys.generation, "mod_revision", self.generation),
            Compare(keys.head, "mod_revision", self.head),
        )


def parse(keys: Keys, kvs: Iterable[KeyValue]) -> JobState:
    """The state that ``kvs`` (all keys below ``keys.prefix``) describes.

    Raises ValueError, naming the key, when a value is not what this version writes there.
    """
    nodes: dict[str, Versioned[NodeRecord]] = {}
    parts: list[Part] = []
    quarantine: set[str] = set()
    drain: set[str] = set()
    health: dict[str, Versioned[HealthRecord]] = {}
    single: dict[str, KeyValue] = {}
    for kv in kvs:
        name = kv.key[len(keys.prefix) :]
        if name.startswith("nodes/"):
            nodes[name[6:]] = _versioned(NodeRecord, kv)
        elif name.startswith("parts/"):
            parts.append(_decoded(Part, kv))
        elif name.startswith("health/"):
            health[name[len("health/") :]] = _versioned(HealthRecord, kv)
        elif name.startswith("drain/"):
            drain.add(name[len("drain/") :])
        elif name.startswith("quarantine/"):
            quarantine.add(name[len("quarantine/") :])
        else:
            single[name] = kv
    _values.looked(len(nodes) + len(parts) + len(health) + len(single))
    text = {n: _text(single[n]) for n in ("leader", "store") if n in single}
    return JobState(
        nodes=nodes,
        leader=text.get("leader"),
        store=text.get("store"),
        generation=_optional(Generation, single.get("generation")),
        head=_optional(Head, single.get("head")),
        pause=_optional(Pause, single.get("pause")),
        outcome=_optional(Outcome, single.get("outcome")),
        parts=tuple(sorted(parts, key=lambda p: (p.generation, p.step, p.member))),
        quarantine=frozenset(quarantine),
        drain=frozenset(drain),
        health=health,
    )


def _decoded(kind: type[T], kv: KeyValue) -> T:
    try:
        value: T = _values.value(kind, kv.value)
        return value
    except ValueError as error:
        raise ValueError(f"{kv.key} does not hold a {kind.__name__}: {error}") from error


class _Values:
    """Values that were decoded: of thousands of keys most are as they were at the last look.

    Kept are those of the last look, and of those before at most some four times as many: a job
    writes new ones for as long as it runs. Threads may cost each other an entry, nothing more.
    """

    def __init__(self) -> None:
        self._new: dict[tuple[Any, bytes], Any] = {}
        self._old: dict[tuple[Any, bytes], Any] = {}

    def value(self, kind: Any, data: bytes) -> Any:
        """As ``decode``."""
        key = kind, data
        value = self._new.get(key)
        if value is None:
            value = self._old.get(key)
            self._new[key] = value = decode(kind, data) if value is None else value
        return value

    def looked(self, count: int) -> None:
        """A look that took ``count`` values is over."""
        if len(self._new) > max(VALUES_MIN, 2 * count):
            self._new, self._old = {}, self._new


_values = _Values()


def _versioned(kind: type[T], kv: KeyValue) -> Versioned[T]:
    return Versioned(_decoded(kind, kv), kv.create_revision, kv.mod_revision)


def _optional(kind: type[T], kv: KeyValue | None) -> Versioned[T] | None:
    return None if kv is None else _versioned(kind, kv)


def _text(kv: KeyValue) -> Versioned[str]:
    return Versioned(kv.value.decode(errors="replace"), kv.create_revision, kv.mod_revision)


# ---------------------------------------------------------------- one transaction for each write


def register(keys: Keys, record: NodeRecord, lease: int) -> Transaction:
    """First write of a node's record; refused if the same incarnation is there already."""
    key = keys.node(record.member.id)
    return Transaction((Compare(key, "create_revision", 0),), (Put(key, encode(record), lease),))


def update_record(keys: Keys, record: NodeRecord, lease: int, mod_revision: int) -> Transaction:
    """A later write; comparing the revision keeps a delayed request from undoing a newer one."""
    key = keys.node(record.member.id)
    return Transaction(
        (Compare(key, "mod_revision", mod_revision),), (Put(key, encode(record), lease),)
    )


def tell_health(
    keys: Keys, node: Versioned[NodeRecord], record: HealthRecord, lease: int
) -> Transaction:
    """What a node tells of its ranks; refused once the node is gone from the job."""
    member_id = node.value.member.id
    return Transaction(
        (Compare(keys.node(member_id), "create_revision", node.create_revision),),
        (Put(keys.health + member_id, encode(record), lease),),
    )


def quarantine(keys: Keys, node: str, reason: str, fences: Fences) -> Transaction:
    """Nothing runs on ``node`` from now on, until a person lifts it."""
    key = keys.quarantine + node
    return Transaction(
        (*fences.compares(keys), Compare(key, "create_revision", 0)),
        (Put(key, reason.encode()),),
    )


def lift_quarantine(keys: Keys, node: str, mod_revision: int) -> Transaction:
    """Of the quarantine that was written at ``mod_revision``, not of a later one.

    What the node has told goes with it, so that it is not barred again for what is forgiven.
    """
    key = keys.quarantine + node
    told = Delete(f"{keys.health}{node}.", prefix=True)
    return Transaction((Compare(key, "mod_revision", mod_revision),), (Delete(key), told))


def ask_to_leave(keys: Keys, record: Versioned[NodeRecord]) -> Transaction:
    """Asks a node to move its work and go; forgotten when that node is gone."""
    member, lease = record.value.member.id, record.value.lease
    key = keys.node(member)
    return Transaction(
        (Compare(key, "create_revision", record.create_revision),),
        (Put(keys.drain + member, b"", lease),),
    )


def campaign(keys: Keys, member_id: str, lease: int) -> Transaction:
    """Takes the leader key if nobody holds it."""
    return Transaction(
        (Compare(keys.leader, "create_revision", 0),),
        (Put(keys.leader, member_id.encode(), lease),),
    )


def claim_store(keys: Keys, identity: str) -> Transaction:
    """Binds the job to one store; the first node does it."""
    return Transaction(
        (Compare(keys.store, "create_revision", 0),), (Put(keys.store, identity.encode()),)
    )


def propose(keys: Keys, generation: Generation, fences: Fences) -> Transaction:
    """Starts ``generation``; parts and pause of the one before end with it."""
    return Transaction(
        fences.compares(keys),
        (
            Put(keys.generation, encode(generation)),
            Delete(keys.pause),
            Delete(keys.parts, prefix=True),
        ),
    )


def commit(keys: Keys, head: Head, obsolete: Iterable[Part], fences: Fences) -> Transaction:
    """Moves ``head``; the parts it was made of, and older ones, have served."""
    put = Put(keys.head, encode(head))
    return Transaction(fences.compares(keys), (put, *_deletes(keys, obsolete)))


def _deletes(keys: Keys, parts: Iterable[Part]) -> tuple[Delete, ...]:
    """One deletion for each step: etcd takes no more than 128 operations in a transaction."""
    steps = sorted({(p.generation, p.step) for p in parts})
    return tuple(Delete(keys.part(g, step, ""), prefix=True) for g, step in steps)


def request_pause(keys: Keys, pause: Pause, fences: Fences) -> Transaction:
    """Asks all workers of the generation to save and leave; head may move meanwhile."""
    return Transaction(
        (*fences.compares(keys)[:2], Compare(keys.pause, "create_revision", 0)),
        (Put(keys.pause, encode(pause)),),
    )


def finish(keys: Keys, outcome: Outcome, fences: Fences) -> Transaction:
    """Ends the job. It stays written, for nodes that come back from a partition after the end."""
    return Transaction(
        (*fences.compares(keys), Compare(keys.outcome, "create_revision", 0)),
        (Put(keys.outcome, encode(outcome)),),
    )


def begin_run(keys: Keys, outcome_revision: int) -> Transaction:
    """A new launcher begins another run of a job that has ended."""
    return Transaction(
        (Compare(keys.outcome, "mod_revision", outcome_revision),), (Delete(keys.outcome),)
    )


def add_part(keys: Keys, part: Part, generation_revision: int) -> Transaction:
    """Announces a written part, unless the generation has changed."""
    return Transaction(
        (Compare(keys.generation, "mod_revision", generation_revision),),
        (Put(keys.part(part.generation, part.step, part.member), encode(part)),),
    )
