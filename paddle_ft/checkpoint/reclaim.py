"""Which objects are to be given up, their rest written anew, so that little lives in much.

Pure. An object stays in the store as long as one byte of it is referred to. Who writes a checkpoint
writes the bytes that are left in the objects ``sparse`` names once more, to objects that hold
nothing else, and no longer refers to those. Nothing is deleted by this: the collector finds that
nothing refers to them once the checkpoints that do are no longer kept, so its safety argument
(``retention``) is not concerned.

The objects of one checkpoint take at most **ratio x its bytes + what one checkpoint writes**
(``checkpoint.space_ratio``), and once a checkpoint is upon that, the emptiest are given up until
they would take ``STEP_SHARE`` of its bytes less. The emptiest are less in use than the mean, which
is 1 / ratio; so to make room for w bytes at most w / (ratio - 1) are moved.

Where rows change at random, all alike likely, it is known what this costs in the long run (the
cleaning of a log-structured store, oldest first): if what is moved is in use to a share u, a byte
changed costs 1 / (1 - u) bytes written, and the objects take -ln u / (1 - u) x the state. So space
(and with small rows, what a restore reads) is bought with writing: 1.5 x costs 1.7 bytes, 2 x 1.26,
2.3 x 1.16, and no order of writing does better as long as nothing is known of the next change.
Where some rows change more often than others it costs less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from paddle_ft.checkpoint.manifest import Manifest

STEP_SHARE = 0.05
USED_SHARE_MIN = 0.1
"""An object that is less in use is given up in any case."""
BUDGET_SHARE = 0.1
"""Of the state, that a checkpoint may write for this even if the one before wrote nothing."""
OBJECTS_MAX = 384
"""With more objects than that, and one for each MiB, the smallest are joined."""
_OBJECT_BYTES = 2**20


def used_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of each object that ``manifest`` refers to; those referred to twice count once."""
    ranges: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for piece in manifest.tensors:
        for block in piece.blocks:
            for e in block.extents:
                ranges[e.object].add((e.offset, e.nbytes))
    return {name: _union(found) for name, found in ranges.items()}


def _union(ranges: Iterable[tuple[int, int]]) -> int:
    total = end = 0
    for start, nbytes in sorted(ranges):
        total += max(0, start + nbytes - max(start, end))
        end = max(end, start + nbytes)
    return total


def sparse(manifest: Manifest, ratio: float) -> frozenset[str]:
    """The objects that a checkpoint upon ``manifest`` shall no longer refer to.

    All writers of a checkpoint find the same ones. What is to be written for them is at most
    what the checkpoint before has written plus ``BUDGET_SHARE`` of the state, plus one object.
    """
    used = manifest.used or used_bytes(manifest)
    size = manifest.objects
    excess = sum(size.values()) - int(ratio * manifest.nbytes)
    if excess > 0:
        excess += int(STEP_SHARE * manifest.nbytes)
    chosen: list[str] = []
    for name in sorted(used, key=lambda name: (used[name] / max(1, size[name]), name)):
        share_max = 1.0 if excess > 0 else USED_SHARE_MIN
        if used[name] < share_max * size[name]:
            chosen.append(name)
            excess -= size[name] - used[name]
    allowed = max(OBJECTS_MAX, manifest.nbytes // _OBJECT_BYTES)
    if len(used) > allowed:
        rest = sorted(used.keys() - set(chosen), key=lambda name: (used[name], name))
        chosen += rest[: len(used) - allowed + allowed // 8]
    budget = min(manifest.bytes_new, manifest.nbytes) + int(BUDGET_SHARE * manifest.nbytes)
    result: set[str] = set()
    for name in chosen:
        if budget <= 0:
            break
        budget -= used[name]
        result.add(name)
    return frozenset(result)
