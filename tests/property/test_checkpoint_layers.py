"""Blocks with layers over long runs: whoever writes, whatever is lost in between, and at what cost.

Any sequence of changes, compactions, collections, writers that start anew and parts that are never
committed: what is kept loads bit for bit (B1, B2, B5); what is written stays within the bound.
"""

from __future__ import annotations

import itertools
import json
import random
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft.checkpoint import commit, layers, reclaim, write
from paddle_ft.checkpoint.content import Block, Extent
from paddle_ft.checkpoint.deltas import Prints
from paddle_ft.checkpoint.manifest import (
    Manifest,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged
from paddle_ft.types import CommitRef
from tests.property.test_checkpoint_deltas import edit, loaded, states
from tests.sim.model_store import ModelStore
from tests.unit.checkpoint_job import Array, SavingJob, images, same

BLOCK = 64 * 1024
RATIO = CheckpointConfig().space_ratio


def table_of(rows: int, width: int = 64) -> Array:
    return np.random.default_rng(1).integers(0, 2**32, (rows, width), dtype=np.uint32)


def change(table: Array, rows: int, rng: np.random.Generator) -> None:
    table[rng.choice(len(table), rows, replace=False)] += np.uint32(1)


def forsaken(job: SavingJob, state: dict[str, Array], step: int) -> None:
    """A part that is written and never committed."""
    made = images(state, {}, step, 1, block_bytes=job.config.block_bytes)
    head = job.head
    parent = (head.newest, commit.read_manifest(job.store, head.newest)) if head else None
    write.write_part(
        job.store,
        made,
        write.Share(job.owner, (head.newest.sequence if head else 0) + 1, 1, "n0.a", parent),
        job.config,
        prints=job.prints.setdefault(0, Prints()),
    )


@settings(max_examples=40)
@given(
    states(),
    st.lists(st.integers(0, 10**6), min_size=2, max_size=14),
    st.integers(1, 3),
    st.sampled_from([1.1, 1.3, 2.2]),
)
def test_whatever_happens_what_is_kept_loads_bit_for_bit(
    state: dict[str, Array], seeds: list[int], nodes: int, ratio: float
) -> None:
    store = ModelStore()
    job = SavingJob(store, keep=3, block_bytes=BLOCK, space_ratio=ratio)
    state = state | {"twin": next(iter(state.values()))}  # tied weights: the same bytes, two names
    history: list[tuple[CommitRef, dict[str, Array]]] = []
    for step, seed in enumerate(seeds, 1):
        rng = random.Random(seed)
        if rng.random() < 0.2:
            job.prints.pop(rng.randrange(3), None)  # the launcher of a node starts anew
        if rng.random() < 0.3:
            forsaken(job, state, step)
        if rng.random() < 0.2:
            forsaken(job, edit(state, rng), step)
        history.append((job.save(step, state, world=1 + seed % 3, nodes=nodes), state))
        for kept, expected in history[-3:]:
            assert same(loaded(store, commit.read_manifest(store, kept)), expected)
        tied = rng.random() < 0.7
        state = edit(state, rng)
        if tied:
            state["twin"] = state["t0"]


def test_what_was_never_committed_is_not_built_upon() -> None:
    """One writer lays the bytes upon an older checkpoint and is not heard, another one upon the
    newest; where the first put the rows says nothing of where they are."""
    store = ModelStore()
    job = SavingJob(store, keep=2, block_bytes=BLOCK)
    one, other = Prints(), Prints()
    state: dict[str, Array] = {"table": table_of(2000)}
    rng = np.random.default_rng(2)
    job.prints[0] = other
    forsaken(job, state, 1)
    job.prints[0] = one
    job.save(1, state)
    first = job.head
    job.prints[0] = other
    change(state["table"], 50, rng)
    forsaken(job, state, 2)
    job.save(2, state)
    change(state["table"], 50, rng)
    second, job.head, job.prints[0] = job.head, first, one
    forsaken(job, state, 3)
    job.head, job.prints[0] = second, other
    ref = job.save(3, state)
    [piece] = commit.read_manifest(store, ref).tensors
    assert all(len(b.layers) == 2 for b in piece.blocks)
    job.prints[0] = one
    change(state["table"], 50, rng)
    ref = job.save(4, state)
    [piece] = commit.read_manifest(store, ref).tensors
    assert all(len(b.layers) == 3 for b in piece.blocks)
    assert same(loaded(store, commit.read_manifest(store, ref)), state)


def test_twins_that_go_different_ways() -> None:
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK)
    state: dict[str, Array] = {"one": table_of(2000), "two": table_of(2000)}
    rng = np.random.default_rng(2)
    for step in range(1, 12):
        ref = job.save(step, state)
        assert same(loaded(store, commit.read_manifest(store, ref)), state)
        change(state["one"], 10, rng)
        if step % 4:
            state["two"][:] = state["one"]
        else:
            change(state["two"], 10, rng)


@pytest.mark.parametrize("row_bytes", [256, 1024, 4096])
def test_rows_drawn_at_random_cost_little_more_than_their_bytes(
    row_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a long run, compactions included."""
    monkeypatch.setattr(write, "PACK_BYTES_MIN", 2**18)
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=2**20)
    table = table_of(2**22 // row_bytes, row_bytes // 4)
    rng = np.random.default_rng(2)
    rows = len(table) // 20
    job.save(0, {"table": table})
    written = []
    for step in range(1, 61):  # the table three times over
        change(table, rows, rng)
        ref = job.save(step, {"table": table})
        manifest = commit.read_manifest(store, ref)
        written.append(manifest.bytes_new / (rows * row_bytes))
        assert sum(manifest.objects.values()) <= RATIO * table.nbytes + manifest.bytes_new
    assert same(loaded(store, manifest), {"table": table})
    assert sum(written) / len(written) <= 1.2
    assert max(written) <= 2.5  # no checkpoint pays for many


def test_a_writer_that_starts_anew_finds_where_rows_are() -> None:
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK, space_ratio=1.5)
    state: dict[str, Array] = {"table": table_of(4000)}
    rng = np.random.default_rng(2)
    for step in range(1, 30):
        job.save(step, state)
        change(state["table"], 100, rng)
    ref = job.save(30, state)
    used = commit.read_manifest(store, ref).used
    job.prints.clear()
    ref = job.save(31, state)
    manifest = commit.read_manifest(store, ref)
    kept = {n: used[n] for n in manifest.objects if n in used}
    assert kept
    assert {n: manifest.used[n] for n in kept} == kept
    assert sum(manifest.used.values()) == manifest.nbytes
    assert same(loaded(store, manifest), state)


# ---------------------------------------------------------------- formats


def layered() -> tuple[ModelStore, SavingJob, Manifest, dict[str, Array]]:
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK)
    state: dict[str, Array] = {"table": table_of(1000), "other": table_of(100)}
    rng = np.random.default_rng(2)
    for step in range(1, 5):
        ref = job.save(step, state)
        change(state["table"], 20, rng)
    ref = job.save(5, state)
    return store, job, commit.read_manifest(store, ref), state


def test_the_json_form_gives_back_the_same() -> None:
    _, _, manifest, _ = layered()
    assert any(b.layers for t in manifest.tensors for b in t.blocks)
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


def test_format_1_is_read_and_built_upon() -> None:
    """As it was written before there were layers: blocks in many extents, no bytes in use."""
    store, job, manifest, state = layered()
    content = b"".join(a.tobytes() for a in (state["other"], state["table"]))
    store.put("data/old/0000000001-1-ab/n.0", content)
    tensors, at = [], 0
    for piece in manifest.tensors:
        blocks = []
        for block in piece.blocks:
            cuts = [0, 100, block.nbytes // 2, block.nbytes]
            extents = tuple(
                Extent("data/old/0000000001-1-ab/n.0", at + a, b - a)
                for a, b in itertools.pairwise(cuts)
            )
            blocks.append(Block(block.digest, block.nbytes, extents))
            at += block.nbytes
        tensors.append(replace(piece, blocks=tuple(blocks)))
    old = replace(
        manifest,
        tensors=tuple(tensors),
        objects={"data/old/0000000001-1-ab/n.0": len(content)},
        used={},
    )
    wire = json.loads(encode_manifest(old)) | {"format": 1}
    del wire["tables"]
    found = decode_manifest(json.dumps(wire).encode(), "here")
    assert found == old
    assert same(loaded(store, found), {n: state[n] for n in sorted(state)} | state)
    assert job.head
    made = images(state, {}, 6, 1, block_bytes=BLOCK)
    change(state["table"], 20, np.random.default_rng(3))
    share = write.Share("old", 7, 1, "n", (job.head.newest, found))
    for step in (6, 7):
        part = write.write_part(store, made, share, job.config, prints=job.prints[0])
        listing = write.read_part(store, part)
        assert decode_part(encode_part(listing), "here") == listing
        expected = {p.name: p for p in listing.pieces}
        whole = replace(found, tensors=listing.pieces, objects=listing.objects, used=listing.used)
        assert set(expected) == set(state)
        read = loaded(store, whole)
        assert read["table"].tobytes() == bytes(made[0][1][: read["table"].nbytes])
        made = images(state, {}, step, 1, block_bytes=BLOCK)
    assert any(b.layers for p in listing.pieces for b in p.blocks)


@given(st.data())
def test_altered_manifests_with_layers(data: st.DataObject) -> None:
    bad = bytearray(LAYERED)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CheckpointDamaged):
        decode_manifest(bytes(bad), "here")


LAYERED = encode_manifest(layered()[2])


@pytest.mark.parametrize("what", ["altered", "missing or too short"])
def test_a_bad_table_is_named(what: str) -> None:
    store, _, manifest, _ = layered()
    layer = next(b.layers[0] for t in manifest.tensors for b in t.blocks if b.layers)
    content = bytearray(store.get(layer.object))
    store.delete([layer.object])
    if what == "altered":
        content[layer.offset + layer.nbytes // 2] ^= 1
        store.put(layer.object, bytes(content))
    with pytest.raises(CheckpointDamaged, match=what):
        loaded(store, manifest)


def test_the_bound_can_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without giving anything up space grows beyond the bound."""
    monkeypatch.setattr(write, "sparse", lambda manifest, ratio: frozenset())
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK)
    table = table_of(2000)
    rng = np.random.default_rng(2)
    for step in range(1, 40):
        ref = job.save(step, {"table": table})
        change(table, 100, rng)
    manifest = commit.read_manifest(store, ref)
    assert sum(manifest.objects.values()) > RATIO * manifest.nbytes + manifest.bytes_new
    assert reclaim.sparse(manifest, RATIO)
    assert layers.LAYERS_MAX > 40
