"""When a checkpoint is taken: rules that read like sentences.

    AnyOf(EveryNSteps(1000), EverySeconds(600), OnSignal(signal.SIGUSR1))

Pure: a rule looks at ``Facts`` and says yes or no. It is asked on rank 0 at each step, and the
ranks agree on its answer by their vote; it goes on saying yes until something was saved. A stop
that is asked for (Ctrl-C, SIGTERM, a node that leaves) and the end of training save in any case.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from paddle_ft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rule can go by."""

    step: int
    """The step that is about to be applied, from 1."""
    now_s: float
    saved_step: int = 0
    """Step of the newest snapshot; that of the restored checkpoint before there is one."""
    saved_at_s: float = 0.0
    asked: frozenset[int] = frozenset()
    """Signals that came since the newest snapshot."""
    preempted: bool = False
    """The node was told that it goes."""
    cost_s: float = 0.0
    """What a checkpoint costs training, as measured: the time for which a step waited for it."""
    mtbf_s: float = 0.0
    """Mean time between failures of the job, as measured; 0.0 if not known."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What ``Session.measured`` was told of this step."""
    best: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The lowest and the highest that was measured of what was published."""


class Rule(Protocol):
    def __call__(self, facts: Facts) -> bool: ...


@dataclass(frozen=True, slots=True)
class EveryNSteps:
    """After each ``n``-th step, counted from the beginning of the job."""

    n: int

    def __call__(self, facts: Facts) -> bool:
        return facts.step // self.n > facts.saved_step // self.n


@dataclass(frozen=True, slots=True)
class EverySeconds:
    """When the newest snapshot is ``s`` seconds old."""

    s: float

    def __call__(self, facts: Facts) -> bool:
        return facts.now_s - facts.saved_at_s >= self.s


@dataclass(frozen=True, slots=True)
class OnSignal:
    """When the launcher (or a script without one) gets signal ``number``."""

    number: int

    def __call__(self, facts: Facts) -> bool:
        return self.number in facts.asked


@dataclass(frozen=True, slots=True)
class OnPreemption:
    """When the node is told that it goes (SIGTERM)."""

    def __call__(self, facts: Facts) -> bool:
        return facts.preempted


@dataclass(frozen=True, slots=True)
class OnBetter:
    """When ``metric`` is better than it was of anything that was published; for publishing."""

    metric: str
    mode: Literal["max", "min"] = "max"
    """What is better."""

    def __call__(self, facts: Facts) -> bool:
        value = facts.measured.get(self.metric, math.nan)
        if math.isnan(value):
            return False
        low, high = facts.best.get(self.metric, (math.inf, -math.inf))
        return value > high if self.mode == "max" else value < low


@dataclass(frozen=True, slots=True)
class Automatic:
    """After the interval that loses least time, by what is measured: sqrt(2 x cost x MTBF).

    A short interval costs checkpoints, a long one costs steps that are done again after a failure;
    the sum is least there (Young 1974; Daly 2006, first order). ``least_s`` and ``most_s`` bound
    it; ``mtbf_s`` is assumed until one is known, ``cost_s`` is the least that is reckoned with.
    """

    least_s: float = 5.0
    most_s: float = 600.0
    mtbf_s: float = 6 * 3600.0
    cost_s: float = 0.005

    def interval_s(self, facts: Facts) -> float:
        """The interval for what is known now."""
        cost_s = max(facts.cost_s, self.cost_s)
        best_s = math.sqrt(2 * cost_s * (facts.mtbf_s or self.mtbf_s))
        return min(max(best_s, self.least_s), self.most_s)

    def __call__(self, facts: Facts) -> bool:
        return facts.now_s - facts.saved_at_s >= self.interval_s(facts)


@dataclass(frozen=True, slots=True, init=False)
class AnyOf:
    """When at least one of ``rules`` says so; ``AnyOf()`` never does."""

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        object.__setattr__(self, "rules", rules)

    def __call__(self, facts: Facts) -> bool:
        return any(rule(facts) for rule in self.rules)


NEVER = AnyOf()


def parse(text: str) -> Rule:
    """The rule that ``text`` describes.

    ``auto`` (``Automatic`` or SIGUSR1); ``never``; or any of ``100`` and ``100 steps``, ``30s``
    and ``10min``, ``preemption``, ``SIGUSR1``, joined by commas. Raises ConfigError.
    """
    rules = [_parse_one(part.strip(), text) for part in text.split(",")]
    return rules[0] if len(rules) == 1 else AnyOf(*rules)


_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0}


def _parse_one(part: str, text: str) -> Rule:
    if part == "auto":
        return AnyOf(Automatic(), OnSignal(signal.SIGUSR1))
    if part == "never":
        return NEVER
    if part == "preemption":
        return OnPreemption()
    if part in ("SIGUSR1", "SIGUSR2"):
        return OnSignal(signal.Signals[part])
    if match := re.fullmatch(r"(\d+)(?: steps?)?", part):
        if int(match[1]) > 0:
            return EveryNSteps(int(match[1]))
    elif (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", part)) and float(match[1]) > 0:
        return EverySeconds(float(match[1]) * _UNITS_S[match[2]])
    raise ConfigError(
        f"{text!r} does not say when to save: write auto, never, or any of 100 (steps), 30s, "
        f"10min, preemption, SIGUSR1, joined by commas"
    )
