"""Gray recovery: how a replica gets its share of the requests, a tenth first. Pure.

It is let in when it comes to others that serve already, and when it has become the primary because
another one was lost. What its own answers say takes it back out; then it is tried again, later each
time. Meanwhile the others, which are warm, answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from paddle_ft.serve.registry import Group, Level

SHARES = (0.1, 0.25, 0.5, 1.0)
"""Few steps: each one makes the gateway load a new configuration."""
ERRORS_MIN, ERRORS_SHARE = 3, 0.05
SLOW_MIN, SLOW_TIMES, SLOW_S = 20, 3.0, 0.05
"""So many answers, on average so many times as slow as with the first share, and by so much."""
AWAY_MAX_S = 300.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What a replica has answered since it was started."""

    good: int = 0
    failed: int = 0
    """With a status of 500 or more."""
    seconds: float = 0.0
    """That the good ones took, together."""

    def since(self, before: Answers) -> Answers:
        return Answers(
            max(0, self.good - before.good),
            max(0, self.failed - before.failed),
            max(0.0, self.seconds - before.seconds),
        )

    @property
    def mean_s(self) -> float:
        return self.seconds / self.good if self.good else 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What matters of a group for one replica."""

    level: Level = "active-active"
    serves: bool = False
    leads: bool = False
    others: bool = False
    """Others serve, too."""
    succeeded: bool = False
    """The primary before this one is gone."""


def seen(group: Group, me: str, serves: bool, primary_before: str) -> Seen:
    ready = {n for n, r in group.replicas.items() if r.condition in ("ready", "degraded")}
    return Seen(
        level=group.level,
        serves=serves,
        leads=group.primary == me,
        others=bool(ready - {me}),
        succeeded=primary_before not in ("", me) and primary_before not in group.replicas,
    )


def begins(before: Seen, now: Seen) -> bool:
    """Whether this replica is to be let in slowly from now on."""
    if not now.serves or not now.others:
        return False
    if now.level == "active-active":
        return not before.serves
    return now.leads and not before.leads and now.succeeded


def is_moot(now: Seen) -> bool:
    """Standbys take what the primary does not: none of them is let in slowly."""
    return now.level != "active-active" and not now.leads


def fault(answers: Answers, first_s: float) -> str:
    """What speaks against a larger share; ``first_s``: mean with the first one, 0: not known."""
    total = answers.good + answers.failed
    if answers.failed >= ERRORS_MIN and answers.failed > ERRORS_SHARE * total:
        return f"{answers.failed} of {total} requests failed"
    mean_s = answers.mean_s
    if (
        first_s
        and answers.good >= SLOW_MIN
        and mean_s > max(SLOW_TIMES * first_s, first_s + SLOW_S)
    ):
        return f"requests took {1e3 * mean_s:.0f} ms, and {1e3 * first_s:.0f} ms at first"
    return ""


class Ramp:
    """The share of one replica. ``over_s``: from the first to the whole; 0: at once."""

    def __init__(self, over_s: float) -> None:
        self.share = 1.0
        self.why = ""
        """It was taken back; why."""
        self._over_s = over_s
        self._index = len(SHARES)
        """Of the share that is being tried; beyond the last: nothing is."""
        self._since_s = 0.0
        self._base = Answers()
        self._first_s = 0.0
        self._tries = 0

    @property
    def active(self) -> bool:
        return self._index < len(SHARES)

    def begin(self, now_s: float, answers: Answers) -> None:
        if self._over_s > 0:
            self._first_s = 0.0
            self._try(0, now_s, answers)

    def end(self) -> None:
        """The whole share, and nothing is watched."""
        self.share, self.why = 1.0, ""
        self._index, self._tries = len(SHARES), 0

    def look(self, now_s: float, answers: Answers) -> None:
        """Goes on, back or out, as it is due."""
        if not self.active:
            return
        if self.why:
            if now_s - self._since_s >= self._away_s():
                self.begin(now_s, answers)
            return
        here = answers.since(self._base)
        found = fault(here, self._first_s)
        if found:
            self._tries += 1
            self.share, self.why, self._since_s = 0.0, found, now_s
        elif now_s - self._since_s >= self._over_s / (len(SHARES) - 1):
            if self._index == 0:
                self._first_s = here.mean_s
            if self._index + 1 < len(SHARES):
                self._try(self._index + 1, now_s, answers)
            else:
                self.end()

    def _try(self, index: int, now_s: float, answers: Answers) -> None:
        self._index, self._since_s, self._base = index, now_s, answers
        self.share, self.why = SHARES[index], ""

    def _away_s(self) -> float:
        return min(self._over_s * 2.0 ** min(self._tries - 1, 10), AWAY_MAX_S)
