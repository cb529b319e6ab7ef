"""Manifests and part listings: what a checkpoint consists of, and their JSON form.

Pure. A tensor is a list of blocks, cut every ``block_bytes`` from the tensor's own first byte, so
that the cuts do not depend on the number of ranks. What a block is stands in ``content``.

Format 2 (written) has layers and the bytes in use of each object. Format 1 (read) has neither: a
block that was written as changes to an older one is in many extents.

``decode_manifest`` and ``decode_part`` refuse everything that does not hold together (unknown
format, extents beyond their object, a tensor whose blocks do not add up to its shape, …) with
CheckpointDamaged and nothing else, whatever the bytes are.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from paddle_ft.checkpoint.boxes import Box, unfit
from paddle_ft.checkpoint.content import ITEM_BYTES as ITEM_BYTES
from paddle_ft.checkpoint.content import Block as Block
from paddle_ft.checkpoint.content import Extent as Extent
from paddle_ft.checkpoint.content import Layer as Layer
from paddle_ft.checkpoint.content import Piece as Piece
from paddle_ft.errors import CheckpointDamaged
from paddle_ft.types import Scope, ShardOf

FORMAT = 2
_READABLE = (1, 2)


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
    used: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each object that this part has in use; empty if unknown."""


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
    used: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each object that are in use; empty if unknown."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(piece.nbytes for piece in self.tensors)


# ---------------------------------------------------------------- the JSON form

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Digest32 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Table = tuple[_Count, _Count, _Count, _Digest32]
"""index of the object; offset, bytes and digest of its table"""
_Plain = tuple[_Digest, _Count, str, list[_Count]]
"""digest, bytes, codec, and (index of the object, offset, bytes) of every extent in a row"""
_Layered = tuple[_Digest, _Count, str, list[_Count], _Count, list[_Count]]
"""the same, key, and (index of the first table, number of tables) of every run of layers"""
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
    blocks: list[_Plain | _Layered]


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
    used: NotRequired[list[_Count]]
    tables: NotRequired[list[_Table]]
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
    used: NotRequired[list[_Count]]
    tables: NotRequired[list[_Table]]
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


def _wire_pieces(
    pieces: Iterable[Piece], index: Mapping[str, int], tables: Mapping[Layer, int]
) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "dtype": p.dtype,
            "shape": p.shape,
            "scope": p.scope,
            "rank": p.rank,
            "start": p.start,
            "blocks": [_wire_block(b, index, tables) for b in p.blocks],
        }
        | ({"shard": (p.shard.start, p.shard.whole)} if p.shard else {})
        for p in pieces
    ]


def _wire_block(
    block: Block, index: Mapping[str, int], tables: Mapping[Layer, int]
) -> tuple[Any, ...]:
    extents = [n for e in block.extents for n in (index[e.object], e.offset, e.nbytes)]
    plain = (block.digest, block.nbytes, block.codec, extents)
    if not block.layers:
        return plain
    runs: list[int] = []
    for layer in block.layers:
        number = tables[layer]
        if runs and runs[-2] + runs[-1] == number:
            runs[-1] += 1
        else:
            runs += [number, 1]
    return (*plain, block.key, runs)


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON of ``manifest``."""
    return _encode("manifest", manifest, "tensors", manifest.tensors)


def encode_part(part: PartListing) -> bytes:
    """Canonical JSON of ``part``."""
    return _encode("part", part, "pieces", part.pieces)


def _encode(kind: str, value: Manifest | PartListing, key: str, pieces: tuple[Piece, ...]) -> bytes:
    objects = sorted(value.objects.items())
    index = {name: i for i, (name, _) in enumerate(objects)}
    layers = {layer for p in pieces for b in p.blocks for layer in b.layers}
    # In the order of the names of their objects, so that the layers of a block are in few runs.
    tables = {
        layer: i for i, layer in enumerate(sorted(layers, key=lambda y: (y.object, y.offset)))
    }
    wire = {name: getattr(value, name) for name in value.__slots__}
    wire |= {"format": FORMAT, "kind": kind, "objects": objects}
    wire[key] = _wire_pieces(pieces, index, tables)
    wire["tables"] = [(index[y.object], y.offset, y.nbytes, y.digest) for y in tables]
    if used := wire.pop("used"):
        wire["used"] = [used.get(name, 0) for name, _ in objects]
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
    if head.get("format") not in _READABLE:
        raise CheckpointDamaged(
            f"{where} has format {head.get('format')!r}, which this version cannot read; "
            f"use the version of paddle_ft that wrote it."
        )
    try:
        wire = _adapter(shape).validate_json(data)
        pairs = wire.pop("objects")
        objects = _objects(pairs)
        wire["used"] = _used(wire.pop("used", []), pairs)
        tables = [_table(t, pairs) for t in wire.pop("tables", [])]
        pieces = tuple(_piece(p, pairs, tables, wire["block_bytes"]) for p in wire.pop(key))
        _require(all(p.rank < wire["world_size"] for p in pieces), "a rank is out of range")
    except ValueError as error:
        raise _damaged(where, _first_line(error)) from None
    except _Malformed as error:
        raise _damaged(where, str(error)) from None
    del wire["format"], wire["kind"]
    return wire, objects, pieces


def _first_line(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error).partition("\n")[0]
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _objects(pairs: list[tuple[str, int]]) -> dict[str, int]:
    objects = dict(pairs)
    _require(len(objects) == len(pairs), "an object occurs twice")
    return objects


def _used(used: list[int], pairs: list[tuple[str, int]]) -> dict[str, int]:
    if not used:
        return {}
    _require(len(used) == len(pairs), "not every object has its bytes in use")
    _require(all(n <= size for n, (_, size) in zip(used, pairs, strict=True)), "too many in use")
    return {name: n for n, (name, _) in zip(used, pairs, strict=True)}


def _table(wire: tuple[int, int, int, str], objects: list[tuple[str, int]]) -> Layer:
    index, offset, nbytes, digest = wire
    fits = index < len(objects) and offset + nbytes <= objects[index][1]
    _require(fits, "a table is outside its object")
    return Layer(objects[index][0], offset, nbytes, digest)


def _piece(
    wire: _WirePiece, objects: list[tuple[str, int]], tables: list[Layer], block_bytes: int
) -> Piece:
    name = wire["name"]
    _require(wire["dtype"] in ITEM_BYTES, f"tensor {name} has an unknown dtype")
    _require((wire["scope"] == "local") == (wire["rank"] >= 0), f"tensor {name} has a wrong rank")
    blocks = tuple(_block(name, b, objects, tables) for b in wire["blocks"])
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
    tensor: str,
    wire: tuple[Any, ...],
    objects: list[tuple[str, int]],
    tables: list[Layer],
) -> Block:
    digest, nbytes, codec, numbers, key, runs = wire if len(wire) == 6 else (*wire, 0, [])
    _require(codec in ("", "zlib"), f"tensor {tensor} has a block with an unknown codec")
    placed = len(numbers) % 3 == 0 and bool(numbers or runs)
    _require(placed, f"tensor {tensor} has a block without place")
    extents = []
    for i in range(0, len(numbers), 3):
        index, offset, length = numbers[i : i + 3]
        _require(
            index < len(objects) and length > 0 and offset + length <= objects[index][1],
            f"tensor {tensor} has a block outside its object",
        )
        extents.append(Extent(objects[index][0], offset, length))
    whole = codec or not extents or sum(e.nbytes for e in extents) == nbytes
    _require(bool(whole), f"tensor {tensor} has a block whose extents do not add up")
    layers: list[Layer] = []
    for first, count in zip(runs[::2], runs[1::2], strict=False):
        fits = 0 < count <= len(tables) - max(first, len(layers))
        _require(fits, f"tensor {tensor} has a block with wrong layers")
        layers += tables[first : first + count]
    sound = len(set(layers)) == len(layers) and len(runs) % 2 == 0 and not (codec and layers)
    _require(sound and bool(layers) == bool(key), f"tensor {tensor} has a block with wrong layers")
    return Block(digest, nbytes, tuple(extents), codec, key, tuple(layers))
