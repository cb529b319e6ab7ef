"""Which version of each model a replica is to serve, and when it may change to it. Pure.

What the group has agreed on (an acknowledged entry of its log) wins over the replica's own command
line. The primary proves a version, by loading it, before the group agrees on it; then the others
change to it one after the other, so that at any time one replica at most pays for two versions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from paddle_ft.serve.registry import Group

NEWEST = 0
"""As a version: whichever is the newest when it is loaded."""
AGAIN_S, AGAIN_MAX_S, HOPELESS_S = 1.0, 30.0, 300.0
"""Pause after a failed load, doubled each time; longer where trying again will hardly help."""
_PINNED = "pinned"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is agreed on for one model. ``version`` None: it is not served."""

    version: int | None
    pinned: bool = False
    """Newer ones are not taken up by themselves."""
    digest: str = ""
    """Of its manifest, for the store of another replica may have another version of that number;
    "": not known."""

    def encode(self) -> bytes:
        if self.version is None:
            return b""
        words = (str(self.version), _PINNED if self.pinned else "", self.digest)
        return " ".join(filter(None, words)).encode()


def choice(data: bytes) -> Choice:
    """What ``Choice.encode`` made; raises ValueError."""
    if not data:
        return Choice(None)
    number, *rest = data.decode().split(" ")
    version, pinned = int(number), rest[:1] == [_PINNED]
    digest = rest[pinned:]
    if version < 1 or len(digest) > 1 or not all(map(_DIGEST.fullmatch, digest)):
        raise ValueError(f"{data[:60]!r} names no version")
    return Choice(version, pinned, *digest)


@dataclass(frozen=True, slots=True)
class Failure:
    """A version could not be loaded."""

    version: int
    why: str
    tries: int
    again_s: float
    """Monotonic time; not before."""
    final: bool = False
    """Trying again will hardly help."""


def failure(before: Failure | None, version: int, why: str, final: bool, now_s: float) -> Failure:
    """The next one, after ``before``."""
    same = before is not None and before.version == version
    tries = before.tries + 1 if before is not None and same else 1
    pause_s = HOPELESS_S if final else min(AGAIN_S * 2 ** min(tries - 1, 10), AGAIN_MAX_S)
    return Failure(version, why, tries, now_s + pause_s, final)


@dataclass(frozen=True, slots=True)
class Situation:
    """One model on one replica."""

    target: int | None
    """NEWEST, a version, or None: it is not to be served."""
    served: int | None = None
    fetched: int | None = None
    """Its files are on this machine."""
    failed: Failure | None = None
    warm: bool = True
    """Workers are to be there, not only files."""
    turn: bool = True
    """It may load a version beside another one."""


@dataclass(frozen=True, slots=True)
class Step:
    kind: Literal["none", "load", "fetch", "cool", "unload"]
    """``cool``: the workers are ended, the files stay."""
    until_s: float = float("inf")
    """With ``none``: when to look again, if nothing changes."""


def step(now: Situation, now_s: float) -> Step:
    """What is to be done next about one model."""
    if now.target is None:
        return Step("none" if now.served is None else "unload")
    if not now.warm and now.served is not None:
        return Step("cool")
    there = now.served if now.warm else now.fetched
    if there == now.target or (there is not None and now.target == NEWEST):
        return Step("none")
    failed = now.failed
    if failed is not None and failed.version == now.target and now_s < failed.again_s:
        return Step("none", failed.again_s)
    if now.warm and now.served is not None and not now.turn:
        return Step("none")
    return Step("load" if now.warm else "fetch")


def target(agreed: Choice | None, own: int | None) -> int | None:
    """``own``: of the command line; None: it does not name the model."""
    return agreed.version if agreed is not None else own


def is_turn(group: Group, me: str, model: str, version: int) -> bool:
    """Whether all that come before this replica have ``version``, or cannot have it.

    The primary is the first, the others follow by name. Who serves no version of the model has
    nothing to change.
    """
    for name, record in group.replicas.items():
        if (name != group.primary, name) >= (me != group.primary, me):
            continue
        there = record.models.get(model, str(version))
        done = str(version) in (there, record.failed.get(model))
        if not done and record.condition != "draining":
            return False
    return True


def is_behind(agreed: Choice | None, published: int) -> bool:
    """Whether a version that was published is to be taken up."""
    if agreed is None or agreed.version is None or agreed.pinned:
        return False
    return published > agreed.version


def to_prove(
    agreed: Choice | None, published: int | None, failed: Failure | None, now_s: float
) -> int | None:
    """The version that the primary is to try, and to propose to the group if it is sound."""
    if published is None or not is_behind(agreed, published):
        return None
    if failed is not None and failed.version == published:
        return None if failed.final or now_s < failed.again_s else published
    return published


def to_tell(agreed: Choice | None, own: int | None, served: int | None) -> Choice | None:
    """What the primary tells a group that has not agreed on anything for a model."""
    if agreed is not None or own is None or served is None:
        return None
    return Choice(served, pinned=own != NEWEST)


def is_warm(group: Group, me: str, serving: bool, shared: Collection[str] = ()) -> bool:
    """Whether this replica is to have workers; ``serving``: it has them, and of what the whole
    group serves for ``shared``.

    Cold standbys have none, unless they are needed: a new primary is let take over before the old
    one stops, and where the primary cannot serve the first of the others does.
    """
    if group.level != "cold-standby" or group.primary == me:
        return True
    wish = group.promote
    if wish is not None and not wish.refused and wish.target == me:
        return True
    able = [n for n, r in group.replicas.items() if r.condition in ("ready", "degraded")]
    primary = group.replicas.get(group.primary or "")
    if primary is not None and primary.name in able:
        # A new one is ready with the models it was started with; others may come after them.
        return bool(set(shared) - set(primary.models) - set(primary.failed))
    if serving:
        return True
    if able or (primary is not None and not primary.failed):
        return False
    others = [n for n, r in group.replicas.items() if r.condition != "draining" and r != primary]
    return me == min(others, default=me)


def told(failures: Mapping[str, Failure]) -> str:
    """Why a replica is degraded: one sentence for each model; "" if there is no failure."""
    return "; ".join(
        f"{name} {f.version or '(newest)'} is not served here: {f.why}"
        for name, f in sorted(failures.items())
    )
