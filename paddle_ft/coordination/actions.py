"""What a node can do next for the whole cluster. Plain values; ``decide`` chooses among them.

Pure. An action of a leader carries the ``Fences`` it was decided upon; whoever carries it out puts
them into its transaction as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from paddle_ft.coordination.schema import Fences
from paddle_ft.types import CommitRef, Generation, Head, Outcome, Part, Pause


@dataclass(frozen=True, slots=True)
class Campaign:
    """Try to take the leader key."""


@dataclass(frozen=True, slots=True)
class ScanStore:
    """Look for the newest commit in the store: etcd knows of none."""


@dataclass(frozen=True, slots=True)
class ImportHead:
    """Tell etcd of the commits found in the store, before anything starts."""

    head: Head
    fences: Fences


@dataclass(frozen=True, slots=True)
class Propose:
    generation: Generation
    fences: Fences


@dataclass(frozen=True, slots=True)
class RequestPause:
    pause: Pause
    fences: Fences


@dataclass(frozen=True, slots=True)
class Commit:
    """Merge ``parts`` to a manifest and move head to it."""

    generation: int
    step: int
    parts: tuple[Part, ...]
    head: Head | None
    """Where head stands; None: nothing is committed yet."""
    sequence: int
    base: CommitRef | None
    """What the commit continues; None: the beginning."""
    lineage: tuple[CommitRef, ...]
    """Kept ancestors, newest first; begins with ``base`` if there is one."""
    obsolete: tuple[Part, ...]
    """Parts that have served once this commit is made: of this step and of older ones."""
    fences: Fences


@dataclass(frozen=True, slots=True)
class Finish:
    outcome: Outcome
    fences: Fences


@dataclass(frozen=True, slots=True)
class Bar:
    """Put ``node`` in quarantine."""

    node: str
    reason: str
    fences: Fences


Action = Campaign | ScanStore | ImportHead | Propose | RequestPause | Commit | Finish | Bar


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action | None
    reason: str
