"""What becomes of each block of a checkpoint: known already, changed in part, or new.

Of a block that is not known, only the sub-blocks that differ from the block which stood there
before are written, as a layer upon it, if these are few (``deltas``). What is still in use of an
object that is to be given up (``reclaim``) is written anew, as a layer too or as a whole block.

Invariant: an object's table has one entry for a key, and a key is drawn anew for each block that
gets its first layer; so a layer named by a block holds rows of that very block, whoever else has
written upon the same predecessor.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from paddle_ft.checkpoint.content import Block, Extent, Layer, Piece, digest_of
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.deltas import Print, Prints, changed, worthwhile
from paddle_ft.checkpoint.layers import (
    Cut,
    Entry,
    Map,
    Mask,
    encode_table,
    entry_of,
    picked,
    pruned,
    table_digest,
)
from paddle_ft.checkpoint.manifest import Manifest
from paddle_ft.checkpoint.store import Store
from paddle_ft.checkpoint.tables import Tables, used_by
from paddle_ft.errors import CheckpointDamaged, StoreError


@dataclass(frozen=True, slots=True)
class Place:
    """The bytes of one block."""

    view: memoryview
    place: tuple[int, int]
    """Rank, offset in its image."""
    start: int
    """In the tensor."""
    before: Block | None
    """What stood there in the parent."""
    grain: int
    """Of its print; 0: none is wanted."""


class Blocks:
    """Finds for each block where it is, or puts there what is new of it."""

    def __init__(
        self,
        parent: Manifest | None,
        fresh: Packer,
        moved: Packer,
        prints: Prints,
        given_up: frozenset[str],
        tables: Tables,
    ) -> None:
        pieces = parent.tensors if parent else ()
        self.prints = prints
        self._old = {(p.name, p.rank): p.blocks for p in pieces}
        self._old_bytes = parent.block_bytes if parent else 0
        self._known = {b.digest: b for p in pieces for b in p.blocks}
        self._given_up = given_up
        self._fresh, self._moved = fresh, moved
        self._tables = tables
        self._new: dict[str, Print] = {}
        self._maps: dict[str, Map] = {}

    def before(self, name: str, rank: int, block_bytes: int) -> tuple[Block, ...]:
        """The blocks of the tensor in the parent, if they were cut alike."""
        return self._old.get((name, rank), ()) if block_bytes == self._old_bytes else ()

    def look(self, place: Place) -> tuple[str, Print | None]:
        """Digest and, if it is needed, print. For any thread."""
        digest = digest_of(place.view)
        if not place.grain or digest in self._known:
            return digest, None
        return digest, self.prints.of(place.view, place.start, place.grain)

    def of(
        self, tensor: tuple[str, int], found: Sequence[tuple[Place, str, Print | None]]
    ) -> tuple[Block, ...]:
        """The blocks of one piece, what is new of them on its way into the store."""
        result = []
        compared = useful = unknown = False
        for place, digest, tags in found:
            block = self._known.get(digest)
            if block is None:
                unknown = True
                mask = self._changed(place, tags)
                compared = compared or mask is not None
                block = self._upon(place, digest, mask, tags)
                useful = useful or block is not None
                if block is None:
                    block = Block(digest, place.view.nbytes, (self._fresh.add(place.view),))
                if tags is not None:
                    self._new[digest] = tags
            self._known[digest] = block = self._rid(block, place)
            result.append(block)
        if compared:
            self.prints.found(tensor, useful)
        elif unknown and not self.prints.wanted(tensor):
            self.prints.passed(tensor)
        return tuple(result)

    def _changed(self, place: Place, tags: Print | None) -> Mask | None:
        """Where the block differs from its predecessor, if that can be told."""
        if tags is None or place.before is None or place.before.codec:
            return None
        digest = place.before.digest
        old = self.prints.get(digest) or self._new.get(digest)
        return changed(old, tags) if old is not None else None

    def _upon(
        self, place: Place, digest: str, mask: Mask | None, tags: Print | None
    ) -> Block | None:
        """The block as its predecessor with one more layer; None if that is of no use."""
        before = place.before
        if mask is None or before is None or tags is None:
            return None
        if not worthwhile(mask, tags.cut, len(before.layers)):
            return None
        old = self._map(before)
        if before.layers and (old is None or old.cut != tags.cut):
            return None
        old = old or Map(tags.cut, np.zeros(len(mask), np.uint16))
        return self._layered(replace(before, digest=digest), old, mask, place, self._fresh)

    def _layered(
        self, block: Block, old: Map, mask: Mask, place: Place, packer: Packer
    ) -> Block | None:
        """``block`` with ``mask`` taken from the bytes of ``place``, through ``packer``."""
        key = block.key or secrets.randbits(62) + 1
        layer = packer.layer(key, old.cut, mask, picked(place.view, old.cut, mask))
        if layer is None:
            return None
        owners = old.owners.copy()
        owners[mask] = len(block.layers) + 1
        block = replace(block, key=key, layers=(*block.layers, layer))
        block, self._maps[block.digest] = pruned(block, Map(old.cut, owners))
        return block

    def _map(self, block: Block) -> Map | None:
        """Where the sub-blocks of a block are; None if it has no layers or that cannot be told."""
        if not block.layers:
            return None
        for found in (self._maps.get(block.digest), self.prints.map(block.digest)):
            if found is not None and found.fits(block):
                return found
        try:
            self._tables.fetch([block])
            return self._tables.of(block)[1]
        except (CheckpointDamaged, StoreError):
            return None

    def _rid(self, block: Block, place: Place) -> Block:
        """``block`` without the objects that are to be given up, its map known."""
        if not block.layers:
            if block.objects & self._given_up:
                return Block(block.digest, block.nbytes, (self._moved.add(place.view),))
            return block
        found = self._map(block)
        if found is None:
            return Block(block.digest, block.nbytes, (self._moved.add(place.view),))
        self._maps[block.digest] = found
        numbers = [i for i, y in enumerate(block.layers, 1) if y.object in self._given_up]
        if any(e.object in self._given_up for e in block.extents):
            numbers.append(0)
        if not numbers:
            return block
        mask = np.isin(found.owners, numbers)
        if mask.any() and worthwhile(mask, found.cut, len(block.layers), 0.9):
            result = self._layered(block, found, mask, place, self._moved)
            if result is not None:
                return result
        elif not mask.any():
            result, self._maps[block.digest] = pruned(block, found)
            return result
        return Block(block.digest, block.nbytes, (self._moved.add(place.view),))

    def settled(
        self, pieces: Iterable[Piece], sizes: Mapping[str, int]
    ) -> tuple[tuple[Piece, ...], dict[str, int]]:
        """``pieces`` once everything is stored: with the places of the new tables; and the bytes of
        each object (of ``sizes``) that they have in use."""
        final = self._fresh.layers | self._moved.layers

        def block_of(block: Block) -> Block:
            if not any(y.object in final for y in block.layers):
                return block
            return replace(block, layers=tuple(final.get(y.object, y) for y in block.layers))

        result = tuple(replace(p, blocks=tuple(map(block_of, p.blocks))) for p in pieces)
        used = used_by((b for p in result for b in p.blocks), self._maps)
        # What several blocks are laid upon counts for each of them.
        return result, {name: min(sizes[name], nbytes) for name, nbytes in used.items()}

    def remember(self) -> None:
        """Keeps the prints that the next part may be compared with: of this one and its parent."""
        self.prints.keep(self._new, self._maps, self._known)


@dataclass(slots=True)
class _Pack:
    name: str
    content: list[memoryview]
    nbytes: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)


class Packer:
    """Puts new blocks one behind the other into objects and uploads these beside the hashing."""

    def __init__(self, store: Store, prefix: str, crew: Crew, pack_bytes: int) -> None:
        self.sizes: dict[str, int] = {}
        self.layers: dict[str, Layer] = {}
        """The tables, once ``finish`` has returned."""
        self._store = store
        self._prefix = prefix
        self._crew = crew
        self._pack_bytes = pack_bytes
        self._futures: list[Future[bool]] = []
        self._pack: _Pack | None = None

    def add(self, block: memoryview) -> Extent:
        """Where ``block`` will be. Raises the error of an upload that has failed meanwhile."""
        pack = self._room(block.nbytes)
        extent = Extent(pack.name, pack.nbytes, block.nbytes)
        pack.content.append(block)
        pack.nbytes += block.nbytes
        return extent

    def layer(self, key: int, cut: Cut, mask: Mask, rows: memoryview) -> Layer | None:
        """The layer of ``rows``, its table's place still unknown; None if there is one of ``key``.

        Raises as ``add``.
        """
        pack = self._room(rows.nbytes)
        if key in pack.entries:
            return None
        pack.entries[key] = entry_of(cut, pack.nbytes, mask)
        pack.content.append(rows)
        pack.nbytes += rows.nbytes
        return Layer(pack.name, 0, 0, "")

    def _room(self, nbytes: int) -> _Pack:
        pack = self._pack
        if pack is not None and pack.nbytes and pack.nbytes + nbytes > self._pack_bytes:
            self._flush(pack)
            pack = None
        if pack is None:
            pack = self._pack = _Pack(f"{self._prefix}.{len(self.sizes)}", [])
            self.sizes[pack.name] = 0
        return pack

    def _flush(self, pack: _Pack) -> None:
        for future in self._futures:
            if future.done():
                future.result()
        if pack.entries:
            table = encode_table(pack.entries)
            digest = table_digest(table)
            self.layers[pack.name] = Layer(pack.name, pack.nbytes, len(table), digest)
            pack.content.append(memoryview(table))
            pack.nbytes += len(table)
        self.sizes[pack.name] = pack.nbytes
        self._futures.append(self._crew.submit(self._store.put, pack.name, pack.content))

    def finish(self) -> None:
        """Returns once everything is stored."""
        if self._pack is not None:
            self._flush(self._pack)
            self._pack = None
        for future in self._futures:
            future.result()
