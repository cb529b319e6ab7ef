"""Manifests and part listings: what a checkpoint consists of, and their JSON form.

Pure. A tensor is a list of blocks, cut every ``block_bytes`` from the tensor's own first byte, so
that the cuts do not depend on the number of ranks. A block is known by the sha256 of its bytes and
is found by its extents, which are ranges of objects in the store: one for a block written as a
whole; several for one that was written as changes to an older block.

``decode_manifest`` and ``decode_part`` refuse everything that does not hold together (unknown
format, extents beyond their object, a tensor whose blocks do not add up to its shape, …) with
CheckpointDamaged and nothing else, whatever the bytes are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from paddle_ft.checkpoint.boxes import Box, PartOf, unfit, whole_of
from paddle_ft.errors import CheckpointDamaged
from paddle_ft.types import Scope, ShardOf

FORMAT = 1

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4,
    "int64": 8, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2,
    "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes of one element of each dtype that can be saved."""


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes from ``offset`` of ``object``."""

    object: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """The bytes with this sha256 (hex); they are the extents put together."""

    digest: str
    nbytes: int
    extents: tuple[Extent, ...]
    codec: str = ""
    """How the extents are to be decoded: ``""`` as they are, ``zlib``."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or a run of blocks of one from byte ``start``, as stored.

    In a manifest every piece is a whole tensor (``start`` 0). ``rank`` is -1 for replicated
    tensors, else the rank whose local tensor this is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scope: Scope
    rank: int
    start: int
    blocks: tuple[Block, ...]
    shard: ShardOf | None = None
    """What the local tensor of this rank is of one that is divided among them."""

    @property
    def part(self) -> PartOf:
        """Which elements of which tensor these are."""
        if self.shard is None:
            return PartOf(self.name, self.dtype, self.shape, whole_of(self.shape), shard=False)
        box = Box(self.shard.start, self.shape)
        return PartOf(self.name, self.dtype, self.shard.whole, box, shard=True)

    @property
    def nbytes(self) -> int:
        """Of this piece."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def nbytes_whole(self) -> int:
        """Of the tensor it belongs to."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PartListing:
    """What one member wrote for one checkpoint."""

    owner: str
    sequence: int
    """The head's plus one when the writing began."""
    generation: int
    step: int
    member: str
    world_size: int
    block_bytes: int
    ranks: tuple[int, ...]
    """The ranks whose images this part holds."""
    parent: str
    """Manifest whose blocks are referred to; empty if none."""
    objects: Mapping[str, int]
    """Size of every object referred to, in bytes."""
    pieces: tuple[Piece, ...]
    meta: Mapping[str, Any] | None = None
    """Rank 0's JSON values, in the part that holds rank 0."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One checkpoint: everything needed to load it."""

    owner: str
    sequence: int
    generation: int
    step: int
    world_size: int
    block_bytes: int
    parent: str
    """Manifest of the head it was committed upon; empty if none."""
    created_s: float
    """Seconds since 1970, by the clock of the leader; for people, nothing is decided by it."""
    bytes_new: int
    """Written to the store for this checkpoint, without the manifest."""
    objects: Mapping[str, int]
    tensors: tuple[Piece, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(piece.nbytes for piece in self.tensors)


# ---------------------------------------------------------------- the JSON form

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(min_length=1, max_length=4096)]
_strict = ConfigDict(strict=True, extra="forbid")


class _WirePiece(TypedDict):
    __pydantic_config__ = _strict  # type: ignore[misc]
    name: str
    dtype: str
    shape: list[_Count]
    scope: Scope
    rank: Annotated[int, Field(ge=-1, lt=2**31)]
    start: _Count
    shard: NotRequired[tuple[list[_Count], list[_Count]]]
    """first element and shape of the whole, for shards only"""
    blocks: list[tuple[_Digest, _Count, str, list[_Count]]]
    """digest, bytes, codec, and (index of the object, offset, bytes) of every extent in a row"""


class _WirePart(TypedDict):
    __pydantic_config__ = _strict  # type: ignore[misc]
    format: _Count
    kind: str
    owner: str
    sequence: _Count
    generation: _Count
    step: _Count
    member: str
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    block_bytes: Annotated[int, Field(ge=1, lt=2**63)]
    ranks: list[_Count]
    parent: str
    objects: list[tuple[_Name, _Count]]
    pieces: list[_WirePiece]
    meta: dict[str, Any] | None


class _WireManifest(TypedDict):
    __pydantic_config__ = _strict  # type: ignore[misc]
    format: _Count
    kind: str
    owner: str
    sequence: _Count
    generation: _Count
    step: _Count
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    block_bytes: Annotated[int, Field(ge=1, lt=2**63)]
    parent: str
    created_s: float
    bytes_new: _Count
    objects: list[tuple[_Name, _Count]]
    tensors: list[_WirePiece]
    meta: dict[str, Any]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def canonical(value: object) -> bytes:
    """JSON without spaces; dicts keep their order, which may matter to whom they belong."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


def _wire_pieces(pieces: Iterable[Piece], index: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "dtype": p.dtype,
            "shape": p.shape,
            "scope": p.scope,
            "rank": p.rank,
            "start": p.start,
            "blocks": [
                (
                    b.digest,
                    b.nbytes,
                    b.codec,
                    [n for e in b.extents for n in (index[e.object], e.offset, e.nbytes)],
                )
                for b in p.blocks
            ],
        }
        | ({"shard": (p.shard.start, p.shard.whole)} if p.shard else {})
        for p in pieces
    ]


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON of ``manifest``."""
    return _encode("manifest", manifest, "tensors", manifest.tensors)


def encode_part(part: PartListing) -> bytes:
    """Canonical JSON of ``part``."""
    return _encode("part", part, "pieces", part.pieces)


def _encode(kind: str, value: Manifest | PartListing, key: str, pieces: tuple[Piece, ...]) -> bytes:
    objects = sorted(value.objects.items())
    index = {name: i for i, (name, _) in enumerate(objects)}
    wire = {name: getattr(value, name) for name in value.__slots__}
    wire |= {"format": FORMAT, "kind": kind, "objects": objects, key: _wire_pieces(pieces, index)}
    return canonical(wire)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest that ``encode_manifest`` made; ``where`` names it in the CheckpointDamaged."""
    wire, objects, tensors = _decode(_WireManifest, data, "manifest", "tensors", where)
    try:
        for tensor in tensors:
            _require(tensor.start == 0, f"tensor {tensor.name} does not begin at 0")
            _require(tensor.nbytes == tensor.nbytes_whole, f"tensor {tensor.name} is not complete")
        keys = {(t.name, t.rank) for t in tensors}
        _require(len(keys) == len(tensors), "a tensor occurs twice")
        replicated = {t.name for t in tensors if t.rank < 0}
        mixed = {t.name for t in tensors if t.rank >= 0} & replicated
        _require(not mixed, f"tensors {sorted(mixed)} are both replicated and local")
        wrong = unfit(t.part for t in tensors)
        _require(not wrong, f"the shards of {', '.join(wrong)} do not make up a tensor")
    except _Malformed as error:
        raise _damaged(where, str(error)) from None
    return Manifest(**wire, objects=objects, tensors=tensors)


def decode_part(data: bytes, where: str) -> PartListing:
    """The listing that ``encode_part`` made; ``where`` names it in the CheckpointDamaged."""
    wire, objects, pieces = _decode(_WirePart, data, "part", "pieces", where)
    ranks = tuple(wire.pop("ranks"))
    if any(rank >= wire["world_size"] for rank in ranks):
        raise _damaged(where, "a rank is out of range")
    return PartListing(**wire, ranks=ranks, objects=objects, pieces=pieces)


class _Malformed(Exception):
    """Well-formed JSON of the right shape that does not hold together."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Malformed(otherwise)


def _damaged(where: str, reason: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"{where} is damaged ({reason}); use an older checkpoint.")


def _decode(
    shape: Hashable, data: bytes, kind: str, key: str, where: str
) -> tuple[dict[str, Any], dict[str, int], tuple[Piece, ...]]:
    """The checked fields, without objects and pieces; the objects; the pieces."""
    try:
        head = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(where, "not JSON") from None
    if not isinstance(head, dict) or head.get("kind") != kind:
        raise _damaged(where, f"not a {kind}")
    if head.get("format") != FORMAT:
        raise CheckpointDamaged(
            f"{where} has format {head.get('format')!r}, which this version cannot read; "
            f"use the version of paddle_ft that wrote it."
        )
    try:
        wire = _adapter(shape).validate_json(data)
        pairs = wire.pop("objects")
        objects = _objects(pairs)
        pieces = tuple(_piece(p, pairs, wire["block_bytes"]) for p in wire.pop(key))
        _require(all(p.rank < wire["world_size"] for p in pieces), "a rank is out of range")
    except ValueError as error:
        raise _damaged(where, _first_line(error)) from None
    except _Malformed as error:
        raise _damaged(where, str(error)) from None
    del wire["format"], wire["kind"]
    return wire, objects, pieces


def _first_line(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error).partition("\n")[0]
    first = errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _objects(pairs: list[tuple[str, int]]) -> dict[str, int]:
    objects = dict(pairs)
    _require(len(objects) == len(pairs), "an object occurs twice")
    return objects


def _piece(wire: _WirePiece, objects: list[tuple[str, int]], block_bytes: int) -> Piece:
    name = wire["name"]
    _require(wire["dtype"] in ITEM_BYTES, f"tensor {name} has an unknown dtype")
    _require((wire["scope"] == "local") == (wire["rank"] >= 0), f"tensor {name} has a wrong rank")
    blocks = tuple(_block(name, b, objects) for b in wire["blocks"])
    piece = Piece(
        name=name,
        dtype=wire["dtype"],
        shape=tuple(wire["shape"]),
        scope=wire["scope"],
        rank=wire["rank"],
        start=wire["start"],
        blocks=blocks,
        shard=_shard(wire),
    )
    end = piece.start + piece.nbytes
    _require(end <= piece.nbytes_whole, f"tensor {name} has more bytes than its shape")
    _require(
        piece.start % block_bytes == 0
        and all(b.nbytes == block_bytes for b in blocks[:-1])
        and all(0 < b.nbytes <= block_bytes for b in blocks[-1:])
        and (end % block_bytes == 0 or end == piece.nbytes_whole),
        f"tensor {name} is not cut at multiples of {block_bytes} bytes",
    )
    return piece


def _shard(wire: _WirePiece) -> ShardOf | None:
    if "shard" not in wire:
        return None
    shard = ShardOf(*map(tuple, wire["shard"]))
    fits = Box(shard.start, tuple(wire["shape"])).inside(shard.whole)
    _require(fits and wire["scope"] == "local", f"tensor {wire['name']} has a wrong shard")
    return shard


def _block(
    tensor: str, wire: tuple[str, int, str, list[int]], objects: list[tuple[str, int]]
) -> Block:
    digest, nbytes, codec, numbers = wire
    _require(codec in ("", "zlib"), f"tensor {tensor} has a block with an unknown codec")
    _require(len(numbers) % 3 == 0 and bool(numbers), f"tensor {tensor} has a block without place")
    extents = []
    for i in range(0, len(numbers), 3):
        index, offset, length = numbers[i : i + 3]
        _require(
            index < len(objects) and length > 0 and offset + length <= objects[index][1],
            f"tensor {tensor} has a block outside its object",
        )
        extents.append(Extent(objects[index][0], offset, length))
    if not codec:
        _require(
            sum(e.nbytes for e in extents) == nbytes,
            f"tensor {tensor} has a block whose extents do not add up",
        )
    return Block(digest, nbytes, tuple(extents), codec)
