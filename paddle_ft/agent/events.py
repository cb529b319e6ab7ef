"""What comes back to the agent's loop from its threads."""

from __future__ import annotations

from dataclasses import dataclass

from paddle_ft.types import CommitRef, Head


@dataclass(frozen=True, slots=True)
class CommitDone:
    head: Head | None


@dataclass(frozen=True, slots=True)
class Scanned:
    found: tuple[CommitRef, ...]


@dataclass(frozen=True, slots=True)
class Defect:
    """Something on another thread failed in a way it must not."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Changed:
    """etcd changed, or the lease did: look again."""
