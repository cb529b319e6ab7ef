"""Who is slower than the others, and whether the links have become slower. Pure.

A rank's pace is its busy time of a step: what it does itself, without waiting for others, between
steps or for a snapshot. Each step gives the logarithm of its ratio to the median of the others;
uneven slices of a batch are allowed for. The last ``WINDOW`` of these, without a quarter of them at
either end (collections of garbage, pauses of the machine), are averaged.

Invariant: a rank is noticed when that average is beyond ``SLOW`` and beyond what the scatter of its
own steps explains, and no more when it is back below half of that; so no single step, and no run of
up to ``WINDOW`` // 4 bad ones, does it. It is **named** if the same holds without the time that it
was ready to run and had no processor: then it is slow by itself. Otherwise other programs have its
processor, and it is named when that has lasted for ``STARVED_S``. Links, too, are judged without
such waits, and must be beyond what their average has wandered before as well: on a machine that
others use, it does so by itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 16
"""Steps that are averaged: a straggler is to be named within 20."""
SKIPPED = 3
"""The first steps in a group compile and warm up."""
SLOW = math.log(1.15)
SLOW_LINK = math.log(2.0)
SIGMAS = 5.5
SCATTER_STEPS = 128
MEANS_KEPT = 64
MEANS_LEAST = 4
WANDERS = 4.0
"""So many times as far as its average wandered before a link must be off."""
STARVED_S = 30.0
"""Other programs that start and end take a processor away for seconds; who gets less of it for
longer than this is a straggler, whatever the cause."""
OWN_S = 3.0
"""For how long it must be slow by itself where the ranks do nothing but wait for processors."""
WAITS_USUAL = 0.05
"""Of the busy time of a rank; from there on, the more they wait the longer evidence has to last."""
OWN_LEAST = 0.2
"""Of its busy time is a rank's own at least, whatever it waited: waits are known for some steps
together, and not all of them were in its own part of these."""
MIN_EXCESS_S = 0.001
LINK_HISTORY = 1024
LINK_LEARNT = 64
LINK_SHARE = 0.05
"""Of a step: by less than this a slower link is nobody's business."""
SNAPSHOT_NOISE_S = 0.0005
PACE_CHANGE = 0.05
REDUCE_CHANGE = SLOW_LINK


@dataclass(frozen=True, slots=True)
class Pace:
    """The average of a rank over its last steps, as other nodes are told of it."""

    rank: int
    busy_s: float
    share: float
    reduce_s: float
    """The shortest time inside collectives of any rank of the node: nobody waited in it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one step of one rank says of its pace."""

    busy_s: float
    share: float
    reduce_s: float
    total_s: float
    saving_s: float = 0.0
    waited_s: float = 0.0
    """For a processor, at any time of the step."""

    @property
    def own_s(self) -> float:
        """Of ``busy_s``, without the waits."""
        return max(OWN_LEAST * self.busy_s, self.busy_s - self.waited_s)


def same_paces(one: Sequence[Pace], other: Sequence[Pace]) -> bool:
    """Whether there is nothing new in them, by ``PACE_CHANGE`` and ``REDUCE_CHANGE``."""
    if [p.rank for p in one] != [p.rank for p in other]:
        return False
    return all(
        abs(_ratio(a.busy_s, b.busy_s)) < PACE_CHANGE
        and abs(_ratio(a.reduce_s, b.reduce_s)) < REDUCE_CHANGE
        and a.share == b.share
        for a, b in zip(one, other, strict=True)
    )


class Gauge:
    """The trimmed mean of the last values, held against what their scatter explains."""

    def __init__(self, threshold: float, wanders: float = 0.0) -> None:
        self.named = False
        self._threshold = threshold
        self._wanders = wanders
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._jumps: deque[float] = deque(maxlen=SCATTER_STEPS)
        self._means: deque[float] = deque(maxlen=MEANS_KEPT)
        """Of every ``WINDOW`` steps: how far it wanders without anybody being slow."""
        self._count = 0
        self._wander = 0.0

    @property
    def mean(self) -> float:
        return trimmed_mean(self._last) if self._last else 0.0

    def note(self, value: float) -> None:
        """Takes ``value`` into account, without judging."""
        if self._last:
            self._jumps.append(abs(value - self._last[-1]))
        self._last.append(value)

    def add(self, value: float, counts: bool = True) -> None:
        """``counts``: the difference is large enough to matter in seconds."""
        self.note(value)
        self.judge(counts)

    def judge(self, counts: bool = True) -> None:
        if len(self._last) < WINDOW:
            return
        self._count += 1
        limit = max(
            self._threshold,
            SIGMAS * self._scatter() / math.sqrt(WINDOW),
            self._wanders * self._wander,
        )
        self.named = counts and self.mean > (limit / 2 if self.named else limit)
        if self._wanders and self._count % WINDOW == 0:
            self._means.append(self.mean)
            self._wander = _wander(self._means)

    def _scatter(self) -> float:
        """Standard deviation of one value, from the differences of successive ones, which a lasting
        change does not enlarge."""
        return median(self._jumps) * 1.4826 / math.sqrt(2)


def _wander(means: deque[float]) -> float:
    """Standard deviation of the means; a change that lasts for less than half of them is none."""
    if len(means) < MEANS_LEAST:
        return 0.0
    middle = median(means)
    return median(abs(mean - middle) for mean in means) * 1.4826


def trimmed_mean(values: Sequence[float] | deque[float]) -> float:
    """Without a quarter of the values at either end."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


class PaceJudge:
    """Of the ranks of one group; ``local`` are those whose every step is seen here."""

    def __init__(self, local: Sequence[int]) -> None:
        self._local = tuple(local)
        self._gauges = {rank: Gauge(SLOW) for rank in local}
        self._own = {rank: Gauge(SLOW) for rank in local}
        """Without waits for a processor."""
        self._noticed_s = dict.fromkeys(local, 0.0)
        """For how long it has been slower than the others, for whatever cause."""
        self._own_s = dict.fromkeys(local, 0.0)
        """The same, by itself."""
        self._link = Gauge(SLOW_LINK, WANDERS)
        self._reduces: deque[float] = deque(maxlen=LINK_HISTORY)
        self._recent: dict[int, deque[Sample]] = {r: deque(maxlen=WINDOW) for r in local}
        self._totals: deque[float] = deque(maxlen=WINDOW)
        """Lengths of the last steps."""
        self._usual_s = 0.0
        """For the reduction alone."""
        self._steps = 0

    def step(self, samples: Mapping[int, Sample], others: Sequence[Pace] = ()) -> None:
        """One step of all local ranks; ``others``: what other nodes last told of theirs."""
        self._steps += 1
        if self._steps <= SKIPPED:
            return
        if any(s.saving_s > SNAPSHOT_NOISE_S for s in samples.values()):
            return  # a snapshot was copied beside it
        for rank in self._local:
            self._recent[rank].append(samples[rank])
        self._judge_paces(samples, others)
        self._judge_links(samples, others)

    @property
    def slow(self) -> dict[int, float]:
        """How much longer the ranks that are named take than the others, 0.3 for 30 %."""
        return {r: by for r, by in self._noticed.items() if self._is_named(r)}

    @property
    def starved(self) -> dict[int, float]:
        """As ``slow``, of those that are noticed but not named: they wait for a processor."""
        return {r: by for r, by in self._noticed.items() if not self._is_named(r)}

    @property
    def _noticed(self) -> dict[int, float]:
        return {r: math.expm1(g.mean) for r, g in self._gauges.items() if g.named}

    def is_starved(self, rank: int) -> bool:
        """Whether it would keep up if it always had its processor."""
        return not self._own[rank].named

    def _is_named(self, rank: int) -> bool:
        own_s = self._own_s[rank]
        return own_s > self._patience_s or self._noticed_s[rank] >= STARVED_S

    @property
    def slow_links(self) -> float:
        """How many times longer than usual the reduction takes; 0.0 if it does not."""
        return math.exp(self._link.mean) if self._link.named else 0.0

    def paces(self) -> tuple[Pace, ...]:
        """For the other nodes; empty until there is an average."""
        if any(len(samples) < WINDOW for samples in self._recent.values()):
            return ()
        shortest = [min(s) for s in zip(*map(_reduces, self._recent.values()), strict=True)]
        reduce_s = trimmed_mean(shortest)
        return tuple(
            Pace(rank, trimmed_mean([s.busy_s for s in done]), done[-1].share, reduce_s)
            for rank, done in self._recent.items()
        )

    def _judge_paces(self, samples: Mapping[int, Sample], others: Sequence[Pace]) -> None:
        seen = {rank: (s.busy_s, s.share) for rank, s in samples.items()}
        seen |= {pace.rank: (pace.busy_s, pace.share) for pace in others}
        if len(seen) < 2:
            return
        for rank, gauge in self._gauges.items():
            sample, own = samples[rank], self._own[rank]
            rest = [value for other, value in seen.items() if other != rank]
            usual_s = median(b for b, _ in rest)
            ratio = _ratio(sample.busy_s, usual_s)
            if sample.share > 0 and all(s > 0 for _, s in rest):
                each_s = median(b / s for b, s in rest)
                ratio = min(ratio, _ratio(sample.busy_s / sample.share, each_s))
            gauge.add(ratio, math.expm1(gauge.mean) * usual_s > MIN_EXCESS_S)
            rest_own = [_ratio(s.busy_s, s.own_s) for o, s in samples.items() if o != rank]
            less = median(rest_own) if rest_own else 0.0
            ratio -= _ratio(sample.busy_s, sample.own_s) - less
            own.note(ratio)
            own.named = own.named and gauge.named
            if gauge.named:
                own.judge(math.expm1(own.mean) * usual_s > MIN_EXCESS_S)
            self._lasts(self._noticed_s, rank, sample, gauge.named)
            self._lasts(self._own_s, rank, sample, gauge.named and own.named)

    @staticmethod
    def _lasts(since_s: dict[int, float], rank: int, sample: Sample, named: bool) -> None:
        since_s[rank] = since_s[rank] + sample.total_s if named else 0.0

    @property
    def _patience_s(self) -> float:
        """How long evidence has to last, by what the ranks waited for processors."""
        last = [s for samples in self._recent.values() for s in samples]
        waited = sum(s.waited_s for s in last) / max(sum(s.busy_s for s in last), 1e-6)
        return OWN_S * max(0.0, min(1.0, waited) - WAITS_USUAL)

    def _judge_links(self, samples: Mapping[int, Sample], others: Sequence[Pace]) -> None:
        """Who comes last to a collective waits for nobody: the shortest time inside is its own."""
        taken_s = min(s.reduce_s for s in samples.values())
        taken_s = min([taken_s, *(pace.reduce_s for pace in others)])
        if taken_s <= 0:
            return
        self._totals.append(median(s.total_s for s in samples.values()))
        if len(self._reduces) >= LINK_LEARNT:
            if self._steps % WINDOW == 0 or not self._usual_s:
                self._usual_s = median(list(self._reduces)[:-WINDOW])
            usual_s = self._usual_s
            step_s = median(self._totals)  # one long step does not clear anybody
            excess_s = math.expm1(self._link.mean) * usual_s
            waited_s = max(s.waited_s for s in samples.values())
            own_s = max(OWN_LEAST * taken_s, taken_s - waited_s)
            self._link.add(
                _ratio(own_s, usual_s), excess_s > max(MIN_EXCESS_S, LINK_SHARE * step_s)
            )
        if not self._link.named:
            self._reduces.append(taken_s)


def _reduces(samples: deque[Sample]) -> list[float]:
    return [s.reduce_s for s in samples]


def _ratio(value_s: float, usual_s: float) -> float:
    return math.log(max(value_s, 1e-6) / max(usual_s, 1e-6))
