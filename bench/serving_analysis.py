"""What the records of a load say. Pure.

Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from bench.recovery_analysis import percentile

RECORD = struct.Struct("<dddhh")
"""When a request was to be sent, was sent, was answered; status; version of the model."""
LOST, TIMED_OUT, WRONG = -1, -2, -3
"""In place of a status: the connection broke; no answer in time; 200 with a wrong answer."""
SLOW_S = 0.1
"""A request that takes longer has met a replica that does not answer ..."""
SLOW_TIMES = 3.0
"""... if it also takes so many times what 99 of 100 calm ones do."""


class Request(NamedTuple):
    """One inference."""

    intended_s: float
    sent_s: float
    answered_s: float
    status: int
    version: int

    @property
    def took_s(self) -> float:
        return self.answered_s - self.intended_s


class Ack(NamedTuple):
    """One change of the state that was acknowledged."""

    asked_s: float
    answered_s: float
    term: int
    sequence: int
    writer: int
    key: str
    number: int


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault or promotion."""

    at_s: float
    kind: str
    primary_s: float | None = None
    """Until etcd had a new primary; None: the primary was not hurt."""
    over_s: float = 0.0
    """When all was as before."""


def requests_of(data: bytes) -> list[Request]:
    """By the time they were to be sent; a record that was cut short is left out."""
    whole = len(data) // RECORD.size * RECORD.size
    return sorted(Request(*values) for values in RECORD.iter_unpack(data[:whole]))


def failed(requests: Iterable[Request]) -> int:
    return sum(r.status != 200 for r in requests)


def slowest_s(requests: Iterable[Request]) -> float:
    return max((r.took_s for r in requests), default=0.0)


def within(requests: Iterable[Request], begin_s: float, end_s: float) -> list[Request]:
    """Those to be sent in that time."""
    return [r for r in requests if begin_s <= r.intended_s < end_s]


def p99_s(requests: Iterable[Request]) -> float:
    took = [r.took_s for r in requests]
    return percentile(took, 0.99) if took else 0.0


def routed_around_s(requests: Sequence[Request], strike: Strike, calm_p99_s: float) -> float:
    """Until the last request was sent that has still met the replica which does not answer."""
    bound_s = max(SLOW_S, SLOW_TIMES * calm_p99_s)
    caught = [
        r.intended_s - strike.at_s
        for r in within(requests, strike.at_s, strike.over_s)
        if r.took_s > bound_s or r.status != 200
    ]
    return max(caught, default=0.0)


def longest_gap_s(times: Iterable[float], begin_s: float, end_s: float) -> float:
    """The longest time between two of ``times`` that touches [begin_s, end_s]; to the end if none
    came after it."""
    inside = sorted(t for t in times if t <= end_s)
    before = [t for t in inside if t <= begin_s][-1:] or [begin_s]
    after = [t for t in inside if t > begin_s]
    return max(b - a for a, b in pairwise([*before, *after, max(end_s, before[0])]))


def answered_by_two_terms(acks: Iterable[Ack]) -> int:
    """Acknowledgements of a term, asked for after one of a later term had come."""
    ordered = sorted(acks, key=lambda a: a.answered_s)
    asked = sorted(acks, key=lambda a: a.asked_s)
    highest, position, found = 0, 0, 0
    for ack in asked:
        while position < len(ordered) and ordered[position].answered_s < ack.asked_s:
            highest = max(highest, ordered[position].term)
            position += 1
        found += ack.term < highest
    return found


def newest(acks: Iterable[Ack]) -> dict[tuple[int, str], int]:
    """The last number that was acknowledged, by writer and key."""
    found: dict[tuple[int, str], int] = {}
    for ack in acks:
        place = (ack.writer, ack.key)
        found[place] = max(ack.number, found.get(place, 0))
    return found


def lost(acks: Iterable[Ack], held: Mapping[tuple[int, str], int]) -> list[str]:
    """Which acknowledged entries are not in ``held``, what a replica has in the end; a later number
    may stand there, whose acknowledgement did not arrive."""
    wanted = newest(acks)
    return [
        f"writer {w}, {k}: {n} was acknowledged, {held.get((w, k), 0)} is there"
        for (w, k), n in sorted(wanted.items())
        if held.get((w, k), 0) < n
    ]
