"""When a session publishes by itself, and what it knows of what it has published. Pure.

Invariant: a step is published once, and what counts as the best so far is what was published of
this job up to where it stands: after a restart that is read from the versions themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paddle_ft.errors import ConfigError
from paddle_ft.policies import (
    AnyOf,
    Automatic,
    EveryNSteps,
    EverySeconds,
    Facts,
    OnPreemption,
    OnSignal,
    Rule,
    parse,
)

VERSIONS_MAX = 20
"""So many versions are looked at, the newest first."""
_PREFIX = "measured "


class PublishRule:
    """``when`` says so, the model is published as ``name``; ``more`` is how, for ``publish``."""

    def __init__(
        self,
        name: str,
        when: Rule | str,
        input_spec: Sequence[Any] | None,
        store: str,
        more: dict[str, Any],
    ) -> None:
        """Raises ConfigError for a text that does not say when."""
        self.name, self.input_spec, self.store, self.more = name, input_spec, store, more
        self._rule = _parsed(when) if isinstance(when, str) else when
        self._step = 0
        self._at_s = -math.inf
        self._best: dict[str, tuple[float, float]] = {}

    def begin(self, now_s: float) -> None:
        """The interval of a rule in seconds begins."""
        self._at_s = now_s

    def recall(self, job: str, step: int, sources: Iterable[Mapping[str, str | int]]) -> None:
        """Takes up what ``job`` has published up to ``step``, from what versions say of it."""
        for source in sources:
            published = source.get("step")
            if source.get("job", "") != job or not isinstance(published, int) or published > step:
                continue
            self._step = max(self._step, published)
            self._take(
                {
                    name.removeprefix(_PREFIX): float(value)
                    for name, value in source.items()
                    if name.startswith(_PREFIX)
                }
            )

    def is_due(self, step: int, now_s: float, measured: Mapping[str, float]) -> bool:
        """Whether the model is to be published as it is after ``step``."""
        facts = Facts(
            step=step,
            now_s=now_s,
            saved_step=self._step,
            saved_at_s=self._at_s,
            measured=measured,
            best=self._best,
        )
        return step > self._step and self._rule(facts)

    def published(self, step: int, now_s: float, measured: Mapping[str, float]) -> None:
        """It was, or is about to be."""
        self._step, self._at_s = max(self._step, step), now_s
        self._take(measured)

    def _take(self, measured: Mapping[str, float]) -> None:
        for name, value in measured.items():
            if not math.isnan(value):
                low, high = self._best.get(name, (math.inf, -math.inf))
                self._best[name] = min(low, value), max(high, value)


def source_of(measured: Mapping[str, float]) -> dict[str, str | int]:
    """What a version says of what was measured of it."""
    return {f"{_PREFIX}{name}": repr(value) for name, value in measured.items()}


def _parsed(text: str) -> Rule:
    try:
        rule = parse(text)
    except ConfigError:
        rule = Automatic()
    rules = rule.rules if isinstance(rule, AnyOf) else (rule,)
    if not rules or any(isinstance(r, Automatic | OnSignal | OnPreemption) for r in rules):
        raise ConfigError(
            f"{text!r} does not say when to publish: write '100 steps', '10min' or both with a "
            f"comma, or give a rule such as {EveryNSteps(100)}, {EverySeconds(600)}, "
            f"OnBetter('accuracy')"
        )
    return rule
