"""Which waiting requests run next, together. Pure: the time is an argument.

- While a worker is idle nothing waits: whatever is there begins.
- A batch has at most ``rows_max`` rows, of requests with one signature (names, types and shapes
  beyond the first dimension); a request that has more rows by itself runs alone.
- Among signatures the one that fills a batch best goes first, but nobody is passed over for longer
  than ``wait_max_s``: whoever has waited longer goes before everybody who came later.
- A batch that failed is run again request by request, before anything else.
- What is past its deadline does not run.
- The queue has a bound in requests and in bytes, and says no beyond it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Item:
    """One request in the queue."""

    key: int
    signature: Hashable
    """None: never joined with another one."""
    rows: int
    size_bytes: int
    arrived_s: float
    deadline_s: float
    alone: bool = False
    """It was in a batch that failed."""


@dataclass(frozen=True, slots=True)
class Limits:
    rows_max: int = 4
    """1: no batching."""
    wait_max_s: float = 0.02
    queue_max: int = 256
    queue_bytes_max: int = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Decision:
    batch: tuple[Item, ...]
    """Begins now; empty: nothing does."""
    expired: tuple[Item, ...]
    """To be answered with an error."""
    wake_s: float | None
    """When to ask again if nothing else happens; None: not before something does."""
    reason: str


class Queue:
    """Requests in the order of their arrival."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._items: dict[int, Item] = {}
        self._again: dict[int, Item] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._items) + len(self._again)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def add(self, item: Item) -> bool:
        """Whether there was room for it. An empty queue takes a request of any size."""
        bytes_after = self._size_bytes + item.size_bytes
        if len(self) >= self.limits.queue_max or (
            len(self) and bytes_after > self.limits.queue_bytes_max
        ):
            return False
        assert item.key not in self._items
        self._items[item.key] = item
        self._size_bytes = bytes_after
        return True

    def again(self, batch: tuple[Item, ...]) -> None:
        """Each of ``batch`` runs once more, by itself; they were admitted before."""
        for item in batch:
            self._again[item.key] = replace(item, alone=True)
            self._size_bytes += item.size_bytes

    def cancel(self, key: int) -> bool:
        """Whether it was still waiting."""
        item = self._items.pop(key, None) or self._again.pop(key, None)
        self._size_bytes -= item.size_bytes if item else 0
        return item is not None

    def take(self, now_s: float, idle: int) -> Decision:
        """What begins at ``now_s``, with ``idle`` workers that could begin at once."""
        late = tuple(
            item
            for items in (self._again, self._items)
            for item in items.values()
            if item.deadline_s <= now_s
        )
        for item in late:
            self.cancel(item.key)
        if idle <= 0 or not len(self):
            wake_s = min(
                (i.deadline_s for part in (self._again, self._items) for i in part.values()),
                default=None,
            )
            return Decision((), late, wake_s, "nothing waits" if wake_s is None else "no idle one")
        batch, reason = self._choose(now_s)
        for item in batch:
            self.cancel(item.key)
        return Decision(batch, late, None, reason)

    def _choose(self, now_s: float) -> tuple[tuple[Item, ...], str]:
        if self._again:
            return (next(iter(self._again.values())),), "again, alone"
        batches: dict[Hashable, list[Item]] = {}
        rows: dict[Hashable, int] = {}
        full: set[Hashable] = set()
        for item in self._items.values():
            kind = ("alone", item.key) if item.signature is None else ("of", item.signature)
            if kind in full:
                continue
            taken = rows.get(kind, 0)
            if taken and taken + item.rows > self.limits.rows_max:
                full.add(kind)  # nobody overtakes one of the same kind
                continue
            batches.setdefault(kind, []).append(item)
            rows[kind] = taken + item.rows
        oldest = next(iter(batches))  # in the order of arrival
        if now_s - batches[oldest][0].arrived_s >= self.limits.wait_max_s:
            return tuple(batches[oldest]), "has waited longest"
        best = max(batches, key=lambda kind: min(rows[kind], self.limits.rows_max))
        return tuple(batches[best]), "fills a batch best"
