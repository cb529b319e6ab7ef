"""From images in host memory to objects in the store: hash, drop what is known, pack, upload.

Of a block that is not known, only the ranges that differ from the block which stood there before
are written, if these are few (``deltas``); of an object of which little is still in use, what is
left is written anew (``reclaim``).

Invariant: a part is announced only after every object it refers to is stored, and the manifest is
stored only after every part is. What a crash leaves behind in between refers to nothing and is
referred to by nothing.

Memory: the objects are written from the images, and nothing is copied but what the store copies
and ranges of blocks that are written in part (at most half of such a block).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.deltas import (
    Print,
    Prints,
    Ranges,
    changed,
    grain_of,
    overlaid,
    worthwhile,
)
from paddle_ft.checkpoint.manifest import (
    ITEM_BYTES,
    Block,
    Extent,
    Manifest,
    PartListing,
    Piece,
    decode_part,
    encode_manifest,
    encode_part,
)
from paddle_ft.checkpoint.plan import cut
from paddle_ft.checkpoint.reclaim import sparse
from paddle_ft.checkpoint.store import Store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, StoreMissing
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, ImageInfo, Part

PACK_BYTES = 64 * 2**20
"""Objects are about this large, so that several are on their way at once."""
HASH_THREADS = min(4, os.cpu_count() or 1)
UPLOAD_THREADS = 4
_BATCH_BYTES = 4 * 2**20


def digest_of(data: bytes | memoryview) -> str:
    """sha256, hex. With the CPU's SHA extensions the fastest strong hash in the standard library
    (measured: 1.47 GB/s a thread, blake2b 0.64, md5 0.60); above 2 KiB it releases the GIL."""
    return hashlib.sha256(data).hexdigest()


def write_part(
    store: Store,
    images: Sequence[tuple[ImageInfo, memoryview]],
    *,
    owner: str,
    sequence: int,
    generation: int,
    member: str,
    parent: tuple[CommitRef, Manifest] | None,
    config: CheckpointConfig,
    prints: Prints | None = None,
    places: dict[str, tuple[int, int]] | None = None,
) -> Part:
    """Stores the share of ``member``: the images of its ranks at one step.

    ``sequence`` is the head's plus one, ``parent`` a checkpoint that the head keeps (its newest,
    usually), whose blocks are not written again. ``prints`` is what this writer remembers from one
    part to the next; without it, blocks are written as a whole. ``places`` is told where each block
    lies: digest -> (rank, offset in its image). Blocks for as long as the store takes; raises
    StoreError.
    """
    step, world_size = images[0][0].step, images[0][0].world_size
    assert all((i.step, i.world_size) == (step, world_size) for i, _ in images)
    prefix = layout.write_prefix(owner, sequence, generation, secrets.token_hex(4))
    name = layout.safe_member(member)
    manifest = parent[1] if parent else None
    sizes = dict(manifest.objects) if manifest else {}
    with Crew(UPLOAD_THREADS, "upload") as crew:
        fresh = _Packer(store, f"{layout.DATA}{prefix}{name}", crew)
        # What has stayed unchanged for long is kept apart from what may change at once.
        moved = _Packer(store, f"{layout.DATA}{prefix}{name}.kept", crew)
        blocks = _Blocks(manifest, fresh, moved, prints or Prints())
        pieces = tuple(_pieces(images, blocks, config.block_bytes, prints is not None, places))
        for packer in (fresh, moved):
            packer.finish()
            sizes.update(packer.sizes)
    failpoint("part.objects")
    used = {e.object for p in pieces for b in p.blocks for e in b.extents}
    listing = PartListing(
        owner=owner,
        sequence=sequence,
        generation=generation,
        step=step,
        member=member,
        world_size=world_size,
        block_bytes=config.block_bytes,
        ranks=tuple(sorted(info.rank for info, _ in images)),
        parent=parent[0].manifest if parent else "",
        objects={name: sizes[name] for name in sorted(used)},
        pieces=pieces,
        meta=next((info.meta for info, _ in images if info.rank == 0), None),
    )
    content = encode_part(listing)
    path = f"{layout.PARTS}{prefix}{name}.json"
    store.put(path, content)
    failpoint("part.listed")
    return Part(generation, step, member, path, digest_of(content), listing.parent)


def read_part(store: Store, part: Part) -> PartListing:
    """What ``part`` announced; raises CheckpointDamaged if that is not what is stored."""
    where = f"{store.url}/{part.name}"
    try:
        content = store.get(part.name)
    except StoreMissing:
        raise CheckpointDamaged(f"{where} is not there; save again.") from None
    if digest_of(content) != part.digest:
        raise CheckpointDamaged(f"{where} is not what was written; save again.")
    return decode_part(content, where)


def store_manifest(store: Store, manifest: Manifest) -> CommitRef:
    """Stores ``manifest`` and gives the reference that ``head`` is to be moved to."""
    name = layout.manifest_name(
        manifest.sequence, manifest.step, manifest.owner, secrets.token_hex(4)
    )
    content = encode_manifest(manifest)
    failpoint("manifest.before")
    store.put(name, content)
    failpoint("manifest.stored")
    return CommitRef(
        sequence=manifest.sequence,
        step=manifest.step,
        generation=manifest.generation,
        manifest=name,
        digest=digest_of(content),
    )


@dataclass(frozen=True, slots=True)
class _Cut:
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


def _pieces(
    images: Sequence[tuple[ImageInfo, memoryview]],
    blocks: _Blocks,
    block_bytes: int,
    delta: bool,
    places: dict[str, tuple[int, int]] | None,
) -> Iterator[Piece]:
    work = []
    for info, view in images:
        for spec in info.tensors:
            rank = info.rank if spec.scope == "local" else -1
            look = delta and blocks.prints.wanted((spec.name, rank))
            grain = grain_of(spec.shape, ITEM_BYTES[spec.dtype]) if look else 0
            before = blocks.before(spec.name, rank, block_bytes)
            cuts = []
            for at, nbytes in cut(spec, block_bytes):
                start = spec.start + at - spec.offset
                index = start // block_bytes
                old = before[index] if index < len(before) else None
                fine = grain if nbytes >= 4 * grain else 0
                cuts.append(_Cut(view[at : at + nbytes], (info.rank, at), start, old, fine))
            work.append((rank, spec, cuts))
    with Crew(HASH_THREADS, "hash") as pool:
        hashed = _hashed(pool, [c for _, _, cuts in work for c in cuts], blocks)
        for rank, spec, cuts in work:
            found = [(c, *next(hashed)) for c in cuts]
            if places is not None:
                places.update({digest: c.place for c, digest, _ in found})
            yield Piece(
                name=spec.name,
                dtype=spec.dtype,
                shape=spec.shape,
                scope=spec.scope,
                rank=rank,
                start=spec.start,
                shard=spec.shard,
                blocks=blocks.of((spec.name, rank), found),
            )
    blocks.remember()


def _hashed(
    pool: Crew, cuts: Sequence[_Cut], blocks: _Blocks
) -> Iterator[tuple[str, Print | None]]:
    """Digests, and prints of what is not known, in order; small blocks go in batches."""
    batches: list[list[_Cut]] = []
    room = 0
    for one in cuts:
        if room < one.view.nbytes or not batches:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(one)
        room -= one.view.nbytes
    for results in pool.map(lambda batch: [blocks.look(c) for c in batch], batches):
        yield from results


class _Blocks:
    """Finds for each block where it is, or puts there what is new of it."""

    def __init__(
        self, parent: Manifest | None, fresh: _Packer, moved: _Packer, prints: Prints
    ) -> None:
        tensors = parent.tensors if parent else ()
        self.prints = prints
        self._old = {(p.name, p.rank): p.blocks for p in tensors}
        self._old_bytes = parent.block_bytes if parent else 0
        self._known = {b.digest: b for p in tensors for b in p.blocks}
        self._sparse = sparse(parent) if parent else frozenset()
        self._fresh, self._moved = fresh, moved
        self._new: dict[str, Print] = {}

    def before(self, name: str, rank: int, block_bytes: int) -> tuple[Block, ...]:
        """The blocks of the tensor in the parent, if they were cut alike."""
        return self._old.get((name, rank), ()) if block_bytes == self._old_bytes else ()

    def look(self, cut: _Cut) -> tuple[str, Print | None]:
        """Digest and, if it is needed, print. For any thread."""
        digest = digest_of(cut.view)
        if not cut.grain or digest in self._known:
            return digest, None
        return digest, self.prints.of(cut.view, cut.start, cut.grain)

    def of(
        self, tensor: tuple[str, int], cuts: Sequence[tuple[_Cut, str, Print | None]]
    ) -> tuple[Block, ...]:
        """The blocks of one piece, what is new of them on its way into the store."""
        result = []
        compared = useful = unknown = False
        for one, digest, tags in cuts:
            block = self._known.get(digest)
            if block is None:
                unknown = True
                ranges = self._ranges(one, tags)
                compared = compared or ranges is not None
                if (
                    ranges
                    and one.before
                    and worthwhile(ranges, one.before.extents, one.view.nbytes)
                ):
                    useful = True
                    block = _replaced(replace(one.before, digest=digest), ranges, one, self._fresh)
                else:
                    block = Block(digest, one.view.nbytes, (self._fresh.add(one.view),))
                if tags is not None:
                    self._new[digest] = tags
            self._known[digest] = block = self._rid(block, one)
            result.append(block)
        if compared:
            self.prints.found(tensor, useful)
        elif unknown and not self.prints.wanted(tensor):
            self.prints.passed(tensor)
        return tuple(result)

    def _ranges(self, cut: _Cut, tags: Print | None) -> Ranges | None:
        """Where the block differs from its predecessor, if that can be told."""
        if tags is None or cut.before is None or cut.before.codec:
            return None
        old = self.prints.get(cut.before.digest) or self._new.get(cut.before.digest)
        return changed(old, tags) if old is not None else None

    def _rid(self, block: Block, cut: _Cut) -> Block:
        """``block`` without the objects that are to be given up."""
        if not any(e.object in self._sparse for e in block.extents):
            return block
        if block.codec:
            return Block(block.digest, block.nbytes, (self._moved.add(cut.view),))
        ranges, at = [], 0
        for e in block.extents:
            if e.object in self._sparse:
                ranges.append((at, e.nbytes))
            at += e.nbytes
        return _replaced(block, ranges, cut, self._moved)

    def remember(self) -> None:
        """Keeps the prints that the next part may be compared with: of this one and its parent."""
        self.prints.keep(self._new, self._known)


def _replaced(block: Block, ranges: Ranges, cut: _Cut, packer: _Packer) -> Block:
    """``block`` with ``ranges`` taken from the bytes of ``cut``, through ``packer``."""
    views = [cut.view[start : start + nbytes] for start, nbytes in ranges]
    joined = views[0] if len(views) == 1 else memoryview(b"".join(views))
    return replace(block, extents=overlaid(block.extents, ranges, packer.add(joined), block.nbytes))


@dataclass(slots=True)
class _Pack:
    name: str
    content: list[memoryview]
    nbytes: int = 0


class _Packer:
    """Puts new blocks one behind the other into objects and uploads these beside the hashing."""

    def __init__(self, store: Store, prefix: str, crew: Crew) -> None:
        self.sizes: dict[str, int] = {}
        self._store = store
        self._prefix = prefix
        self._crew = crew
        self._futures: list[Future[bool]] = []
        self._pack: _Pack | None = None

    def add(self, block: memoryview) -> Extent:
        """Where ``block`` will be. Raises the error of an upload that has failed meanwhile."""
        pack = self._pack
        if pack is not None and pack.nbytes + block.nbytes > PACK_BYTES:
            self._flush(pack)
            pack = None
        if pack is None:
            pack = self._pack = _Pack(f"{self._prefix}.{len(self.sizes)}", [])
            self.sizes[pack.name] = 0
        extent = Extent(pack.name, pack.nbytes, block.nbytes)
        pack.content.append(block)
        pack.nbytes += block.nbytes
        self.sizes[pack.name] = pack.nbytes
        return extent

    def _flush(self, pack: _Pack) -> None:
        for future in self._futures:
            if future.done():
                future.result()
        self._futures.append(self._crew.submit(self._store.put, pack.name, pack.content))

    def finish(self) -> None:
        """Returns once everything is stored."""
        if self._pack is not None:
            self._flush(self._pack)
        for future in self._futures:
            future.result()
