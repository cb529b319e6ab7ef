"""Which checkpoint is complete where, when a commit is durable on local disks before the store.

Pure. **Invariant: the store lags behind, it is never out of order.** A marker comes into it only
when everything that its manifest refers to is there, and only heads whose marker is there are
collected upon. So the store is at any moment one that a job without a backlog could have left, and
what ``retention`` shows of its collector holds unchanged.

*Settled* is a checkpoint whose marker is in the store. The head's lineage always keeps the newest
one that is known to be, whatever retention says: it is where a job goes on whose disks are gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from paddle_ft.checkpoint import layout
from paddle_ft.types import CommitRef, Head

LINEAGE_MAX = 1000
"""Commits that a head names at most: a value in etcd holds 1.5 MB, about five times as much."""
_ORDER = {"data": 0, "part": 1, "manifest": 2, "signature": 3, "commit": 4}


def waits(kind: str, shared: bool) -> bool:
    """Whether an object of ``kind`` is durable on the local disk already.

    In a ``shared`` job the others read parts, manifests and signatures at once: only the bulk, and
    the marker that must not come before it, are kept back.
    """
    return kind in (("data", "commit") if shared else _ORDER)


def turns(names: Iterable[str]) -> list[tuple[str, ...]]:
    """What waits, in the order of commits: objects of one turn may go at the same time."""
    found = []
    for name in names:
        parsed = layout.parse(name)
        if parsed is not None and parsed.kind in _ORDER:
            found.append(((parsed.sequence, _ORDER[parsed.kind]), name))
    result: list[tuple[str, ...]] = []
    for (_, kind), group in itertools.groupby(sorted(found), key=lambda item: item[0]):
        members = tuple(name for _, name in group)
        result += [members] if kind < _ORDER["commit"] else [(name,) for name in members]
    return result


def missing(objects: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of ``objects`` (name -> bytes, of a manifest) that are not among ``sizes`` whole."""
    return tuple(sorted(n for n, nbytes in objects.items() if sizes.get(n, -1) < nbytes))


def protected(
    head: Head | None,
    base: CommitRef | None,
    lineage: Sequence[CommitRef],
    settled: int,
) -> tuple[CommitRef, ...]:
    """``lineage`` of the commit that continues ``base``, and the newest settled checkpoint with it.

    ``settled`` is the sequence of the newest commit that is known to be (a later one may be, too).
    Where ``head`` keeps none that is known to be, all it keeps stay.
    """
    if head is None or base is None:
        return tuple(lineage)
    chain = [c for c in (head.newest, *head.lineage) if c.sequence <= base.sequence]
    safe = [c for c in chain if c.sequence <= settled]
    wanted = {*lineage, *(safe[:1] or chain)}
    ordered = sorted(wanted, key=lambda c: c.sequence, reverse=True)
    if len(ordered) > LINEAGE_MAX:
        ordered = [*ordered[: LINEAGE_MAX - 1], ordered[-1]]
    return tuple(ordered)
