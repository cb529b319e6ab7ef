"""Deletes what ``retention`` calls garbage, and tells owners that are over from those alive.

``owners/<owner>.json`` says where an owner began, ``owners/<owner>.over.json`` that it will never
write again. Everything here may be cut off at any point and be repeated.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Iterable

from paddle_ft.checkpoint import commit, layout
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.manifest import FORMAT, Manifest, canonical, decode_manifest
from paddle_ft.checkpoint.plan import kept
from paddle_ft.checkpoint.retention import Roots, garbage
from paddle_ft.checkpoint.store import ObjectInfo, Store, naming_the_store
from paddle_ft.errors import CheckpointDamaged, StoreMissing
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, Head

_log = logging.getLogger(__name__)
QUIET_S = 86_400.0
"""An owner that has written nothing for so long is taken for dead by the others on its store."""
_READ_THREADS = 8


def release(store: Store, owner: str) -> None:
    """Notes that ``owner`` will never write again, so that its garbage need not wait a day.

    For a job whose etcd ends with it; never while another process might go on under this owner.
    """
    store.put(layout.over_name(owner), canonical({"format": FORMAT, "kind": "over"}))


def collect(
    store: Store, head: Head, owner: str, *, quiet_s: float = QUIET_S, dry_run: bool = False
) -> list[str]:
    """Deletes garbage and gives the names; ``head`` is one that ``owner`` has committed.

    Raises CheckpointDamaged, and deletes nothing, if a manifest that ``head`` keeps cannot be
    read; StoreError.
    """
    # The marker must be there before pins are looked at: see ``commit.pin``.
    commit.mark_committed(store, head)
    failpoint("collect.marked")
    pinned = commit.pins(store)
    infos = [i for i in store.find("") if layout.parse(i.name)]
    roots, indebted = _roots(store, head, owner, pinned, infos, quiet_s)
    doomed = garbage((i.name for i in infos), roots)
    if not indebted:
        # Nothing that was adopted is referred to any more: the pins of adoption have served.
        parsed = ((i.name, layout.parse(i.name)) for i in infos)
        doomed += [n for n, p in parsed if p and (p.kind, p.owner) == ("pin", owner)]
    if not dry_run:
        failpoint("collect.before")
        for _, group in itertools.groupby(doomed, key=lambda name: name.partition("/")[0]):
            store.delete(list(group))
            failpoint("collect.deleted")
        store.sweep()
    return doomed


def _roots(
    store: Store,
    head: Head,
    owner: str,
    pinned: Iterable[str],
    infos: list[ObjectInfo],
    quiet_s: float,
) -> tuple[Roots, bool]:
    """What must stay; and whether the head still refers to anything of another owner."""
    required = {r.manifest: r for r in (head.newest, *head.lineage)}
    rivals = _rivals((i.name for i in infos), owner, commit.base_of(store, owner))
    readable = _read_all(store, required, (set(pinned) | rivals) - set(required))
    foreign: frozenset[str] = frozenset()
    if rivals <= readable.keys():
        foreign = _over(store, infos, owner, quiet_s)
    used = itertools.chain(required, *(readable[name].objects for name in required))
    parsed = (layout.parse(name) for name in used)
    roots = Roots(
        owner=owner,
        sequence=head.newest.sequence,
        manifests=kept(head) | frozenset(pinned) | rivals,
        objects=frozenset(name for m in readable.values() for name in m.objects),
        foreign=foreign,
    )
    return roots, any(p is not None and p.owner != owner for p in parsed)


def _read_all(
    store: Store, required: dict[str, CommitRef], others: Iterable[str]
) -> dict[str, Manifest]:
    """The manifests by name. One of ``others`` that cannot be read is left out, loudly."""

    def read(name: str) -> tuple[str, Manifest | None]:
        if name in required:
            return name, commit.read_manifest(store, required[name])
        try:
            return name, decode_manifest(store.get(name), f"{store.url}/{name}")
        except (CheckpointDamaged, StoreMissing) as error:
            _log.warning("%s", error)
            return name, None

    with Crew(_READ_THREADS, "collect") as pool:
        found = dict(pool.map(read, [*required, *others]))
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _rivals(names: Iterable[str], owner: str, base: int | None) -> frozenset[str]:
    """What others have committed after this owner began (ever, if it is not known when)."""
    return frozenset(
        parsed.manifest
        for name in names
        if (parsed := layout.parse(name)) is not None
        and parsed.kind == "commit"
        and parsed.owner != owner
        and (base is None or parsed.sequence > base)
    )


def _over(store: Store, infos: list[ObjectInfo], owner: str, quiet_s: float) -> frozenset[str]:
    """Other owners that are over, or silent for ``quiet_s`` by the store's own clock."""
    last: dict[str, float] = {}
    over: set[str] = set()
    for info in infos:
        parsed = layout.parse(info.name)
        assert parsed is not None
        if parsed.kind == "over":
            over.add(parsed.owner)
        elif parsed.kind != "pin" or parsed.owner in last:
            last[parsed.owner] = max(last.get(parsed.owner, 0.0), info.modified_s)
    if not last.keys() - {owner}:
        return frozenset()
    now_s = _now_s(store)
    quiet = {name for name, at_s in last.items() if 0 < at_s < now_s - quiet_s}
    return frozenset((over | quiet) - {owner})


def _now_s(store: Store) -> float:
    """The store's clock; 0 if it has none."""
    name = f"probe-{secrets.token_hex(8)}"
    with naming_the_store(name):
        store.put(name, b"")
        try:
            return max((info.modified_s for info in store.find(name)), default=0.0)
        finally:
            store.delete([name])
