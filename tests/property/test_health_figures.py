"""Whoever is bad among nodes is named, and nobody else; whatever the machines are."""

from __future__ import annotations

from itertools import chain
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.health.figures import Entry, Figures, PairTime, judge, schedule, shortfalls

FIGURES = Figures(5e10, 8e9, 5e8, 1e9)
SEEDS = st.integers(0, 2**32)
NOISE = 1.3
"""Between the quickest and the slowest of nodes that are well."""


def names(count: int) -> list[str]:
    return [f"n{number:03}" for number in range(count)]


def measured(count: int, seed: int, slow: set[str], links: set[frozenset[str]]) -> list[Entry]:
    """Pairs with a node of ``slow`` or over one of ``links`` take at least 3 times as long."""
    noise = Random(seed)
    pairs: dict[str, list[PairTime]] = {name: [] for name in names(count)}
    for a, b in chain.from_iterable(schedule(names(count))):
        bad = slow & {a, b} or frozenset((a, b)) in links
        seconds = 0.02 * noise.uniform(1.0, NOISE) * (noise.uniform(3.0, 30.0) if bad else 1.0)
        failed = bad and noise.random() < 0.2
        for one, other in ((a, b), (b, a)):
            pairs[one].append(PairTime(other, -1.0 if failed else seconds))
    return [Entry(n, "host", 1, FIGURES, 1, tuple(found)) for n, found in pairs.items()]


@given(st.integers(2, 40))
def test_all_are_measured_and_nobody_meets_another_twice(count: int) -> None:
    rounds = schedule(names(count))
    for pairs in rounds:
        busy = [*chain.from_iterable(pairs)]
        assert len(busy) == len(set(busy)) >= count - 1
    met = [frozenset(pair) for pair in chain.from_iterable(rounds)]
    assert len(met) == len(set(met))
    for name in names(count):
        assert sum(name in pair for pair in met) >= min(2, count - 1)


@given(st.integers(2, 30), SEEDS)
def test_of_nodes_that_are_well_nobody_is_named(count: int, seed: int) -> None:
    assert judge(measured(count, seed, set(), set())) == []


@given(st.integers(3, 30), SEEDS)
def test_one_bad_node_is_named_and_nobody_else(count: int, seed: int) -> None:
    bad = Random(seed).choice(names(count))
    assert [f.nodes for f in judge(measured(count, seed, {bad}, set()))] == [(bad,)]


@given(st.integers(4, 30), SEEDS)
def test_a_bad_link_is_told_from_a_bad_node(count: int, seed: int) -> None:
    pair = Random(seed).choice([*chain.from_iterable(schedule(names(count)))])
    found = judge(measured(count, seed, set(), {frozenset(pair)}))
    assert [set(f.nodes) for f in found] == [set(pair)]


def test_of_two_it_is_the_link() -> None:
    entries = measured(2, 1, set(), set())
    assert judge(entries) == []
    failed = [
        Entry("a", "h", 1, FIGURES, 1, (PairTime("b", -1.0),)),
        Entry("b", "h", 1, FIGURES, 1, (PairTime("a", 0.02),)),
    ]
    (finding,) = judge(failed)
    assert finding.nodes == ("a", "b") and "failed" in finding.reason


@given(st.integers(1, 30), SEEDS, st.sampled_from(["product_flops", "write_bytes_per_s"]))
def test_a_figure_below_half_of_the_usual_is_named(count: int, seed: int, name: str) -> None:
    noise = Random(seed)
    others = [
        Figures(*(getattr(FIGURES, n) * noise.uniform(1.0, NOISE) for n in FIGURES.__slots__))
        for _ in range(count)
    ]
    values = {n: getattr(FIGURES, n) for n in FIGURES.__slots__}
    assert shortfalls(FIGURES, others) == []
    (told,) = shortfalls(Figures(**values | {name: values[name] * 0.49}), others)
    assert "the others" in told
    assert shortfalls(Figures(**values | {name: 0.0}), others) == [], "it was not measured"
    assert shortfalls(FIGURES, []) == []


@pytest.mark.parametrize("gone", ["n000", "n002"])
def test_a_node_that_went_away_is_named(gone: str) -> None:
    entries = measured(4, 1, set(), set())
    cut = [
        Entry(e.node, "h", 1, FIGURES, 1, tuple(
            PairTime(p.peer, -1.0 if gone in (e.node, p.peer) else p.seconds) for p in e.pairs
        ))
        for e in entries
    ]  # fmt: skip
    assert [f.nodes for f in judge([e for e in cut if e.node != gone] + [cut[int(gone[-1])]])] == [
        (gone,)
    ]
