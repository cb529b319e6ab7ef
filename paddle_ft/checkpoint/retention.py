"""Which checkpoints are kept, and which objects are garbage.

Pure. **Invariant: no object is deleted that a checkpoint which can still be loaded, or can still
be committed, refers to** — whoever runs the collector, however old its view is.

*One owner.* Let the head's sequence be h; it grows with each commit, and what retention drops from
the head's lineage never comes back. With W = IN_FLIGHT_SEQUENCES:

1. A commit upon head h takes only parts begun for a sequence > h - W, whose other objects belong
   to a manifest the head still keeps (``plan.merge`` refuses all else; the fenced transaction sees
   to it that h is still the head).
2. A collector that knows the head at h' (perhaps long past) deletes data and parts with a sequence
   <= h' - W that no manifest kept at h' refers to, and manifests, signatures and markers with a
   sequence <= h' that are not kept at h'.

Suppose the manifest of head h > h' refers to an object with sequence s <= h' - W. It came in with
a commit c upon a head p < s + W <= h'; c is the first after p, so c <= h'. At every commit after c
it was taken over from a manifest kept by the head, that is from one which at h' either was
kept itself, or came later and took the object over in its turn; so by induction some manifest kept
at h' refers to it, and the collector leaves it. A manifest that is still to be committed has a
sequence > h'. Hence a leader that wakes up after its successor has committed collects only garbage.

*Several owners* (two jobs on one URL, or a job that begins with what another left): data of
another owner is touched only if that owner has been silent for ``quiet_s`` by the store's clock or
has said that it is over, and nothing kept, pinned or marked by anyone after the point where this
owner began refers to it. An owner pins what it adopts before it relies on it, and looks at the
markers again afterwards; a collector marks its head before it looks at the pins. So either the
collector sees the pin, or the one who pins sees that he is too late (``commit.pin``).

Markers go first, then manifests, signatures, parts and data: a crash in between leaves garbage,
never a marker without its data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.plan import IN_FLIGHT_SEQUENCES
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import ConfigError
from paddle_ft.types import CommitRef, Head

_ORDER = {
    "commit": 0, "manifest": 1, "signature": 2, "part": 3, "data": 4, "pin": 5, "owner": 6,
    "over": 7,
}  # fmt: skip


# ---------------------------------------------------------------- which checkpoints are kept


@dataclass(frozen=True, slots=True)
class Candidate:
    """A committed checkpoint, as the rules see it."""

    ref: CommitRef
    metrics: Mapping[str, float] = field(default_factory=dict)


class Keep(Protocol):
    """A retention rule: the commits (of ``candidates``, newest first) that it wants kept."""

    def __call__(self, candidates: Sequence[Candidate]) -> frozenset[CommitRef]: ...


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Everything."""

    def __call__(self, candidates: Sequence[Candidate]) -> frozenset[CommitRef]:
        return frozenset(c.ref for c in candidates)


@dataclass(frozen=True, slots=True)
class KeepLast:
    """The ``count`` newest."""

    count: int

    def __call__(self, candidates: Sequence[Candidate]) -> frozenset[CommitRef]:
        return frozenset(c.ref for c in candidates[: self.count])


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """The first one at or after each multiple of ``steps``."""

    steps: int

    def __call__(self, candidates: Sequence[Candidate]) -> frozenset[CommitRef]:
        first: dict[int, CommitRef] = {}
        for candidate in candidates:
            first[candidate.ref.step // self.steps] = candidate.ref
        return frozenset(first.values())


@dataclass(frozen=True, slots=True)
class KeepBest:
    """The ``count`` with the lowest (``highest``: highest) ``metric``; those without it never."""

    metric: str
    count: int
    highest: bool = False

    def __call__(self, candidates: Sequence[Candidate]) -> frozenset[CommitRef]:
        with_metric = [
            c
            for c in candidates
            if c.metrics.get(self.metric, float("nan")) == c.metrics.get(self.metric)
        ]
        ranked = sorted(with_metric, key=lambda c: c.metrics[self.metric], reverse=self.highest)
        return frozenset(c.ref for c in ranked[: self.count])


@dataclass(frozen=True, slots=True)
class KeepAny:
    """What any of ``rules`` wants kept."""

    rules: tuple[Keep, ...]

    def __call__(self, candidates: Sequence[Candidate]) -> frozenset[CommitRef]:
        return frozenset().union(*(rule(candidates) for rule in self.rules))


def rule_of(config: CheckpointConfig) -> Keep:
    """What ``checkpoint.keep`` says, or ``checkpoint.keep_last`` if it says nothing."""
    return parse(config.keep) if config.keep else KeepLast(config.keep_last)


def parse(text: str) -> Keep:
    """The rule in ``text``: any of ``last 3``, ``every 1000 steps``, ``best loss 1`` (the lowest)
    and ``highest accuracy 1``, joined by commas; raises ConfigError for anything else."""
    rules = tuple(_parse_one(part.strip(), text) for part in text.split(","))
    return rules[0] if len(rules) == 1 else KeepAny(rules)


def _parse_one(part: str, text: str) -> Keep:
    match part.split():
        case ["last", count] if _positive(count):
            return KeepLast(int(count))
        case ["every", steps] | ["every", steps, "steps"] if _positive(steps):
            return KeepEvery(int(steps))
        case ["best" | "lowest" | "highest" as which, metric, count] if _positive(count):
            return KeepBest(metric, int(count), highest=which == "highest")
    raise ConfigError(
        f"checkpoint.keep = {text!r}: {part!r} is not one of last 3, every 1000 steps, "
        f"best loss 1 and highest accuracy 1; correct it."
    )


def _positive(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**31


def metrics_of(meta: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The finite numbers in ``meta["metrics"]``, as a CommitRef has them."""
    metrics = meta.get("metrics")
    if not isinstance(metrics, Mapping):
        return ()
    numbers = ((n, float(v)) for n, v in metrics.items() if isinstance(v, int | float))
    return tuple(sorted((n, v) for n, v in numbers if math.isfinite(v)))


def next_head(
    head: Head | None,
    newest: CommitRef,
    keep: Keep,
    store: str,
    metrics: Mapping[int, Mapping[str, float]] | None = None,
) -> Head:
    """The head after committing ``newest``, which is always kept.

    ``metrics`` by sequence, for those that do not carry them.
    """
    known = metrics or {}
    before = (head.newest, *head.lineage) if head else ()
    candidates = [
        Candidate(r, dict(r.metrics) or known.get(r.sequence, {})) for r in (newest, *before)
    ]
    wanted = keep(candidates)
    return Head(newest, tuple(r for r in before if r in wanted), store)


def kept_lineage(
    head: Head | None, base: CommitRef | None, step: int, keep: Keep
) -> tuple[CommitRef, ...]:
    """Ancestors of the commit of ``step`` that stay, newest first, beginning with ``base``.

    Commits that ``base`` does not continue (found damaged) fall out. ``base`` stays whatever the
    rule says: parts that are being written refer to its blocks. The metrics of the commit itself
    are not known yet, so what it outdoes stays until the next one.
    """
    if head is None or base is None:
        return ()
    chain = tuple(c for c in (head.newest, *head.lineage) if c.sequence <= base.sequence)
    if not chain:
        return ()
    coming = CommitRef(head.newest.sequence + 1, step, 0, "", "")
    kept = next_head(Head(chain[0], chain[1:]), coming, keep, head.store).lineage
    return kept if chain[0] in kept else (chain[0], *kept)


# ---------------------------------------------------------------- which objects are garbage


@dataclass(frozen=True, slots=True)
class Roots:
    """What must stay, as far as this owner knows."""

    owner: str
    sequence: int
    """Of the head."""
    manifests: frozenset[str]
    """Kept by the head, pinned, or marked by others after this owner began."""
    objects: frozenset[str]
    """All objects these manifests refer to."""
    foreign: frozenset[str] = frozenset()
    """Other owners that are over or have long been silent."""


def garbage(names: Iterable[str], roots: Roots) -> list[str]:
    """Those of ``names`` that may be deleted, in the order in which they must be."""
    doomed: list[tuple[int, str]] = []
    alive: set[str] = {roots.owner}
    notes: list[tuple[int, str, str]] = []
    for name in names:
        parsed = layout.parse(name)
        if parsed is None:
            continue
        if parsed.kind in ("owner", "over"):
            notes.append((_ORDER[parsed.kind], name, parsed.owner))
        elif _dead(name, parsed, roots):
            doomed.append((_ORDER[parsed.kind], name))
        else:
            alive.add(parsed.owner)
    # The notes of an owner that is over stay as long as anything of it does.
    doomed += [(o, n) for o, n, who in notes if who in roots.foreign and who not in alive]
    return [name for _, name in sorted(doomed)]


def _dead(name: str, parsed: layout.Name, roots: Roots) -> bool:
    mine = parsed.owner == roots.owner
    if not mine and parsed.owner not in roots.foreign:
        return False
    if parsed.kind == "pin":
        return not mine
    if parsed.kind in ("manifest", "commit", "signature"):
        return parsed.manifest not in roots.manifests and (
            not mine or parsed.sequence <= roots.sequence
        )
    return name not in roots.objects and (
        not mine or parsed.sequence <= roots.sequence - IN_FLIGHT_SEQUENCES
    )
