"""Which objects are to be given up, their rest written anew, so that little lives in much.

Pure. An object stays in the store as long as one byte of it is referred to. Who writes a checkpoint
writes the bytes that are left in the objects ``sparse`` names once more, to objects that hold
nothing else, and no longer refers to those. Nothing is deleted by this: the collector finds that
nothing refers to them once the checkpoints that do are no longer kept, so its safety argument
(``retention``) is not concerned.

The objects of one checkpoint take at most **2 x its bytes + what one checkpoint writes + one
object for each writer**: an object is sparse when less than half of it is in use, so giving up u
bytes in use gives up more than u of garbage; each checkpoint that writes w bytes makes at most w of
garbage, and the next gives up at least w in use, if there is as much in sparse objects. So either
none is sparse, or garbage does not grow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from paddle_ft.checkpoint.manifest import Manifest

USED_SHARE_MIN = 0.5
BUDGET_SHARE = 0.1
"""Of the state, that a checkpoint may write for this even if the one before wrote nothing."""
OBJECTS_MAX = 64
"""With more objects than that, and two for each 64 MiB, the smallest are joined."""
_OBJECT_BYTES = 64 * 2**20


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


def sparse(manifest: Manifest) -> frozenset[str]:
    """The objects that a checkpoint upon ``manifest`` shall no longer refer to.

    All writers of a checkpoint find the same ones. What is to be written for them is at most
    what the checkpoint before has written plus ``BUDGET_SHARE`` of the state, plus one object.
    """
    used = used_bytes(manifest)
    size = manifest.objects
    chosen = [name for name in used if used[name] < USED_SHARE_MIN * size[name]]
    chosen.sort(key=lambda name: (used[name] / size[name], name))
    allowed = max(OBJECTS_MAX, 2 * -(-manifest.nbytes // _OBJECT_BYTES))
    if len(used) > allowed:
        rest = sorted(used.keys() - set(chosen), key=lambda name: (used[name], name))
        chosen += rest[: len(used) - allowed // 2]
    budget = min(manifest.bytes_new, manifest.nbytes) + int(BUDGET_SHARE * manifest.nbytes)
    result: set[str] = set()
    for name in chosen:
        if budget <= 0:
            break
        budget -= used[name]
        result.add(name)
    return frozenset(result)
