"""What makes a checkpoint one: the store's identity, markers, pins, and finding the newest.

With etcd, ``head`` is the truth and is moved by the fenced transaction; the marker follows it, so
that a job whose etcd is gone (a private etcd ends with its launcher) finds its checkpoints again.
Without etcd (``checkpoint.standalone``) the newest marker is the head.

**Owners.** Each history of heads has an owner, a random name in all it writes. A job keeps it in
etcd beside the store's identity (``binding``); a process that saves on its own makes one. An owner
that begins with another's checkpoint first pins it (``adopt``), so that the other's collector,
should the other be alive after all, leaves it alone.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.manifest import FORMAT, Manifest, canonical, decode_manifest
from paddle_ft.checkpoint.plan import kept
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import Store
from paddle_ft.checkpoint.write import digest_of
from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, Head, decode, encode

_log = logging.getLogger(__name__)
_READ_THREADS = 8
_LOOKS_MAX = 50
_BINDING = re.compile(r"([0-9a-f]{32})\.([A-Za-z0-9_]{1,64})\Z")


# ---------------------------------------------------------------- identity and owner


def identify(store: Store) -> str:
    """The identity of ``store``, which is made by whoever comes first."""
    try:
        return identity_in(store)
    except StoreMissing:
        fresh = {"format": FORMAT, "identity": secrets.token_hex(16)}
        store.put(layout.STORE, canonical(fresh), if_absent=True)
        return identity_in(store)


def identity_in(store: Store) -> str:
    """The identity of ``store``; raises StoreMissing if it has none."""
    content = store.get(layout.STORE)
    where = f"{store.url}/{layout.STORE}"
    wire = _json(content, where)
    identity = wire.get("identity")
    if wire.get("format") != FORMAT:
        raise ConfigError(
            f"{where} has format {wire.get('format')!r}, which this version cannot use; use the "
            f"version of paddle_ft that wrote it or another directory."
        )
    if not isinstance(identity, str) or not re.fullmatch(r"[0-9a-f]{32}", identity):
        raise CheckpointDamaged(f"{where} is damaged; restore it or use another directory.")
    return identity


def new_owner() -> str:
    """A name for a new history of heads."""
    return secrets.token_hex(6)


def binding(store: Store) -> str:
    """What a new job puts into etcd (``claim_store``): the store's identity and a new owner."""
    return f"{identify(store)}.{new_owner()}"


def bound(store: Store, value: str) -> str:
    """The owner in ``value``, which etcd holds.

    Raises CheckpointMismatch if the job is bound to another store.
    """
    match = _BINDING.match(value)
    identity = identify(store)
    if match is None or match[1] != identity:
        raise CheckpointMismatch(
            f"This job keeps its checkpoints in another store than {store.url}; give all nodes "
            f"the same --checkpoint, or the job another --job_id."
        )
    return match[2]


# ---------------------------------------------------------------- markers


def mark_committed(store: Store, head: Head) -> None:
    """Stores the marker of ``head.newest``. Harmless to repeat; do it after head has moved."""
    told = json.loads(encode(head))
    digest = digest_of(canonical(told))
    wire = {"format": FORMAT, "kind": "commit", "head": told, "digest": digest}
    failpoint("commit.before_marker")
    store.put(layout.commit_name(head.newest.manifest), canonical(wire))
    failpoint("commit.marked")


def read_marker(store: Store, name: str) -> Head:
    """The head a marker speaks of; raises CheckpointDamaged, StoreMissing."""
    where = f"{store.url}/{name}"
    wire = _json(store.get(name), where)
    try:
        if wire.get("format") != FORMAT or wire.get("kind") != "commit":
            raise ValueError("not a marker of this format")
        if digest_of(canonical(wire["head"])) != wire["digest"]:
            raise ValueError("altered")
        head = decode(Head, canonical(wire["head"]))
        if layout.commit_name(head.newest.manifest) != name:
            raise ValueError("name and content differ")
    except (KeyError, ValueError):
        raise CheckpointDamaged(f"{where} is damaged; use an older checkpoint.") from None
    parsed = layout.parse(name)
    assert parsed is not None
    if (parsed.sequence, parsed.step) != (head.newest.sequence, head.newest.step):
        raise CheckpointDamaged(f"{where} is damaged; use an older checkpoint.")
    return head


def marker_names(store: Store) -> list[str]:
    """All markers, newest first; nothing is read but the listing."""
    names = [info.name for info in store.find(layout.COMMITS)]
    return sorted((n for n in names if layout.parse(n)), reverse=True)


def list_commits(store: Store) -> list[CommitRef]:
    """All committed checkpoints, newest first; a damaged marker is left out, loudly."""
    return [head.newest for head in _heads(store, lambda names: names)]


def newest_head(store: Store) -> Head | None:
    """The head as the newest readable marker has it; None if the store holds no checkpoint."""
    for count in (1, None):
        heads = _heads(store, lambda names, count=count: names[:count])  # type: ignore[misc]
        if heads:
            return heads[0]
    return None


def _heads(store: Store, choose: Callable[[list[str]], list[str]]) -> list[Head]:
    """The heads of the markers chosen from all names; damaged ones are left out, loudly.

    If a marker goes between the listing and the look at it, newer ones have come meanwhile, and
    everything is looked at again: what is there is never taken for nothing.
    """

    def read(name: str) -> Head | None:
        try:
            return read_marker(store, name)
        except CheckpointDamaged as error:
            _log.warning("%s", error)
            return None

    with Crew(_READ_THREADS, "markers") as pool:
        for _ in range(_LOOKS_MAX):
            with suppress(StoreMissing):
                found = list(pool.map(read, choose(marker_names(store))))
                return [head for head in found if head is not None]
    raise StoreUnavailable(f"The markers in {store.url} change all the time; try again.")


def read_manifest(store: Store, ref: CommitRef, trust: Trust | None = None) -> Manifest:
    """The manifest ``ref`` speaks of; raises CheckpointDamaged if it is missing or altered.

    Its signature is looked at only if ``trust`` is given, as everybody does who loads.
    """
    where = f"{store.url}/{ref.manifest}"
    try:
        content = store.get(ref.manifest)
    except StoreMissing:
        raise CheckpointDamaged(f"{where} is not there; use another checkpoint.") from None
    if digest_of(content) != ref.digest:
        raise CheckpointDamaged(
            f"{where} is damaged (its sha256 is not that of the commit); use an older checkpoint."
        )
    if trust is not None:
        trust.check(store, ref.manifest, content)
    manifest = decode_manifest(content, where)
    if (manifest.sequence, manifest.step) != (ref.sequence, ref.step):
        raise CheckpointDamaged(f"{where} is of another commit; use an older checkpoint.")
    return manifest


# ---------------------------------------------------------------- pins and adoption


def pin(store: Store, ref: CommitRef, who: str, reason: str = "") -> None:
    """Keeps the checkpoint ``ref`` until ``unpin``; raises CheckpointMismatch if it is too late.

    It is too late when a head that no longer keeps the checkpoint has been marked: its collector
    may have looked for pins already (``retention``).
    """
    # A name of its own for each pin, so that taking back one that is too late undoes no other.
    name = layout.pin_name(ref.manifest, who, secrets.token_hex(4))
    wire = {"format": FORMAT, "kind": "pin", "ref": json.loads(encode(ref)), "reason": reason}
    store.put(name, canonical(wire))
    failpoint("pin.stored")
    for head in _heads(store, lambda names: [n for n in names if _sequence(n) > ref.sequence]):
        if ref.manifest not in kept(head) and _descends(store, head, ref):
            store.delete([name])
            raise CheckpointMismatch(
                f"{store.url}/{ref.manifest} is no longer kept and cannot be pinned; pin a newer "
                f"checkpoint."
            )


def _descends(store: Store, head: Head, ref: CommitRef) -> bool:
    """Whether ``ref`` may once have been kept by the history of ``head``."""
    mine, other = layout.parse(head.newest.manifest), layout.parse(ref.manifest)
    if mine is None or other is None or mine.owner == other.owner:
        return True
    base = base_of(store, mine.owner)
    return base is None or base >= ref.sequence


def unpin(store: Store, manifest: str, who: str) -> None:
    """Takes back all pins of ``manifest`` by ``who``."""
    found = ((i.name, layout.parse(i.name)) for i in store.find(layout.PINS))
    store.delete([n for n, p in found if p and (p.manifest, p.owner) == (manifest, who)])


def pins(store: Store) -> dict[str, frozenset[str]]:
    """The pinned manifests, each with those who pinned it."""
    result: dict[str, frozenset[str]] = {}
    for info in store.find(layout.PINS):
        if parsed := layout.parse(info.name):
            owners = result.get(parsed.manifest, frozenset())
            result[parsed.manifest] = owners | {parsed.owner}
    return result


def adopt(store: Store, owner: str) -> Head | None:
    """The newest head in ``store`` for a job whose etcd knows none; None: begin from nothing.

    What another owner wrote is pinned first, as ``owner``; where the owner begins is noted.
    """
    for _ in range(20):
        head = newest_head(store)
        if head is None:
            _begin(store, owner, 0)
            return None
        parsed = layout.parse(head.newest.manifest)
        if parsed is not None and parsed.owner == owner:
            return head
        if not _pinned(store, head.newest, owner):
            continue  # Another writer is at work; its newer head is the one to begin from.
        lineage = tuple(ref for ref in head.lineage if _pinned(store, ref, owner))
        _begin(store, owner, head.newest.sequence)
        return replace(head, lineage=lineage)
    raise StoreUnavailable(
        f"Another job is writing checkpoints to {store.url} all the time; give each job a "
        f"directory or prefix of its own."
    )


def _begin(store: Store, owner: str, base: int) -> None:
    """Notes that ``owner`` begins upon the commit ``base``; the first note stands."""
    wire = {"format": FORMAT, "kind": "owner", "base": base}
    store.put(layout.owner_name(owner), canonical(wire), if_absent=True)


def base_of(store: Store, owner: str) -> int | None:
    """The commit upon which ``owner`` began, 0 for none; None if that is not known."""
    try:
        base = json.loads(store.get(layout.owner_name(owner)))["base"]
    except (StoreMissing, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, int) else None


def _pinned(store: Store, ref: CommitRef, owner: str) -> bool:
    try:
        pin(store, ref, owner, "adopted")
    except CheckpointMismatch:
        return False
    return True


def _sequence(name: str) -> int:
    parsed = layout.parse(name)
    return parsed.sequence if parsed else -1


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        wire = json.loads(content)
    except (ValueError, RecursionError):
        wire = None
    if not isinstance(wire, dict):
        raise CheckpointDamaged(f"{where} is damaged (not JSON); use an older checkpoint.")
    return wire


def first_intact(store: Store, refs: Iterable[CommitRef]) -> tuple[CommitRef, Manifest] | None:
    """The first of ``refs`` whose manifest is readable; what is skipped is logged."""
    for ref in refs:
        try:
            return ref, read_manifest(store, ref)
        except CheckpointDamaged as error:
            _log.warning("%s", error)
    return None
