"""What etcd holds about one serving group, and how it is written.

    /paddle_ft/<group>/serving/replicas/<name>   ReplicaRecord  leased, written by that replica only
    /paddle_ft/<group>/serving/primary           name           leased; create_revision is the term
    /paddle_ft/<group>/serving/insync            InSync         written by the primary only
    /paddle_ft/<group>/serving/promote           Promote        asked for by an operator
    /paddle_ft/<group>/serving/models/<model>    published      versions known to the group

Invariant: the primary's writes compare the primary key's create_revision (its term).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ROOT = "/paddle_ft"
Level = Literal["active-active", "hot-standby", "cold-standby"]
Condition = Literal["loading", "ready", "degraded", "draining"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one group; ``prefix`` ends in a slash, so no group contains another."""

    group: str

    @property
    def prefix(self) -> str:
        return f"{ROOT}/{self.group}/serving/"

    def replica(self, name: str) -> str:
        return f"{self.prefix}replicas/{name}"

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
    """Of its log's last entry."""


@dataclass(frozen=True, slots=True)
class InSync:
    """Who has all acknowledged entries."""

    term: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A serving group at one revision of etcd."""

    replicas: Mapping[str, ReplicaRecord] = field(default_factory=dict)
    primary: str | None = None
    term: int = 0
    """create_revision of the primary's key; 0: there is none."""
    in_sync: InSync | None = None
    level: Level = "active-active"
