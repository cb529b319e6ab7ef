"""Saved by some ranks as boxes, loaded by others as other boxes (B3)."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft.checkpoint import commit, layout, plan, retention, write
from paddle_ft.checkpoint.boxes import Box, tiled, whole_of, writers
from paddle_ft.checkpoint.manifest import Manifest, decode_manifest, encode_manifest
from paddle_ft.checkpoint.shards import load_shards, read_boxes
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, CheckpointMismatch
from paddle_ft.types import CommitRef, ImageInfo, ShardOf, TensorSpec
from tests.sim.model_store import ModelStore

Array = np.ndarray[Any, Any]
CONFIG = CheckpointConfig(block_bytes=4096)


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Box]:
    """The boxes between ``cuts`` on each axis."""
    ranges = []
    for n, own in zip(shape, cuts, strict=True):
        bounds = sorted({0, n, *(c % (n + 1) for c in own)})
        ranges.append([(a, b - a) for a, b in itertools.pairwise(bounds)])
    return [
        Box(tuple(a for a, _ in cell), tuple(n for _, n in cell))
        for cell in itertools.product(*ranges)
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[Box]]:
    """A shape, and two ways to divide it."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    cuts = st.lists(st.integers(0, 40), max_size=2)
    one, other = ([draw(cuts) for _ in shape] for _ in range(2))
    return shape, grid(shape, one), grid(shape, other)


def save(store: Store, tensors: dict[str, tuple[Array, list[Box]]], nodes: int = 2) -> Manifest:
    """A checkpoint by as many ranks as there are boxes; rank r has box r of each tensor."""
    world = max(len(boxes) for _, boxes in tensors.values())
    images = []
    for rank in range(world):
        specs, image = [], bytearray()
        for name, (array, boxes) in tensors.items():
            if rank >= len(boxes):
                continue
            content = array[boxes[rank].slices(whole_of(array.shape))].tobytes()
            image.extend(bytes(plan.aligned(len(image)) - len(image)))
            specs.append(
                TensorSpec(
                    name, str(array.dtype), boxes[rank].shape, "local", len(image), len(content),
                    shard=ShardOf(boxes[rank].start, array.shape),
                )
            )  # fmt: skip
            image.extend(content)
        images.append((ImageInfo(1, rank, world, tuple(specs), {}), memoryview(image)))
    owner = commit.new_owner()
    listings = []
    for node in range(min(nodes, world)):
        share = write.Share(owner, 1, 1, f"n{node}")
        part = write.write_part(store, images[node::nodes], share, CONFIG)
        listings.append(write.read_part(store, part))
    return plan.merge(listings, head=None, parents={}, created_s=0.0)


REF = CommitRef(1, 1, 1, layout.manifest_name(1, 1, "o", "0f"), "")


@settings(max_examples=60)
@given(layouts(), st.sampled_from(["uint8", "float32", "complex128"]))
def test_any_layout_loads_under_any_other(
    drawn: tuple[tuple[int, ...], list[Box], list[Box]], dtype: str
) -> None:
    shape, saved, wanted = drawn
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    store = ModelStore()
    manifest = save(store, {"w": (array, saved)})
    assert decode_manifest(encode_manifest(manifest), "here") == manifest
    for box in [*wanted, whole_of(shape)]:
        found = read_boxes(store, REF, manifest, {"w": box})["w"]
        assert found.dtype == array.dtype
        assert np.array_equal(found, array[box.slices(whole_of(shape))])


@given(layouts(), st.randoms())
def test_boxes_cover_all_or_it_is_seen(
    drawn: tuple[tuple[int, ...], list[Box], list[Box]], rng: Any
) -> None:
    shape, boxes, _ = drawn
    assert tiled(boxes, shape)
    victim = rng.choice(boxes)
    assert tiled([*boxes, victim], shape)  # a replica
    assert not tiled([b for b in boxes if b != victim], shape)
    axis = rng.randrange(len(shape))
    longer = list(victim.shape)
    longer[axis] += 1
    assert not tiled([*boxes, Box(victim.start, tuple(longer))], shape)
    if len(boxes) > 1:
        assert not tiled([*boxes, whole_of(shape)], shape)


@given(layouts(), layouts())
def test_tiles_are_what_counting_says(
    one: tuple[tuple[int, ...], list[Box], list[Box]], other: Any
) -> None:
    shape, first, second = one
    for boxes in (first + second[:1], first[1:] + second[:1], second):
        counts = np.zeros(shape, int)
        for box in set(boxes):
            counts[box.slices(whole_of(shape))] += 1
        assert tiled(boxes, shape) == bool((counts == 1).all())


def columns(shape: tuple[int, int], n: int) -> list[Box]:
    return [Box((0, i * shape[1] // n), (shape[0], shape[1] // n)) for i in range(n)]


def rows(shape: tuple[int, int], n: int) -> list[Box]:
    return [Box((i * shape[0] // n, 0), (shape[0] // n, shape[1])) for i in range(n)]


def test_tensor_parallel_layouts(tmp_path: Any) -> None:
    """Column and row parallel layers of four ranks, loaded by two, through a directory."""
    rng = np.random.default_rng(1)
    up, down = (rng.standard_normal((64, 256)).astype(np.float32) for _ in range(2))
    store = open_store(str(tmp_path), CONFIG)
    manifest = save(
        store, {"up": (up, columns(up.shape, 4)), "down": (down, rows(down.shape, 4))}, nodes=4
    )
    ref = write.store_manifest(store, manifest)
    commit.mark_committed(store, retention.next_head(None, ref, retention.KeepAll(), ""))
    for rank in range(2):
        boxes = {"up": columns(up.shape, 2)[rank], "down": rows(down.shape, 2)[rank]}
        found = load_shards(str(tmp_path), boxes)
        assert np.array_equal(found["up"], up[:, rank * 128 : rank * 128 + 128])
        assert np.array_equal(found["down"], down[rank * 32 : rank * 32 + 32])
    with pytest.raises(CheckpointMismatch, match="no elements"):
        load_shards(str(tmp_path), {"up": Box((0, 200), (64, 100))})
    with pytest.raises(CheckpointMismatch, match="no elements"):
        load_shards(str(tmp_path), {"other": Box((0,), (1,))})
    with pytest.raises(CheckpointMismatch, match="step 7"):
        load_shards(str(tmp_path), {}, step=7)


def test_only_the_rows_that_are_needed_are_read() -> None:
    array = np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)  # a row is a block
    store = ModelStore()
    manifest = save(store, {"w": (array, rows(array.shape, 2))})
    [piece, _] = manifest.tensors
    for block in piece.blocks[:30]:  # of the first half all but the last two rows
        for extent in block.extents:
            content = bytearray(store.get(extent.object))
            content[extent.offset] ^= 1
            store.delete([extent.object])
            store.put(extent.object, bytes(content))
    box = Box((30, 100), (20, 10))
    found = read_boxes(store, REF, manifest, {"w": box})["w"]
    assert np.array_equal(found, array[30:50, 100:110])
    with pytest.raises(CheckpointDamaged):
        read_boxes(store, REF, manifest, {"w": Box((29, 0), (1, 1))})


def test_what_is_whole_can_be_loaded_in_boxes() -> None:
    store = ModelStore()
    array = np.arange(600, dtype=np.int32).reshape(20, 30)
    spec = TensorSpec("w", "int32", array.shape, "replicated", 0, array.nbytes)
    image = (ImageInfo(1, 0, 1, (spec,), {}), memoryview(array.tobytes()))
    part = write.write_part(store, [image], write.Share("o", 1, 1, "n"), CONFIG)
    manifest = plan.merge([write.read_part(store, part)], head=None, parents={}, created_s=0.0)
    found = read_boxes(store, REF, manifest, {"w": Box((3, 4), (5, 6))})["w"]
    assert np.array_equal(found, array[3:8, 4:10])
    assert "shard" not in json.loads(encode_manifest(manifest))["tensors"][0]  # as it always was


def test_shards_that_are_not_all_of_it_are_no_checkpoint() -> None:
    array = np.zeros((8, 8), np.uint8)
    for boxes in (rows((8, 8), 4)[:3], [*rows((8, 8), 2), Box((2, 0), (4, 8))]):
        with pytest.raises(CheckpointDamaged, match="not all of it"):
            save(ModelStore(), {"w": (array, boxes)})


def test_a_manifest_whose_shards_do_not_fit_is_refused() -> None:
    manifest = save(ModelStore(), {"w": (np.zeros((8, 8), np.uint8), rows((8, 8), 4))})
    for shard in (ShardOf((7, 0), (8, 8)), ShardOf((0,), (8,)), ShardOf((0, 0), (8, 8))):
        bad = replace(
            manifest, tensors=(*manifest.tensors[:3], replace(manifest.tensors[3], shard=shard))
        )
        with pytest.raises(CheckpointDamaged):
            decode_manifest(encode_manifest(bad), "here")


def test_replicas_are_written_by_the_first() -> None:
    left, right = columns((4, 4), 2)
    assert writers([left, right, left, right]) == [True, True, False, False]
