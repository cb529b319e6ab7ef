"""Stragglers are named soon, and nobody is named in undisturbed steps, however noisy (A6)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paddle_ft.health.pace import STARVED_S, Pace, PaceJudge, Sample

STEPS = 10_000
SOON = 20


class Ranks:
    """Busy times of a training as machines have them: scatter that lasts for some steps, pauses
    (garbage collection, other processes), slow data, snapshots, evaluation, a slow start."""

    def __init__(self, seed: int, world: int, step_s: float, scatter: float) -> None:
        self.chance = random.Random(seed)
        self.world = world
        self.step_s = step_s
        self.scatter = scatter
        self.slower = [1.0] * world
        self.link = 1.0
        self.shares = [1.0 / world] * world
        self._drift = [0.0] * world
        self._done = 0

    def step(self) -> dict[int, Sample]:
        chance, busy = self.chance, []
        self._done += 1
        saving_s = 0.2 if self._done % 500 == 0 else 0.0
        for rank in range(self.world):
            self._drift[rank] = 0.5 * self._drift[rank] + chance.gauss(0, self.scatter / 2)
            noise = self._drift[rank] + chance.gauss(0, self.scatter)
            time_s = self.step_s * self.shares[rank] * self.world * 2.718281828**noise
            if chance.random() < 0.01:
                time_s += chance.expovariate(1 / (3 * self.step_s))
            if self._done % 1000 in (0, 1):
                time_s += chance.random() * 2.0  # the loader begins an epoch
            if self._done <= 2:
                time_s += 3.0 * chance.random()
            busy.append(time_s * self.slower[rank] + (saving_s if rank == 0 else 0.0))
        last_s, link_s = max(busy), 0.1 * self.step_s * self.link
        link_s *= 2.718281828 ** chance.gauss(0, 2 * self.scatter)
        return {
            rank: Sample(b, self.shares[rank], last_s - b + link_s, last_s + link_s, saving_s)
            for rank, b in enumerate(busy)
        }


@given(
    seed=st.integers(0, 2**32),
    world=st.sampled_from([2, 3, 4, 8]),
    step_s=st.sampled_from([0.005, 0.05, 0.5]),
    scatter=st.sampled_from([0.005, 0.02, 0.05]),
)
@settings(max_examples=4)
@pytest.mark.timeout(120)
def test_nobody_is_named_without_a_cause(
    seed: int, world: int, step_s: float, scatter: float
) -> None:
    ranks, judge = Ranks(seed, world, step_s, scatter), PaceJudge(range(world))
    for number in range(STEPS):
        judge.step(ranks.step())
        assert not judge.slow, f"step {number}: {judge.slow}"
        assert not judge.slow_links, f"step {number}: {judge.slow_links}"


@given(
    seed=st.integers(0, 2**32),
    world=st.sampled_from([2, 3, 8]),
    scatter=st.sampled_from([0.005, 0.02, 0.03]),
    quiet=st.integers(30, 300),
)
@settings(max_examples=60)
def test_a_rank_that_is_30_percent_slower_is_named_soon_and_cleared_again(
    seed: int, world: int, scatter: float, quiet: int
) -> None:
    ranks, judge = Ranks(seed, world, 0.05, scatter), PaceJudge(range(world))
    for _ in range(quiet):
        judge.step(ranks.step())
    culprit = ranks.chance.randrange(world)
    ranks.slower[culprit] = 1.3
    named = 0
    for number in range(1, SOON + 1):
        judge.step(ranks.step())
        if judge.slow:
            named = named or number
            assert set(judge.slow) == {culprit}
    assert named, f"after {SOON} steps nobody is named"
    ranks.slower[culprit] = 1.0
    for _ in range(2 * SOON):
        judge.step(ranks.step())
    assert not judge.slow


@given(seed=st.integers(0, 2**32), scatter=st.sampled_from([0.005, 0.03]))
@example(seed=3_010_446_731, scatter=0.005)
@settings(max_examples=20)
def test_links_that_become_slower_are_told_from_slow_ranks(seed: int, scatter: float) -> None:
    ranks, judge = Ranks(seed, 3, 0.05, scatter), PaceJudge(range(3))
    for _ in range(200):
        judge.step(ranks.step())
    ranks.link = 4.0
    for _ in range(SOON):
        judge.step(ranks.step())
    assert judge.slow_links > 2.5 and not judge.slow
    ranks.link = 1.0
    for _ in range(2 * SOON):
        judge.step(ranks.step())
    assert not judge.slow_links


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_uneven_slices_name_nobody(seed: int) -> None:
    ranks, judge = Ranks(seed, 3, 0.05, 0.02), PaceJudge(range(3))
    ranks.shares = [3 / 8, 3 / 8, 2 / 8]
    for _ in range(500):
        judge.step(ranks.step())
        assert not judge.slow


@given(seed=st.integers(0, 2**32), slower=st.sampled_from([1.0, 1.3]))
@settings(max_examples=30)
def test_a_node_judges_its_rank_by_what_other_nodes_told(seed: int, slower: float) -> None:
    ranks, judge = Ranks(seed, 2, 0.05, 0.02), PaceJudge([1])
    ranks.slower[1] = slower
    told = (Pace(0, 0.05, 0.5, 0.005),)
    for _ in range(60):
        judge.step({1: ranks.step()[1]}, told)
    assert set(judge.slow) == ({1} if slower > 1 else set())
    if judge.paces():
        assert judge.paces()[0].busy_s == pytest.approx(0.05 * slower, rel=0.1)


TRACES = Path(__file__).parent / "traces"
STARVED = TRACES / "starved_ranks.csv"
"""1,200 steps of a real job of two ranks of 8 ms each, beside eight programs that compute and sleep
by turns on two processors; with the time that the ranks waited for these."""
TRACE = TRACES / "busy_machine.csv"
"""1,500 steps of a real job of two ranks of 12 ms each, on a machine where ten other programs
shared two processors: nothing is wrong with the links, and some steps take ten times as long."""


def recorded() -> list[dict[int, Sample]]:
    rows = [line.split(",") for line in TRACE.read_text().splitlines() if line[0] != "#"]
    steps = []
    for row in rows:
        busy0_s, reduce0_s, busy1_s, reduce1_s = (int(us) / 1e6 for us in row)
        pairs = enumerate([(busy0_s, reduce0_s), (busy1_s, reduce1_s)])
        steps.append({r: Sample(busy, 0.5, inside, busy + inside) for r, (busy, inside) in pairs})
    return steps


def test_links_are_not_named_for_what_a_busy_machine_does() -> None:
    judge = PaceJudge(range(2))
    for number, samples in enumerate(recorded()):
        judge.step(samples)
        assert not judge.slow_links, f"step {number}"


def test_on_a_busy_machine_what_is_much_slower_is_named_all_the_same() -> None:
    steps = recorded()
    ranks, links = PaceJudge(range(2)), PaceJudge(range(2))
    for samples in steps[:600]:
        ranks.step(samples)
        links.step(samples)
    named, slow_links = set[int](), 0.0
    for samples in steps[600 : 600 + 2 * SOON]:
        more_s = 2 * samples[1].busy_s
        ranks.step({0: samples[0], 1: longer(samples[1], busy_s=more_s)})
        more_s = 15 * min(s.reduce_s for s in samples.values())
        links.step({rank: longer(s, reduce_s=more_s) for rank, s in samples.items()})
        named |= set(ranks.slow)
        slow_links = max(slow_links, links.slow_links)
    assert named == {1} and slow_links > 5


def longer(sample: Sample, busy_s: float = 0.0, reduce_s: float = 0.0) -> Sample:
    return Sample(
        sample.busy_s + busy_s,
        sample.share,
        sample.reduce_s + reduce_s,
        sample.total_s + busy_s + reduce_s,
    )


def starved() -> list[dict[int, Sample]]:
    rows = [line.split(",") for line in STARVED.read_text().splitlines() if line[0] != "#"]
    steps = []
    for row in rows:
        us = [int(word) / 1e6 for word in row]
        pairs = enumerate([us[:3], us[3:]])
        steps.append({r: Sample(b, 0.5, i, b + i, 0.0, w) for r, (b, i, w) in pairs})
    return steps


def test_who_waits_for_a_processor_is_noticed_and_not_named() -> None:
    judge, blind = PaceJudge(range(2)), PaceJudge(range(2))
    noticed = named = 0
    for number, samples in enumerate(starved()):
        judge.step(samples)
        assert not judge.slow and not judge.slow_links, f"step {number}: {judge.slow}"
        noticed += bool(judge.starved)
        blind.step({r: replace(s, waited_s=0.0) for r, s in samples.items()})
        named += bool(blind.slow)
    assert noticed and named, "the record has nothing that anybody could be named for"


def test_who_does_not_get_its_processor_for_long_is_named_in_the_end() -> None:
    judge = PaceJudge(range(2))
    usual = Sample(0.05, 0.5, 0.03, 0.08)
    for _ in range(100):
        judge.step({0: usual, 1: usual})
    waits = Sample(0.075, 0.5, 0.005, 0.08, 0.0, 0.025)
    took_s = 0.0
    while not judge.slow:
        judge.step({0: usual, 1: waits})
        took_s += waits.total_s
        assert took_s < 2 * STARVED_S, "nobody is named"
    assert took_s > STARVED_S and set(judge.slow) == {1} and judge.is_starved(1)


@pytest.mark.parametrize("waited", [0.0, 0.1])
def test_who_is_slow_by_itself_is_named_although_all_wait_a_little(waited: float) -> None:
    judge = PaceJudge(range(2))
    for number in range(100 + SOON):
        busy_s = 0.05 * (1.3 if number >= 100 else 1.0)
        slow = Sample(busy_s, 0.5, 0.01, 0.1, 0.0, waited * busy_s)
        judge.step({0: Sample(0.05, 0.5, 0.025, 0.1, 0.0, waited * 0.05), 1: slow})
    assert set(judge.slow) == {1} and not judge.starved
