"""How long a batch may take before its worker is given up. Pure.

Invariant: a worker that computes is not given up for being slow before ``hard_s``, which a busy
machine does not reach; one that is stopped is, at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_SEEN_MIN = 8
"""Batches of one size class before anything is known of it."""
_SEEN_MAX = 64
_SOFT, _HARD = 5.0, 20.0
"""Times the slowest of them."""


@dataclass(frozen=True, slots=True)
class Bounds:
    soft_s: float
    """From here on a worker must at least use the processor."""
    hard_s: float


class Learnt:
    """Latencies by size of the input (powers of two), and the bounds that follow."""

    def __init__(self, floor_s: float, max_s: float) -> None:
        self._floor_s, self._max_s = floor_s, max_s
        self._seen: dict[int, deque[float]] = {}

    def note(self, nbytes: int, took_s: float) -> None:
        self._seen.setdefault(nbytes.bit_length(), deque(maxlen=_SEEN_MAX)).append(took_s)

    def bounds(self, nbytes: int) -> Bounds:
        seen = self._seen.get(nbytes.bit_length(), ())
        if len(seen) < _SEEN_MIN:
            return Bounds(self._max_s, self._max_s)
        slowest_s = max(seen)
        soft_s = min(self._max_s, self._floor_s + _SOFT * slowest_s)
        # What a busy machine adds does not depend on how small the model is.
        return Bounds(soft_s, min(self._max_s, 20 * self._floor_s + _HARD * slowest_s))


def verdict(
    ran_s: float, bounds: Bounds, stopped_s: float, still_s: float, *, may_wait: bool = False
) -> str:
    """Why a worker is to be given up; "" if it is not.

    Args:
        ran_s: since its batch began.
        stopped_s: for how long it has been stopped by a signal.
        still_s: for how long it has neither used nor waited for the processor.
        may_wait: that is no sign: it may wait for another device, or for the network.
    """
    if stopped_s > 0:
        return f"it has been stopped for {stopped_s:.2f} s"
    if ran_s >= bounds.hard_s:
        return f"its batch takes longer than {bounds.hard_s:.2f} s"
    if ran_s >= bounds.soft_s and still_s > 0 and not may_wait:
        return f"it has done nothing for {still_s:.2f} s"
    return ""
