"""What the gateway does not believe at once: a registry that has lost a replica, a check that was
not answered, and a replica that is back.

Invariant: a replica whose checks pass stays known for ``KEEP_S`` after the registry has lost it,
unless it has said that it leaves or another one has its address. One that has answered a request
since a check began is there, however long that check takes. One that comes and goes is left
out at once and let in again later each time, so that it cannot make nginx reload all the time;
but never is nobody asked while somebody is ready. Pure: time comes in as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from paddle_ft.serve.latency import Try
from paddle_ft.serve.registry import Group
from paddle_ft.serve.routing import Health

KEEP_S = 60.0
GRACE_MAX_S = 0.25
HOLD_S = 0.25
"""How long one that was lost must be ready before it is let in; doubles with each loss."""
HOLD_MAX_S = 30.0
CALM_S = 60.0
"""After so long without a loss, the losses before are forgotten."""

AGAIN_S = 1.0
"""So long requests are taken back that were on their way when it was left out."""
ANOTHER_S = 10.0
"""So long after one replica, no request is taken back from another: on a machine that has too much
to do all of them may seem to stand still by turns, and requests would go round."""


class Roster:
    """The group as it is to be used, beside what etcd has."""

    def __init__(self) -> None:
        self._missing_s: dict[str, float] = {}

    def renew(
        self, before: Group | None, fresh: Group, health: Mapping[str, Health], now_s: float
    ) -> Group:
        """``fresh``, with those of ``before`` that it lacks and that seem to be there all the same.

        Leases end, one after the other, when etcd was away. A registry that has become empty
        takes nobody away, since nobody would be left.
        """
        known = before.replicas if before else {}
        missing = {name: r for name, r in known.items() if name not in fresh.replicas}
        self._missing_s = {name: self._missing_s.get(name, now_s) for name in missing}
        if fresh.replicas:
            taken = {(r.host, r.http_port) for r in fresh.replicas.values()}
            missing = {
                name: r
                for name, r in missing.items()
                if r.condition != "draining"
                and (r.host, r.http_port) not in taken
                and health.get(name) == "ready"
                and now_s - self._missing_s[name] <= KEEP_S
            }
        return replace(fresh, replicas={**fresh.replicas, **missing}) if missing else fresh


def believed(
    found: Mapping[str, Health], unanswered_s: Mapping[str, float], answered_s: Mapping[str, float]
) -> dict[str, Health]:
    """Health, with those ready that have answered a request since a check was not answered.

    Args:
        unanswered_s: when that check began, by replica; none for those that refuse connections.
        answered_s: when each has answered a request last, by the same clock, and ``grace_s`` more.
    """
    return {
        name: "ready" if answered_s.get(name, 0.0) > unanswered_s.get(name, math.inf) else health
        for name, health in found.items()
    }


def grace_s(tried: Try) -> float:
    """How long after an answer the next one may be awaited, where answers take as long as this."""
    return min(GRACE_MAX_S, 2 * (tried.answer_s or 0.0))


@dataclass(slots=True)
class _Standing:
    losses: int = 0
    ready_s: float | None = None
    """Since when; None: it is not."""
    admitted: bool = False


class Damper:
    """Health as it is to be used, from what the checks have found."""

    def __init__(self) -> None:
        self._standing: dict[str, _Standing] = {}

    def settle(self, found: Mapping[str, Health], now_s: float) -> dict[str, Health]:
        """One that is ready and not let in yet counts as ``refusing``."""
        self._standing = {name: self._standing.get(name, _Standing()) for name in found}
        for name, health in found.items():
            self._see(self._standing[name], health == "ready", now_s)
        if not any(standing.admitted for standing in self._standing.values()):
            return dict(found)
        return {
            name: "refusing" if health == "ready" and not self._standing[name].admitted else health
            for name, health in found.items()
        }

    def hold_s(self, name: str) -> float:
        """How long it must be ready at a stretch before it is let in."""
        losses = self._standing[name].losses if name in self._standing else 0
        return _hold_s(losses)

    def _see(self, standing: _Standing, ready: bool, now_s: float) -> None:
        if not ready:
            if standing.ready_s is not None:
                standing.losses += 1
            standing.ready_s, standing.admitted = None, False
            return
        if standing.ready_s is None:
            standing.ready_s = now_s
        lasted_s = now_s - standing.ready_s
        standing.admitted |= lasted_s >= _hold_s(standing.losses)
        if lasted_s >= CALM_S:
            standing.losses = 0


class Standstill:
    """From whom requests are to be taken back."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._last = ("", -ANOTHER_S)

    def look(self, silent: Set[str], wait_s: float, now_s: float) -> str:
        """Who has been silent for ``wait_s``, and not for ``AGAIN_S`` more; "" if nobody has.

        Args:
            silent: who does not answer, while others can be asked.
        """
        self._since_s = {name: self._since_s.get(name, now_s) for name in sorted(silent)}
        for name, since_s in self._since_s.items():
            if since_s + wait_s <= now_s <= since_s + wait_s + AGAIN_S and (
                name == self._last[0] or now_s >= self._last[1] + ANOTHER_S
            ):
                self._last = (name, now_s)
                return name
        return ""


def _hold_s(losses: int) -> float:
    return min(HOLD_MAX_S, HOLD_S * 2.0 ** (min(losses, 16) - 1)) if losses else 0.0
