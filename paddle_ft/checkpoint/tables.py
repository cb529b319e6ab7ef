"""Reading the tables of layers, and blocks that have layers."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from paddle_ft.checkpoint.content import Block, Extent, Layer
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.layers import (
    Entry,
    Map,
    Mask,
    decode_table,
    map_of,
    placed,
    table_digest,
)
from paddle_ft.checkpoint.plan import Target, scatter
from paddle_ft.checkpoint.store import Store, get_range, tiers_of
from paddle_ft.errors import CheckpointDamaged, StoreError, StoreMissing

_log = logging.getLogger(__name__)
READ_THREADS = 8
READ_BYTES = 4 * 2**20
"""Of a read of rows, which are then brought to their places."""
GAP_BYTES = 64 * 2**10


class Tables:
    """The tables of a store; each is read once. Safe for threads.

    Memory: about 1.2 bytes for each row of the layers asked for.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fetching = threading.Lock()
        self._known: dict[Layer, Mapping[int, Entry]] = {}

    def fetch(self, blocks: Iterable[Block]) -> None:
        """Reads those of ``blocks`` beforehand, side by side; raises as ``of``."""
        wanted = {layer for block in blocks for layer in block.layers}
        with self._fetching:
            missing = sorted(wanted - self._known.keys(), key=lambda y: y.object)
            if missing:
                with Crew(min(READ_THREADS, len(missing)), "tables") as pool:
                    for _ in pool.map(self._table, missing):
                        pass

    def of(self, block: Block) -> tuple[list[Entry], Map]:
        """The layers of ``block``, and which sub-block is in which.

        Raises CheckpointDamaged, StoreError.
        """
        try:
            entries = [self._table(layer)[block.key] for layer in block.layers]
            return entries, map_of(block, entries)
        except (KeyError, ValueError):
            names = ", ".join(sorted({y.object for y in block.layers}))
            raise CheckpointDamaged(
                f"{self._store.url} is damaged: the tables of {names} do not hold together; use "
                f"an older checkpoint."
            ) from None

    def _table(self, layer: Layer) -> Mapping[int, Entry]:
        known = self._known.get(layer)
        if known is None:
            known = self._known[layer] = self._read(layer)
        return known

    def _read(self, layer: Layer) -> Mapping[int, Entry]:
        *nearer, last = tiers_of(self._store)
        reason = "altered"
        # From the last tier twice: it may have been altered on its way.
        for tier in (*nearer, last, last):
            try:
                data = get_range(tier, layer.object, layer.offset, layer.nbytes)
            except StoreMissing:
                reason = "missing or too short"
                continue
            except StoreError as error:
                if tier is last:
                    raise
                _log.info("%s", error)
                continue
            if table_digest(data) == layer.digest:
                return decode_table(data)
            reason = "altered"
            if tier is not last:
                _log.warning("Dropped from %s, being altered: %s.", tier.url, layer.object)
                tier.delete([layer.object])
        raise CheckpointDamaged(
            f"{self._store.url} is damaged: the table of {layer.object} is {reason}; use an older "
            f"checkpoint."
        )


def read_layers(store: Store, tables: Tables, targets: Sequence[Target], image: memoryview) -> None:
    """Brings the rows in layers of ``targets`` into ``image``, unverified.

    At most one read for each object and ``READ_BYTES`` of a batch. Raises CheckpointDamaged,
    StoreError.
    """
    jobs: list[tuple[Target, Entry, Mask, Mask]] = []
    wanted: list[tuple[Extent, int]] = []
    for target in targets:
        if not target.block.layers:
            continue
        entries, found = tables.of(target.block)
        sizes = found.cut.sizes()
        for number, entry in enumerate(entries, 1):
            live = found.owners == number
            if live.any():
                mask = entry.mask()
                nbytes = int(sizes[mask].sum())
                layer = target.block.layers[number - 1]
                wanted.append((Extent(layer.object, entry.offset, nbytes), len(jobs)))
                jobs.append((target, entry, mask, live))
    for run in scatter(wanted, GAP_BYTES, READ_BYTES):
        buffers = [memoryview(bytearray(n)) for _, n in run.places]
        store.read_into(run.object, run.offset, buffers)
        for (job, _), data in zip(run.places, buffers, strict=True):
            if job >= 0:
                target, entry, mask, live = jobs[job]
                place = image[target.offset : target.offset + target.block.nbytes]
                placed(data, place, entry.cut, mask, live)


def used_by(blocks: Iterable[Block], maps: Mapping[str, Map]) -> dict[str, int]:
    """Bytes in use of each object; ``maps``: of the blocks with layers, by digest."""
    used: dict[str, int] = defaultdict(int)
    for block in {b.digest: b for b in blocks}.values():
        if not block.layers:
            for e in block.extents:
                used[e.object] += e.nbytes
            continue
        first, *rest = map(int, maps[block.digest].used(len(block.layers)))
        for e in block.extents:
            used[e.object] += first * e.nbytes // block.nbytes
        for layer, nbytes in zip(block.layers, rest, strict=True):
            used[layer.object] += nbytes
    return used
