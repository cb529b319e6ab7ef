"""Dividing, merging, resharding and parsing checkpoints, for arbitrary shapes (B1, B2, B3)."""

from __future__ import annotations

import itertools
import json
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.checkpoint import layout, plan
from paddle_ft.checkpoint.manifest import (
    Extent,
    Manifest,
    PartListing,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from paddle_ft.checkpoint.write import Share, read_part, write_part
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, CheckpointMismatch
from paddle_ft.types import ImageInfo, TensorSpec
from tests.sim.model_store import ModelStore

BLOCK = 4096
CONFIG = CheckpointConfig(block_bytes=BLOCK)

sizes = st.one_of(
    st.integers(0, 64), st.integers(0, 5 * BLOCK), st.sampled_from([BLOCK, 3 * BLOCK])
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorSpec, ...]:
    scopes = st.sampled_from(["replicated", "replicated", "local"])
    drawn = draw(st.lists(st.tuples(sizes, scopes), min_size=1, max_size=8))
    return tuple(
        TensorSpec(f"t{i}", "uint8", (size,), scope, 0, size)  # type: ignore[arg-type]
        for i, (size, scope) in enumerate(drawn)
    )


worlds = st.integers(1, 9)
modes = st.sampled_from(["rank0", "sharded"])


def content_of(spec: TensorSpec, rank: int) -> bytes:
    seed = f"{spec.name} {rank if spec.scope == 'local' else ''}"
    return random.Random(seed).randbytes(spec.nbytes)


def saved(
    specs: tuple[TensorSpec, ...], world: int, mode: Any, nodes: int = 1
) -> tuple[ModelStore, list[PartListing]]:
    """The parts of a checkpoint of ``specs``, written by ``nodes`` nodes."""
    store, listings = ModelStore(), []
    shares = plan.shares(specs, world, BLOCK, mode)
    whole = {s.name: s for s in specs}
    images = []
    for rank, share in enumerate(shares):
        image = bytearray(plan.image_bytes(share))
        for piece in share:
            source = content_of(whole[piece.name], rank)
            image[piece.offset : piece.offset + piece.nbytes] = source[piece.start :][
                : piece.nbytes
            ]
        meta = {"n": 1} if rank == 0 else {}
        images.append((ImageInfo(7, rank, world, share, meta), memoryview(image)))
    for node in range(nodes):
        mine = images[node::nodes]
        if mine:
            part = write_part(store, mine, Share("o", 1, 1, f"n{node}"), CONFIG)
            listings.append(read_part(store, part))
    return store, listings


def merged(listings: list[PartListing]) -> Manifest:
    return plan.merge(listings, head=None, parents={}, created_s=1.0)


@given(tensors(), worlds, modes)
def test_every_byte_is_somebodys_exactly_once(
    specs: tuple[TensorSpec, ...], world: int, mode: Any
) -> None:
    shares = plan.shares(specs, world, BLOCK, mode)
    for spec in specs:
        pieces = [p for share in shares for p in share if p.name == spec.name]
        assert all(p.start % BLOCK == 0 for p in pieces)
        if spec.scope == "local":
            assert [(p.start, p.nbytes) for p in pieces] == [(0, spec.nbytes)] * world
        else:
            assert pieces, f"{spec.name} is nobody's"
            covered = sorted((p.start, p.start + p.nbytes) for p in pieces)
            assert covered[0][0] == 0
            assert covered[-1][1] == spec.nbytes
            assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


@given(tensors(), worlds)
def test_shares_are_balanced_to_a_block(specs: tuple[TensorSpec, ...], world: int) -> None:
    shares = plan.shares(specs, world, BLOCK)
    total = sum(s.nbytes for s in specs if s.scope == "replicated")
    for share in shares:
        mine = sum(p.nbytes for p in share if p.scope == "replicated")
        assert abs(mine - total / world) <= BLOCK + 1


@given(tensors(), worlds, modes)
def test_pieces_of_an_image_are_aligned_and_apart(
    specs: tuple[TensorSpec, ...], world: int, mode: Any
) -> None:
    for share in plan.shares(specs, world, BLOCK, mode):
        end = 0
        for piece in share:
            assert piece.offset % plan.ALIGN_BYTES == 0
            assert piece.offset >= end
            end = piece.offset + piece.nbytes
        assert plan.image_bytes(share) >= end


@given(tensors(), worlds, worlds, modes, st.integers(1, 3))
def test_saved_by_some_loaded_by_others(
    specs: tuple[TensorSpec, ...], old: int, new: int, mode: Any, nodes: int
) -> None:
    store, listings = saved(specs, old, mode, nodes)
    manifest = merged(listings)
    wanted = plan.plan_read(manifest, range(new))
    image = bytearray(wanted.nbytes)
    for target in wanted.targets:
        at = target.offset
        for extent in target.block.extents:
            store.read_into(
                extent.object, extent.offset, [memoryview(image)[at : at + extent.nbytes]]
            )
            at += extent.nbytes
    for rank in range(new):
        found = {t.name: bytes(image[t.offset : t.offset + t.nbytes]) for t in wanted.tensors[rank]}
        assert found == {s.name: content_of(s, rank % old) for s in specs}


@given(tensors(), worlds, st.randoms())
def test_merge_refuses_what_is_incomplete(
    specs: tuple[TensorSpec, ...], world: int, rng: random.Random
) -> None:
    _, listings = saved(specs, world, "sharded", nodes=world)
    victim = rng.randrange(len(listings))
    part = listings[victim]
    with pytest.raises(CheckpointDamaged):
        merged(listings[:victim] + listings[victim + 1 :])
    with pytest.raises(CheckpointDamaged):
        merged([*listings, part])
    if part.pieces:
        gone = rng.randrange(len(part.pieces))
        rest = part.pieces[:gone] + part.pieces[gone + 1 :]
        others = [p for q in listings for p in q.pieces if p.name == part.pieces[gone].name]
        if part.pieces[gone].scope == "replicated" and (
            len(others) > 1 and part.pieces[gone].nbytes
        ):
            with pytest.raises(CheckpointDamaged):
                merged([*listings[:victim], replace(part, pieces=rest), *listings[victim + 1 :]])


def test_merge_refuses_parts_of_different_origin() -> None:
    specs = (TensorSpec("t", "uint8", (9,), "replicated", 0, 9),)
    _, listings = saved(specs, 2, "sharded", nodes=2)
    for change in ({"step": 8}, {"generation": 2}, {"owner": "p"}, {"world_size": 3}):
        with pytest.raises(CheckpointMismatch):
            merged([listings[0], replace(listings[1], **change)])


@given(tensors(), worlds, modes)
def test_the_json_form_gives_back_the_same(
    specs: tuple[TensorSpec, ...], world: int, mode: Any
) -> None:
    _, listings = saved(specs, world, mode)
    for listing in listings:
        assert decode_part(encode_part(listing), "here") == listing
    manifest = merged(listings)
    assert decode_manifest(encode_manifest(manifest), "here") == manifest
    assert encode_manifest(decode_manifest(encode_manifest(manifest), "x")) == encode_manifest(
        manifest
    )


# ---------------------------------------------------------------- reading


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(1, 60)), max_size=30
    ),
    st.integers(0, 50),
    st.integers(1, 300),
)
def test_scatter_brings_every_byte_to_its_place(
    ranges: list[tuple[str, int, int]], gap: int, longest: int
) -> None:
    objects = {name: random.Random(name).randbytes(600) for name in "ab"}
    wanted, at = [], 0
    for name, offset, nbytes in ranges:
        wanted.append((Extent(name, offset, nbytes), at))
        at += nbytes
    image = bytearray(at)
    for run in plan.scatter(wanted, gap, longest):
        assert run.nbytes == sum(n for _, n in run.places)
        assert run.nbytes <= longest or len(run.places) == 1
        offset = run.offset
        for place, nbytes in run.places:
            if place >= 0:
                image[place : place + nbytes] = objects[run.object][offset : offset + nbytes]
            else:
                assert nbytes <= gap
            offset += nbytes
    for extent, place in wanted:
        source = objects[extent.object][extent.offset : extent.offset + extent.nbytes]
        assert image[place : place + extent.nbytes] == source


def test_neighbours_are_read_at_once() -> None:
    wanted = [(Extent("a", i * 10, 10), 1000 - i * 10) for i in range(20)]
    assert len(plan.scatter(wanted, 0, 10_000)) == 1
    assert len(plan.scatter(wanted[::2], 0, 10_000)) == 10
    assert len(plan.scatter(wanted[::2], 10, 10_000)) == 1


# ---------------------------------------------------------------- names


@given(
    st.text(min_size=0, max_size=300),
    st.integers(0, 10**10 - 1),
    st.integers(0, 10**12 - 1),
    st.integers(0, 10**9),
)
def test_names_say_what_they_were_made_of(
    member: str, sequence: int, step: int, generation: int
) -> None:
    safe = layout.safe_member(member)
    data = f"data/{layout.write_prefix('own', sequence, generation, '0f')}{safe}.0"
    parsed = layout.parse(data)
    assert parsed == layout.Name("data", "own", sequence, generation=generation)
    manifest = layout.manifest_name(sequence, step, "own", "0f")
    commit = layout.commit_name(manifest)
    pin = layout.pin_name(manifest, "me", "0f")
    for name, kind, owner in (
        (manifest, "manifest", "own"), (commit, "commit", "own"), (pin, "pin", "me"),
    ):  # fmt: skip
        assert layout.parse(name) == layout.Name(kind, owner, sequence, step, manifest=manifest)  # type: ignore[arg-type]


@given(st.text(max_size=80))
def test_foreign_names_are_nobodys(name: str) -> None:
    parsed = layout.parse(name)
    assert parsed is None or name.startswith(("data/", "parts/", "manifests/", "commits/", "pins/"))


# ---------------------------------------------------------------- the parser


def sample() -> tuple[bytes, bytes]:
    specs = (
        TensorSpec("a", "float32", (2000,), "replicated", 0, 8000),
        TensorSpec("b", "uint8", (3,), "local", 0, 3),
    )
    _, listings = saved(specs, 2, "sharded", nodes=2)
    return encode_manifest(merged(listings)), encode_part(listings[0])


MANIFEST, PART = sample()


def must_be_refused_or_equal(data: bytes) -> None:
    for decode in (decode_manifest, decode_part):
        with suppress(CheckpointDamaged):
            decode(data, "here")


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    must_be_refused_or_equal(data)


@given(st.sampled_from([MANIFEST, PART]), st.data())
def test_altered_bytes(good: bytes, data: st.DataObject) -> None:
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(bad) - 1))
        bad[at] = data.draw(st.integers(0, 255))
    must_be_refused_or_equal(bytes(bad[: data.draw(st.integers(0, len(bad)))]))
    must_be_refused_or_equal(bytes(bad))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from([MANIFEST, PART]), st.data())
def test_any_value_in_any_place(good: bytes, data: st.DataObject) -> None:
    wire = json.loads(good)
    place: Any = wire
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(values)
    must_be_refused_or_equal(json.dumps(wire).encode())


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting(deep: bytes) -> None:
    must_be_refused_or_equal(deep)


def rejected(**changes: Any) -> str:
    wire = json.loads(MANIFEST)
    for path, value in changes.items():
        *ways, last = path.split("__")
        place = wire
        for way in ways:
            place = place[int(way) if way.isdigit() else way]
        place[int(last) if last.isdigit() else last] = value
    with pytest.raises(CheckpointDamaged) as caught:
        decode_manifest(json.dumps(wire).encode(), "here")
    return str(caught.value)


def test_what_does_not_hold_together_is_named() -> None:
    assert "format 3" in rejected(format=3)
    assert "unknown dtype" in rejected(tensors__0__dtype="object")
    assert "more bytes" in rejected(tensors__0__shape=[10])
    assert "multiples" in rejected(tensors__0__shape=[4000])
    assert "not complete" in rejected(tensors__0__blocks=[])
    assert "outside its object" in rejected(tensors__0__blocks__0__3__1=10**6)
    assert "outside its object" in rejected(tensors__0__blocks__0__3__0=99)
    assert "do not add up" in rejected(tensors__0__blocks__0__3__2=5)
    assert "unknown codec" in rejected(tensors__0__blocks__0__2="rot13")
    assert "without place" in rejected(tensors__0__blocks__0__3=[])
    assert "tensors.0.blocks.0" in rejected(tensors__0__blocks__0__0="../../etc")
    assert "multiples" in rejected(block_bytes=4095)
    assert "wrong rank" in rejected(tensors__0__rank=0)
    assert "out of range" in rejected(tensors__2__rank=9)
    assert "twice" in rejected(tensors__2__rank=0)
    assert "surprise" in rejected(surprise=1)
