"""Which replica tries to become the primary, and when. Pure.

Only who is in sync may (``broadcast``); etcd lets one of them. Who is furthest goes first, so that
fewest entries that nobody has been promised are lost; the others follow after a moment, should it
have died, too.

The lease of a primary ends without its death, too: when it is cut off from etcd, or when etcd was
away. So a lease alone gives no reason: who still hears from the primary waits, until it has heard
nothing for HOLD_S or knows that the process is dead.

Once each of those in sync has ended, nobody has the state, and nobody could ever be the primary
again. Then the group begins anew with whoever is furthest of those that are there. Who has merely
fallen silent has not ended: only the process that took its place can know that it has, since no two
that live have the same node and place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paddle_ft.serve.broadcast import HOLD_S
from paddle_ft.serve.log import Position
from paddle_ft.serve.registry import Group, ReplicaRecord

HEAD_START_S = 0.15
"""How long each candidate waits for those before it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    last: Position
    ready: bool
    """Its models are loaded and warm."""


@dataclass(frozen=True, slots=True)
class Election:
    """What a replica sees. ``in_sync`` None: there has never been a record."""

    me: str
    candidates: Mapping[str, Candidate]
    """Replicas that are registered."""
    in_sync: frozenset[str] | None
    primary: str = ""
    vacant_since_s: float = 0.0
    handed_to: str = ""
    """The replica that a planned promotion has named."""
    heard_s: float = float("-inf")
    """When this replica has last followed a primary."""
    dead: bool = False
    """That primary's process is known to have ended."""
    observe_s: float = HOLD_S


def stands(election: Election, now_s: float) -> bool:
    """Whether this replica should try to take the primary key now."""
    me = election.candidates.get(election.me)
    if election.primary or me is None:
        return False
    if not election.dead and now_s - election.heard_s <= max(HOLD_S, election.observe_s):
        return False
    if election.handed_to in election.candidates and _may(election, election.handed_to):
        return election.handed_to == election.me
    order = sorted(
        (c for c in election.candidates.values() if _may(election, c.name)),
        key=lambda c: (not c.ready, -c.last.term, -c.last.sequence, c.name),
    )
    names = [c.name for c in order]
    if election.me not in names:
        return False
    return now_s - election.vacant_since_s >= names.index(election.me) * HEAD_START_S


def _may(election: Election, name: str) -> bool:
    return election.in_sync is None or name in election.in_sync


def next_primary(group: Group, but: Iterable[str] = ()) -> str | None:
    """Who would lose least, of those in sync that can be it and are not, nor in ``but``."""
    in_sync = set(group.in_sync.names if group.in_sync else ()) - {group.primary, *but}
    others = [r for n, r in group.replicas.items() if n in in_sync and fit(r)]
    best = max(others, key=lambda r: (r.condition == "ready", r.term, r.sequence), default=None)
    return best.name if best is not None else None


def fit(record: ReplicaRecord) -> bool:
    """Whether it has what it takes to be the primary."""
    return record.condition in ("standby", "ready", "degraded")


def outlived(me: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that ``me`` has taken the place of, and that therefore have ended."""
    place = me.rpartition("-")[0]
    return tuple(sorted(n for n in names if place and n != me and n.rpartition("-")[0] == place))


def ended(group: Group) -> set[str]:
    """Those of whom it is known, from who has taken their places."""
    return {name for record in group.replicas.values() for name in record.outlived}


def all_ended(group: Group) -> bool:
    """Whether each of those in sync is known to have ended, so that nobody has the state."""
    return group.in_sync is not None and ended(group).issuperset(group.in_sync.names)
