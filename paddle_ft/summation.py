"""A sum of many terms whose every bit is the same, however the terms are divided among ranks.

Invariant: the order of the additions is a binary tree that depends on the number of terms alone.
Ranks that each have a run of the terms add up what makes whole subtrees; whoever has the subtrees
of all ranks adds up the rest. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Span = tuple[int, int]
"""Terms [start, stop): a node of the tree."""

T = TypeVar("T")


def cover(start: int, stop: int, count: int) -> list[Span]:
    """The largest nodes of the tree over ``count`` terms that make up [start, stop), in order."""
    return _cover(start, stop, (0, count))


def _cover(start: int, stop: int, node: Span) -> list[Span]:
    if stop <= node[0] or node[1] <= start:
        return []
    if start <= node[0] and node[1] <= stop:
        return [node]
    left, right = _halves(node)
    return _cover(start, stop, left) + _cover(start, stop, right)


def _halves(node: Span) -> tuple[Span, Span]:
    start, stop = node
    middle = (start + stop) // 2
    return (start, middle), (middle, stop)


def total(sums: Mapping[Span, T], count: int, add: Callable[[T, T], T]) -> T:
    """The sum of all ``count`` terms from ``sums`` of nodes that make it up."""

    def of(node: Span) -> T:
        if node in sums:
            return sums[node]
        left, right = _halves(node)
        return add(of(left), of(right))

    return of((0, count))


class Partial(Generic[T]):
    """Sums of the nodes that one rank's terms make up, at most about two for each level.

    ``add(a, b)`` gives their sum, and may use the memory of ``a`` for it; ``keep`` a value of its
    own of what the caller will use again.
    """

    def __init__(self, count: int, add: Callable[[T, T], T], keep: Callable[[T], T]) -> None:
        self.count = count
        self._add = add
        self._keep = keep
        self._nodes: list[tuple[Span, T]] = []

    @property
    def sums(self) -> dict[Span, T]:
        return dict(self._nodes)

    def put(self, index: int, term: T) -> None:
        """Adds term number ``index``, which follows the one that was put before."""
        node, value, own = (index, index + 1), term, False
        while self._nodes and self._joins(self._nodes[-1][0], node):
            (start, _), before = self._nodes.pop()
            node, value, own = (start, node[1]), self._add(before, value), True
        self._nodes.append((node, value if own else self._keep(value)))

    def _joins(self, left: Span, right: Span) -> bool:
        assert left[1] == right[0], f"term {right[0]} does not follow {left}"
        return cover(left[0], right[1], self.count) == [(left[0], right[1])]
