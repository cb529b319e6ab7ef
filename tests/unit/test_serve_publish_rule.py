"""When a session publishes by itself: rules, and what is known of earlier versions."""

from __future__ import annotations

import math

import pytest

from paddle_ft.errors import ConfigError
from paddle_ft.policies import AnyOf, EveryNSteps, Facts, OnBetter, Rule
from paddle_ft.serve.publish_rule import PublishRule, source_of


def rule(when: Rule | str) -> PublishRule:
    made = PublishRule("digits", when, None, "", {})
    made.begin(0.0)
    return made


def follow(
    made: PublishRule, told: list[tuple[int, dict[str, float]]], step_s: float = 1.0
) -> list[int]:
    """Steps at which it publishes."""
    published = []
    for step, measured in told:
        if made.is_due(step, step * step_s, measured):
            made.published(step, step * step_s, measured)
            published.append(step)
    return published


STEPS: list[tuple[int, dict[str, float]]] = [(step, {}) for step in range(1, 11)]


def test_every_n_steps_and_every_so_many_seconds() -> None:
    assert follow(rule("3 steps"), STEPS) == [3, 6, 9]
    assert follow(rule("5s"), STEPS) == [5, 10]
    assert follow(rule("4 steps, 5s"), STEPS) == [4, 8]
    assert follow(rule(EveryNSteps(9)), STEPS) == [9]


def test_a_step_is_published_once() -> None:
    made = rule("3 steps")
    assert follow(made, [(3, {}), (3, {}), (2, {}), (3, {})]) == [3]


@pytest.mark.parametrize(("mode", "published"), [("max", [1, 3, 8]), ("min", [1, 2, 6])])
def test_only_what_is_better_than_all_before_is_published(mode: str, published: list[int]) -> None:
    values = [0.5, 0.4, 0.7, 0.7, math.nan, 0.3, 0.6, 0.8]
    told = [(n, {"accuracy": value}) for n, value in enumerate(values, 1)]
    made = rule(OnBetter("accuracy", mode))  # type: ignore[arg-type]
    assert follow(made, told) == published
    assert follow(rule(OnBetter("loss")), told) == []


def test_what_another_rule_publishes_counts_for_the_best() -> None:
    made = rule(AnyOf(EveryNSteps(2), OnBetter("accuracy")))
    told = [(1, {"accuracy": 0.5}), (2, {"accuracy": 0.9}), (3, {"accuracy": 0.8}), (4, {})]
    assert follow(made, told) == [1, 2, 4]


def test_a_job_that_is_started_again_knows_its_versions_and_no_others() -> None:
    versions = [
        {"job": "a", "step": 6, **source_of({"accuracy": 0.7})},
        {"job": "a", "step": 3, **source_of({"accuracy": 0.8})},
        {"job": "b", "step": 4, **source_of({"accuracy": 0.99})},
        {"job": "a", "step": 12, **source_of({"accuracy": 0.98})},  # of a run before
        {},
    ]
    made = rule(AnyOf(EveryNSteps(3), OnBetter("accuracy")))
    made.recall("a", 8, versions)
    assert follow(made, [(6, {}), (7, {}), (8, {"accuracy": 0.8}), (9, {})]) == [9]
    assert made.is_due(10, 10.0, {"accuracy": 0.81})


@pytest.mark.parametrize("text", ["auto", "never", "SIGUSR1", "preemption", "daily", "0 steps"])
def test_what_says_nothing_about_publishing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"does not say when to publish.*OnBetter"):
        rule(text)


def test_a_checkpoint_rule_knows_nothing_of_what_is_measured() -> None:
    assert not OnBetter("accuracy")(Facts(step=1, now_s=0.0))
