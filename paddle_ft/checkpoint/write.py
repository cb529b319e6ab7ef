"""From images in host memory to objects in the store: hash, drop what is known, pack, upload.

What becomes of each block is told in ``blocks``.

Invariant: a part is announced only after every object it refers to is stored, and the manifest is
stored only after every part is. What a crash leaves behind in between refers to nothing and is
referred to by nothing.

Memory: the objects are written from the images, and nothing is copied but what the store copies
and ranges of blocks that are written in part (at most half of such a block).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.blocks import Blocks, Packer, Place
from paddle_ft.checkpoint.content import digest_of as digest_of
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.deltas import Print, Prints, grain_of
from paddle_ft.checkpoint.manifest import (
    ITEM_BYTES,
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
from paddle_ft.checkpoint.tables import Tables
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, StoreMissing
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, ImageInfo, Part

PACK_BYTES = 64 * 2**20
"""Objects are at most about this large, so that several are on their way at once."""
PACK_BYTES_MIN = 4 * 2**20
PACKS = 16
"""Of a smaller state objects are so many, so that little has to be written anew at once."""
HASH_THREADS = min(4, os.cpu_count() or 1)
UPLOAD_THREADS = 4
_BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Share:
    """Whose share of which checkpoint a part is.

    ``sequence`` is the head's plus one, ``parent`` a checkpoint that the head keeps (its newest,
    usually), whose blocks are not written again.
    """

    owner: str
    sequence: int
    generation: int
    member: str
    parent: tuple[CommitRef, Manifest] | None = None

    def new_place(self) -> str:
        """What the names of its objects begin with; another one each time."""
        prefix = layout.write_prefix(
            self.owner, self.sequence, self.generation, secrets.token_hex(4)
        )
        return f"{prefix}{layout.safe_member(self.member)}"


def write_part(
    store: Store,
    images: Sequence[tuple[ImageInfo, memoryview]],
    share: Share,
    config: CheckpointConfig,
    *,
    prints: Prints | None = None,
    places: dict[str, tuple[int, int]] | None = None,
) -> Part:
    """Stores the share of one member: the images of its ranks at one step.

    ``prints`` is what this writer remembers from one part to the next; without it, blocks are
    written as a whole. ``places`` is told where each block lies: digest -> (rank, offset in its
    image). Blocks for as long as the store takes; raises StoreError.
    """
    step, world_size = images[0][0].step, images[0][0].world_size
    assert all((i.step, i.world_size) == (step, world_size) for i, _ in images)
    place = share.new_place()
    manifest = share.parent[1] if share.parent else None
    sizes = dict(manifest.objects) if manifest else {}
    with Crew(UPLOAD_THREADS, "upload") as crew:
        pack_bytes = _pack_bytes(images)
        fresh = Packer(store, f"{layout.DATA}{place}", crew, pack_bytes)
        # What has stayed unchanged for long is kept apart from what may change at once.
        moved = Packer(store, f"{layout.DATA}{place}.kept", crew, pack_bytes)
        given_up = sparse(manifest, config.space_ratio) if manifest else frozenset()
        blocks = Blocks(manifest, fresh, moved, prints or Prints(), given_up, Tables(store))
        pieces = tuple(_pieces(images, blocks, config.block_bytes, prints is not None, places))
        for packer in (fresh, moved):
            packer.finish()
            sizes.update(packer.sizes)
    failpoint("part.objects")
    pieces, used = blocks.settled(pieces, sizes)
    listing = PartListing(
        owner=share.owner,
        sequence=share.sequence,
        generation=share.generation,
        step=step,
        member=share.member,
        world_size=world_size,
        block_bytes=config.block_bytes,
        ranks=tuple(sorted(info.rank for info, _ in images)),
        parent=share.parent[0].manifest if share.parent else "",
        objects={name: sizes[name] for name in sorted(used)},
        pieces=pieces,
        meta=next((info.meta for info, _ in images if info.rank == 0), None),
        used=used,
    )
    content = encode_part(listing)
    path = f"{layout.PARTS}{place}.json"
    store.put(path, content)
    failpoint("part.listed")
    return Part(share.generation, step, share.member, path, digest_of(content), listing.parent)


def _pack_bytes(images: Sequence[tuple[ImageInfo, memoryview]]) -> int:
    share = sum(view.nbytes for _, view in images) // PACKS
    return min(PACK_BYTES, max(PACK_BYTES_MIN, share))


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


def _pieces(
    images: Sequence[tuple[ImageInfo, memoryview]],
    blocks: Blocks,
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
                cuts.append(Place(view[at : at + nbytes], (info.rank, at), start, old, fine))
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
    pool: Crew, cuts: Sequence[Place], blocks: Blocks
) -> Iterator[tuple[str, Print | None]]:
    """Digests, and prints of what is not known, in order; small blocks go in batches."""
    batches: list[list[Place]] = []
    room = 0
    for one in cuts:
        if room < one.view.nbytes or not batches:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(one)
        room -= one.view.nbytes
    for results in pool.map(lambda batch: [blocks.look(c) for c in batch], batches):
        yield from results
