"""When a checkpoint is taken (A4)."""

from __future__ import annotations

import math
import signal

import pytest

from paddle_ft.errors import ConfigError
from paddle_ft.policies import (
    NEVER,
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


def test_every_n_steps_stays_due_until_something_is_saved() -> None:
    rule = EveryNSteps(10)
    assert [rule(Facts(step, 0.0)) for step in (9, 10, 13)] == [False, True, True]
    assert not rule(Facts(14, 0.0, saved_step=13))
    assert rule(Facts(20, 0.0, saved_step=13))


def test_every_seconds_counts_from_the_newest_snapshot() -> None:
    rule = EverySeconds(30)
    assert not rule(Facts(1, 129.9, saved_at_s=100.0))
    assert rule(Facts(1, 130.0, saved_at_s=100.0))


def test_on_signal_and_on_preemption() -> None:
    asked = Facts(1, 0.0, asked=frozenset({signal.SIGUSR1}))
    assert OnSignal(signal.SIGUSR1)(asked)
    assert not OnSignal(signal.SIGUSR2)(asked)
    assert OnPreemption()(Facts(1, 0.0, preempted=True))
    assert not OnPreemption()(asked)


def test_any_of() -> None:
    rule = AnyOf(EveryNSteps(10), EverySeconds(30))
    assert rule(Facts(10, 0.0))
    assert rule(Facts(1, 30.0))
    assert not rule(Facts(1, 1.0))
    assert not NEVER(Facts(10**6, 1e9))


def test_the_automatic_interval_is_the_one_that_loses_least() -> None:
    """Against the cost of all intervals around it, not against the formula itself."""
    rule = Automatic(least_s=0.0, most_s=1e9)
    facts = Facts(1, 0.0, cost_s=0.5, mtbf_s=7200.0)

    def lost(interval_s: float) -> float:
        return facts.cost_s / interval_s + interval_s / 2 / facts.mtbf_s

    best = min((lost(s), s) for s in range(5, 500))[1]
    assert rule.interval_s(facts) == pytest.approx(best, abs=1.0)


@pytest.mark.parametrize(
    ("facts", "least_s", "most_s"),
    [
        (Facts(1, 0.0, cost_s=100.0, mtbf_s=1e9), 600.0, 600.0),
        (Facts(1, 0.0, cost_s=1e-9, mtbf_s=10.0), 5.0, 5.0),
        (Facts(1, 0.0), math.sqrt(2 * 0.005 * 21600), math.sqrt(2 * 0.005 * 21600)),
    ],
)
def test_the_automatic_interval_is_bounded(facts: Facts, least_s: float, most_s: float) -> None:
    assert least_s <= Automatic().interval_s(facts) <= most_s


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("auto", AnyOf(Automatic(), OnSignal(signal.SIGUSR1))),
        ("never", NEVER),
        ("100", EveryNSteps(100)),
        ("1 step", EveryNSteps(1)),
        ("30s", EverySeconds(30)),
        ("1.5 min", EverySeconds(90)),
        (
            "2h, 1000 steps,SIGUSR1, preemption",
            AnyOf(EverySeconds(7200), EveryNSteps(1000), OnSignal(signal.SIGUSR1), OnPreemption()),
        ),
    ],
)
def test_rules_can_be_written_as_text(text: str, rule: Rule) -> None:
    assert parse(text) == rule


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "0s", "1 day", "SIGKILL", "100,,"])
def test_what_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="does not say when to save"):
        parse(text)
