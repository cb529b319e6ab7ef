"""Shards as boxes of elements: whether they make up a tensor, and what of them another box needs.

Pure. A box is a range of elements on every axis. Stored boxes of one tensor either are the same
(replicas, of which one is read) or do not overlap, and together they are the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """Elements ``start[i]`` to ``start[i] + shape[i]`` on each axis i."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def inside(self, whole: Sequence[int]) -> bool:
        """Whether this is a part of a tensor of shape ``whole``."""
        return len(self.start) == len(self.shape) == len(whole) and all(
            min(a, n) >= 0 and a + n <= w
            for a, n, w in zip(self.start, self.shape, whole, strict=True)
        )

    def common(self, other: Box) -> Box | None:
        """The elements both have; None if there are none."""
        start = tuple(map(max, self.start, other.start))
        end = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True)
        ]
        shape = tuple(e - s for s, e in zip(start, end, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def slices(self, outer: Box) -> tuple[slice, ...]:
        """Where this box is in an array that holds ``outer``."""
        return tuple(
            slice(a - b, a - b + n)
            for a, b, n in zip(self.start, outer.start, self.shape, strict=True)
        )


def whole_of(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def tiled(boxes: Iterable[Box], whole: Sequence[int]) -> bool:
    """Whether ``boxes``, equal ones counted once, cover each element of ``whole`` exactly once."""
    distinct = {box for box in boxes if box.size}
    if not all(box.inside(whole) for box in distinct):
        return False
    return math.prod(whole) == 0 or _tiled(list(distinct), whole, 0)


def _tiled(boxes: list[Box], whole: Sequence[int], axis: int) -> bool:
    if axis == len(whole):
        return len(boxes) == 1
    starting: dict[int, list[Box]] = {}
    for box in boxes:
        starting.setdefault(box.start[axis], []).append(box)
    ends = {box.start[axis] + box.shape[axis] for box in boxes}
    bounds = sorted({0, whole[axis], *starting, *ends})
    open_: list[Box] = []
    for bound in bounds[:-1]:
        open_ = [b for b in open_ if b.start[axis] + b.shape[axis] > bound]
        open_ += starting.get(bound, [])
        if not _tiled(open_, whole, axis + 1):
            return False
    return True


@dataclass(frozen=True, slots=True)
class PartOf:
    """A stored tensor, or a shard of one."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    """Shape of the tensor."""
    box: Box
    shard: bool


def unfit(parts: Iterable[PartOf]) -> list[str]:
    """Names of the tensors whose shards are not exactly all of it."""
    groups: dict[str, list[PartOf]] = {}
    divided: set[str] = set()
    for part in parts:
        groups.setdefault(part.name, []).append(part)
        if part.shard:
            divided.add(part.name)
    return [
        name
        for name in sorted(divided)
        if len({(p.dtype, p.whole, p.shard) for p in groups[name]}) != 1
        or not tiled((p.box for p in groups[name]), groups[name][0].whole)
    ]


def writers(boxes: Sequence[Box]) -> list[bool]:
    """For the box each rank holds of a tensor: whether that rank is the one to write it."""
    seen: set[Box] = set()
    result = []
    for box in boxes:
        result.append(box not in seen)
        seen.add(box)
    return result
