"""What etcd holds about one serving group, and how it is written. Pure.

    /paddle_ft/<group>/serving/replicas/<name>   ReplicaRecord  leased, written by that replica only
    /paddle_ft/<group>/serving/primary           name           leased; mod_revision is the term
    /paddle_ft/<group>/serving/insync            InSync         written by the primary only
    /paddle_ft/<group>/serving/promote           Promote        asked for by an operator, leased
    /paddle_ft/<group>/serving/lost              Lost           what the state has lost last
    /paddle_ft/<group>/serving/level             Level          how the group is served
    /paddle_ft/<group>/serving/models/<model>    Published      the newest, by its publisher

Invariant: the primary's writes compare the primary key's mod_revision (its term). Only a campaign,
a hand-over and a forced promotion write that key, so each of them begins a term of its own.

A replica's name is ``node.place-incarnation``: its log is in memory, so a process that comes back
is another replica. No two that live have the same node and place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast, get_args

from paddle_ft.coordination.kv import Compare, Delete, KeyValue, Put, Transaction
from paddle_ft.types import decode, encode

T = TypeVar("T")

ROOT = "/paddle_ft"
Level = Literal["active-active", "hot-standby", "cold-standby"]
Condition = Literal["loading", "standby", "ready", "degraded", "draining"]
"""Standby: it has the files, and starts workers once it is needed (cold-standby)."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one group; ``prefix`` ends in a slash, so no group contains another."""

    group: str

    @property
    def prefix(self) -> str:
        return f"{ROOT}/{self.group}/serving/"

    def replica(self, name: str) -> str:
        return f"{self.prefix}replicas/{name}"

    @property
    def replicas(self) -> str:
        """Begins the key of every replica."""
        return f"{self.prefix}replicas/"

    def model(self, name: str) -> str:
        return f"{self.prefix}models/{name}"

    @property
    def primary(self) -> str:
        return f"{self.prefix}primary"

    @property
    def in_sync(self) -> str:
        return f"{self.prefix}insync"

    @property
    def promote(self) -> str:
        return f"{self.prefix}promote"

    @property
    def lost(self) -> str:
        return f"{self.prefix}lost"

    @property
    def level(self) -> str:
        return f"{self.prefix}level"


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """One replica, as the others and the gateway see it."""

    name: str
    host: str
    http_port: int
    grpc_port: int
    peer_port: int
    """Of the state broadcast."""
    condition: Condition = "loading"
    weight: int = 1
    """Requests it takes, relative to others."""
    share: float = 1.0
    """Below 1 while it is let in slowly after a fail-over (gray recovery)."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Version served, by model."""
    term: int = 0
    sequence: int = 0
    """``term`` and ``sequence`` are those of its log's last entry."""
    link: str = ""
    """host:port where its death is seen at once (``agent.peers``)."""
    progress: float = 1.0
    """Of what it is loading."""
    reason: str = ""
    """Why it is degraded, or is not let in."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """The version, by model, that the group wants and that it cannot serve."""
    outlived: tuple[str, ...] = ()
    """Of those that are in sync, the ones that this replica takes the place of: they have ended."""

    @property
    def node(self) -> str:
        """What stays when the process is started again."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class InSync:
    """Who has all acknowledged entries."""

    term: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """The newest version of a model, as its publisher has registered it."""

    version: int
    store: str = ""
    """Its URL."""
    at: float = 0.0
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Promote:
    """An operator's wish; it is gone once it is fulfilled."""

    target: str
    """A replica's name."""
    force: bool = False
    """Whoever the primary is, and even if acknowledged entries are lost with it."""
    refused: str = ""
    """The primary's answer: why it cannot be."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Acknowledged changes may be gone since then."""

    names: tuple[str, ...]
    """Who had all of them."""
    at_s: float
    """Unix time."""
    forced: bool = False
    """By a person; else because all of ``names`` had ended."""


@dataclass(frozen=True, slots=True)
class Group:
    """A serving group at one revision of etcd."""

    replicas: Mapping[str, ReplicaRecord] = field(default_factory=dict)
    primary: str | None = None
    term: int = 0
    """mod_revision of the primary's key; 0: there is none."""
    primary_lease: int = 0
    """Under which that key stands."""
    in_sync: InSync | None = None
    level: Level = "active-active"
    level_revision: int = 0
    """mod_revision; 0: nobody has chosen one."""
    published: Mapping[str, Published] = field(default_factory=dict)
    in_sync_revision: int = 0
    """mod_revision; 0: there is no record."""
    promote: Promote | None = None
    promote_revision: int = 0
    promote_lease: int = 0
    """Of whoever waits for it."""
    lost: Lost | None = None
    leases: Mapping[str, int] = field(default_factory=dict)
    """Of each replica."""
    since: Mapping[str, int] = field(default_factory=dict)
    """create_revision of each replica's record: the newest of a node is the one that runs."""
    revision: int = 0
    """etcd's, when it was so."""


def parse(keys: Keys, kvs: Iterable[KeyValue], revision: int = 0) -> Group:
    """The group that ``kvs`` (all keys below ``keys.prefix``) describes.

    Raises ValueError, naming the key, when a value is not what this version writes there.
    """
    replicas: dict[str, ReplicaRecord] = {}
    leases: dict[str, int] = {}
    since: dict[str, int] = {}
    published: dict[str, Published] = {}
    single: dict[str, KeyValue] = {}
    for kv in kvs:
        if kv.key.startswith(keys.replicas):
            name = kv.key[len(keys.replicas) :]
            replicas[name] = _decoded(ReplicaRecord, kv)
            leases[name], since[name] = kv.lease, kv.create_revision
        elif kv.key.startswith(keys.model("")):
            with suppress(ValueError):  # whatever publishers write, the group goes on
                published[kv.key[len(keys.model("")) :]] = _decoded(Published, kv)
        else:
            single[kv.key] = kv
    primary = single.get(keys.primary)
    in_sync = single.get(keys.in_sync)
    promote = single.get(keys.promote)
    level = single.get(keys.level)
    lost = single.get(keys.lost)
    return Group(
        replicas=replicas,
        primary=primary.value.decode(errors="replace") if primary else None,
        term=primary.mod_revision if primary else 0,
        primary_lease=primary.lease if primary else 0,
        in_sync=_decoded(InSync, in_sync) if in_sync else None,
        level=_level(level),
        level_revision=level.mod_revision if level else 0,
        published=published,
        in_sync_revision=in_sync.mod_revision if in_sync else 0,
        promote=_decoded(Promote, promote) if promote else None,
        promote_revision=promote.mod_revision if promote else 0,
        promote_lease=promote.lease if promote else 0,
        lost=_decoded(Lost, lost) if lost else None,
        leases=leases,
        since=since,
        revision=revision,
    )


def _level(kv: KeyValue | None) -> Level:
    for level in get_args(Level):
        if kv is not None and kv.value == level.encode():
            return cast(Level, level)
    if kv is not None:
        raise ValueError(f"{kv.key} holds none of {', '.join(get_args(Level))}")
    return "active-active"


def named(group: Group, target: str) -> str | None:
    """The replica of that name, or the newest one of that node."""
    names = [n for n, record in group.replicas.items() if target in (n, record.node)]
    return max(names, key=lambda n: group.since.get(n, 0), default=None)


@lru_cache(maxsize=1024)
def _value(kind: type[Any], data: bytes) -> Any:
    """Most values are as they were at the last look."""
    return decode(kind, data)


def _decoded(kind: type[T], kv: KeyValue) -> T:
    try:
        hashable: Any = kind
        value: T = _value(hashable, kv.value)
        return value
    except ValueError as error:
        raise ValueError(f"{kv.key} does not hold a {kind.__name__}: {error}") from error


# ---------------------------------------------------------------- one transaction for each write


def register(keys: Keys, record: ReplicaRecord, lease: int) -> Transaction:
    """What a replica says of itself; nobody else writes it."""
    return Transaction((), (Put(keys.replica(record.name), encode(record), lease),))


def campaign(keys: Keys, group: Group, me: str, lease: int) -> Transaction:
    """Takes the primary key if nobody has it, and who is in sync is as it was decided upon."""
    puts: list[Put | Delete] = [Put(keys.primary, me.encode(), lease)]
    if group.in_sync is None:
        puts.append(Put(keys.in_sync, encode(InSync(0, (me,)))))
    compares = (
        Compare(keys.primary, "mod_revision", 0),
        Compare(keys.in_sync, "mod_revision", group.in_sync_revision),
    )
    return Transaction(compares, tuple(puts))


def begin(keys: Keys, group: Group, me: str, lease: int, at_s: float) -> Transaction:
    """As ``campaign``, when all that were in sync have ended: what they had is lost."""
    assert group.in_sync is not None
    return Transaction(
        campaign(keys, group, me, lease).compares,
        (
            Put(keys.primary, me.encode(), lease),
            Put(keys.in_sync, encode(InSync(0, (me,)))),
            Put(keys.lost, encode(Lost(group.in_sync.names, at_s))),
        ),
    )


def record(keys: Keys, in_sync: InSync, in_sync_revision: int) -> Transaction:
    """The primary's: who is in sync from now on."""
    compares = (
        Compare(keys.primary, "mod_revision", in_sync.term),
        Compare(keys.in_sync, "mod_revision", in_sync_revision),
    )
    return Transaction(compares, (Put(keys.in_sync, encode(in_sync)),))


def hand_over(keys: Keys, group: Group, in_sync_revision: int, target: str) -> Transaction:
    """The primary's: ``target``, which is in sync and has everything, is the primary from now on.

    It is written under the target's own lease; LeaseLost if that has ended.
    """
    compares = (
        Compare(keys.primary, "mod_revision", group.term),
        Compare(keys.in_sync, "mod_revision", in_sync_revision),
        Compare(keys.promote, "mod_revision", group.promote_revision),
    )
    put = Put(keys.primary, target.encode(), group.leases[target])
    return Transaction(compares, (put, Delete(keys.promote)))


def refuse(keys: Keys, group: Group, why: str) -> Transaction:
    """The primary's answer to a wish for promotion that cannot be fulfilled.

    Under the lease of the wish: LeaseLost if nobody waits for it any more.
    """
    assert group.promote is not None
    answer = Promote(group.promote.target, group.promote.force, why)
    compares = (
        Compare(keys.primary, "mod_revision", group.term),
        Compare(keys.promote, "mod_revision", group.promote_revision),
    )
    put = Put(keys.promote, encode(answer), group.promote_lease)
    return Transaction(compares, (put,))


def force(keys: Keys, group: Group, me: str, lease: int, at_s: float) -> Transaction:
    """Takes the primary key from whoever has it; who is in sync is this replica alone then.

    Unless it was in sync already: then nothing is lost, and the others stay in the record.
    """
    compares = (
        Compare(keys.primary, "mod_revision", group.term),
        Compare(keys.in_sync, "mod_revision", group.in_sync_revision),
        Compare(keys.promote, "mod_revision", group.promote_revision),
    )
    puts: list[Put | Delete] = [Put(keys.primary, me.encode(), lease), Delete(keys.promote)]
    if group.in_sync is None or me not in group.in_sync.names:
        puts.append(Put(keys.in_sync, encode(InSync(0, (me,)))))
        if group.in_sync is not None:
            puts.append(Put(keys.lost, encode(Lost(group.in_sync.names, at_s, forced=True))))
    return Transaction(compares, tuple(puts))


def publish(keys: Keys, name: str, now: Published, before: KeyValue | None) -> Transaction | None:
    """Makes ``now`` what the group knows of a model; None if ``before`` is as new or newer.

    Numbers of versions are those of one store: what is published to another one always counts.
    """
    if before is not None:
        known = _decoded(Published, before)
        if known.store == now.store and known.version >= now.version:
            return None
    key = keys.model(name)
    revision = before.mod_revision if before is not None else 0
    return Transaction((Compare(key, "mod_revision", revision),), (Put(key, encode(now)),))


def wish(keys: Keys, promote: Promote, lease: int) -> Transaction:
    """An operator's wish; a newer one takes the place of an older one.

    ``lease`` is its own: it ends with whoever waits for it, who revokes it to take the wish back. A
    wish that was left would be fulfilled when nobody wants it any more.
    """
    return Transaction((), (Put(keys.promote, encode(promote), lease),))


def choose(keys: Keys, level: Level, group: Group | None = None) -> Transaction:
    """How the group is served from now on; with ``group``, unless that has been chosen since."""
    compares: tuple[Compare, ...] = ()
    if group is not None:
        compares = (Compare(keys.level, "mod_revision", group.level_revision),)
    return Transaction(compares, (Put(keys.level, level.encode()),))


def forget(keys: Keys, group: Group, in_sync_revision: int) -> Transaction:
    """The primary's, as the last replica, when it is stopped: the group ends, and its state."""
    compares = (
        Compare(keys.primary, "mod_revision", group.term),
        Compare(keys.in_sync, "mod_revision", in_sync_revision),
    )
    gone = (keys.in_sync, keys.promote, keys.lost)
    return Transaction(compares, tuple(Delete(key) for key in gone))
