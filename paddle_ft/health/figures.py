"""Which node of these figures is bad, and who is measured with whom. Pure.

Invariant: nobody is held against a constant. A figure is bad when it is below ``SHARE`` of the
median of the other nodes, a node when even the best of its pairs takes ``SLOWER`` times as long as
the best pair of a usual node; so one bad node of three or more is named, and nobody else. A pair
that is slow although both its nodes are well is a bad link.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

SHARE = 0.5
SLOWER = 2.0
SLOWER_BESIDE = 3.0
"""The same for what is measured beside a training, which uses the links and the processors, too."""
ROUNDS_MAX = 3
"""Each node is measured with so many others; one bad node among them is told from a good one."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a node can do; more is better, 0.0: not measured."""

    product_flops: float
    """Operations a second in a matrix product, all processors together."""
    copy_bytes_per_s: float
    write_bytes_per_s: float = 0.0
    """To the cache directory, until it is on the disk."""
    read_bytes_per_s: float = 0.0


NAMES = {
    "product_flops": "matrix product",
    "copy_bytes_per_s": "memory copy",
    "write_bytes_per_s": "writing to the disk",
    "read_bytes_per_s": "reading from the disk",
}


@dataclass(frozen=True, slots=True)
class PairTime:
    """An all-reduce of this node with ``peer``."""

    peer: str
    seconds: float
    """-1.0: it did not come about."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Value of ``probe/<node>``: a node that takes part in the measurement of pairs."""

    node: str
    host: str
    port: int
    figures: Figures
    phase: int = 0
    """0: is there; 1: has measured its pairs; 2: has read what the others have measured."""
    pairs: tuple[PairTime, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """A bad node, or a bad link between two."""

    nodes: tuple[str, ...]
    reason: str


def told(name: str, value: float) -> str:
    """A figure for people."""
    if not value:
        return "not measured"
    return f"{value / 1e9:.1f} Gflop/s" if name == "product_flops" else f"{value / 1e6:.0f} MB/s"


def shortfalls(own: Figures, others: Sequence[Figures]) -> list[str]:
    """What is below ``SHARE`` of the median of ``others``, in words."""
    found = []
    for name, words in NAMES.items():
        mine = getattr(own, name)
        rest = [value for other in others if (value := getattr(other, name))]
        if mine and rest and mine < SHARE * (usual := median(rest)):
            found.append(f"{words}: {told(name, mine)}, the others {told(name, usual)}")
    return found


def schedule(nodes: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Rounds of pairs; nobody meets the same node twice. With an odd number one rests in each."""
    around: list[str | None] = [*sorted(nodes)]
    if len(around) % 2:
        around.append(None)
    rounds = []
    count = len(around) - 1
    for _ in range(count if len(nodes) == 3 else min(count, ROUNDS_MAX)):
        half = len(around) // 2
        pairs = zip(around[:half], reversed(around[half:]), strict=True)
        rounds.append(tuple((a, b) for a, b in pairs if a is not None and b is not None))
        around = [around[0], around[-1], *around[1:-1]]
    return tuple(rounds)


def bad_links(times: Mapping[str, Sequence[PairTime]]) -> list[Finding]:
    """Of nodes that have measured links of theirs beside a training whose links are slow.

    One node's name: all that were measured of it; two: that between them. Empty if none stands out.
    """
    nothing = Figures(0.0, 0.0)
    entries = [Entry(node, "", 0, nothing, 1, tuple(t)) for node, t in sorted(times.items())]
    if len(entries) == 2:
        found = pair_times(entries).items()
        return [Finding(p, f"there and back {_s(s)}, and it is the only one") for p, s in found]
    return judge(entries, "there and back", SLOWER_BESIDE)


def judge(
    entries: Sequence[Entry], what: str = "all-reduce", slower: float = SLOWER
) -> list[Finding]:
    """The bad nodes by their figures and their pairs, then the bad links of the others."""
    times = pair_times(entries)
    best = {
        entry.node: min((s for pair, s in times.items() if entry.node in pair), default=math.nan)
        for entry in entries
    }
    measured = [s for s in best.values() if not math.isnan(s)]
    usual_s = median(measured) if measured else math.inf
    findings, bad = [], set[str]()
    for entry in entries:
        others = [other.figures for other in entries if other is not entry]
        reasons = shortfalls(entry.figures, others)
        if len(entries) > 2 and math.isfinite(usual_s) and best[entry.node] > slower * usual_s:
            reasons.append(f"{what} with {_peers(entry.node, times)}, usual {_s(usual_s)}")
        if reasons:
            bad.add(entry.node)
            findings.append(Finding((entry.node,), "; ".join(reasons)))
    for (a, b), seconds in sorted(times.items()):
        slow = math.isinf(seconds) or seconds > slower * usual_s
        if slow and not bad & {a, b}:
            text = f"{what} between them {_s(seconds)}, usual {_s(usual_s)}"
            findings.append(Finding((a, b), text))
    return findings


def pair_times(entries: Sequence[Entry]) -> dict[tuple[str, str], float]:
    """By pair in the order of names: the longer of what both measured, s; inf: it failed."""
    times: dict[tuple[str, str], float] = {}
    for entry in entries:
        for pair in entry.pairs:
            key = (min(entry.node, pair.peer), max(entry.node, pair.peer))
            seconds = pair.seconds if pair.seconds >= 0 else math.inf
            times[key] = max(times.get(key, 0.0), seconds)
    return times


def _peers(node: str, times: Mapping[tuple[str, str], float]) -> str:
    found = [(b if a == node else a, s) for (a, b), s in sorted(times.items()) if node in (a, b)]
    return ", ".join(f"{peer} {_s(seconds)}" for peer, seconds in found)


def _s(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if math.isfinite(seconds) else "failed"
