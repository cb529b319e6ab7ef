"""Blocks written as changes to older blocks, and what is left of old objects written anew.

Whatever is changed, in whatever order: what is loaded is what was saved, bit for bit (B1, B2).
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft.checkpoint import commit, deltas, reclaim, write
from paddle_ft.checkpoint.deltas import Print, Prints, changed, grain_of
from paddle_ft.checkpoint.layers import (
    Cut,
    Mask,
    decode_table,
    encode_table,
    entry_of,
    picked,
    placed,
)
from paddle_ft.checkpoint.manifest import Manifest
from paddle_ft.checkpoint.plan import plan_read
from paddle_ft.checkpoint.restore import fetch
from paddle_ft.errors import CheckpointDamaged
from paddle_ft.types import CommitRef
from tests.sim.model_store import ModelStore
from tests.unit.checkpoint_job import Array, SavingJob, same

BLOCK = 64 * 1024

shapes = st.one_of(
    st.tuples(st.integers(0, 3000), st.integers(1, 70)),
    st.tuples(st.integers(0, 200_000)),
    st.tuples(st.integers(1, 20), st.integers(1, 9000)),
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 300)),
)
dtypes = st.sampled_from(["uint8", "float32", "int16", "complex128"])


@given(shapes, st.sampled_from([1, 2, 4, 8, 16]))
def test_a_sub_block_is_made_of_whole_rows_where_it_can_be(
    shape: tuple[int, ...], item: int
) -> None:
    grain = grain_of(shape, item)
    assert deltas.GRAIN_BYTES_MIN <= grain <= deltas.GRAIN_BYTES_MAX
    row = math.prod(shape[1:]) * item
    if len(shape) > 1 and 0 < row <= deltas.GRAIN_BYTES_MAX:
        assert grain % row == 0


@given(
    st.integers(1, 20_000), st.integers(0, 10**6), st.integers(64, 4096),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=5),
)  # fmt: skip
def test_every_change_is_found_and_little_else(
    nbytes: int, start: int, grain: int, places: list[float]
) -> None:
    prints = Prints()
    old = bytearray(random.Random(nbytes).randbytes(nbytes))
    new = bytearray(old)
    touched = {int(p * nbytes) for p in places}
    for at in touched:
        new[at] ^= 1 << (at % 8)
    tags = prints.of(memoryview(new), start, grain)
    mask = changed(prints.of(memoryview(old), start, grain), tags)
    assert mask is not None
    assert len(mask) == tags.cut.count
    edges = np.cumsum([0, *tags.cut.sizes()])
    assert edges[-1] == nbytes
    assert all((start + edge) % grain == 0 for edge in edges[1:-1])
    owners = {int(np.searchsorted(edges, at, "right")) - 1 for at in touched}
    assert set(np.flatnonzero(mask)) == owners
    rows = picked(memoryview(new), tags.cut, mask)
    assert rows.nbytes == tags.cut.sizes()[mask].sum()
    placed(rows, memoryview(old), tags.cut, mask, mask)
    assert old == new


def differing(old: Print, new: Print) -> Mask:
    mask = changed(old, new)
    assert mask is not None
    return mask


def test_words_that_change_places_are_a_change() -> None:
    prints = Prints()
    words = [bytes([i]) * 16 for i in range(64)]
    one = prints.of(memoryview(b"".join(words)), 0, 1024)
    words[3], words[40] = words[40], words[3]
    assert list(differing(one, prints.of(memoryview(b"".join(words)), 0, 1024))) == [True]
    double = prints.of(memoryview(b"x" * 32 + bytes(992)), 0, 1024)
    other = prints.of(memoryview(b"y" * 32 + bytes(992)), 0, 1024)
    assert list(differing(double, other)) == [True]


def test_blocks_that_are_cut_differently_are_not_compared() -> None:
    prints = Prints()
    data = memoryview(bytes(4096))
    assert changed(prints.of(data, 0, 256), prints.of(data, 0, 512)) is None
    assert changed(prints.of(data, 0, 256), prints.of(data, 100, 256)) is None
    assert changed(prints.of(data, 0, 256), prints.of(data[:-1], 0, 256)) is None


cuts = st.builds(
    lambda grain, first, rest, whole: Cut(
        first % grain, grain, first % grain + whole * grain + rest % grain
    ),
    st.integers(1, 70), st.integers(0, 69), st.integers(0, 69), st.integers(1, 40),
)  # fmt: skip


@given(cuts, st.randoms(use_true_random=False), st.floats(0, 1))
def test_sub_blocks_come_back_to_their_places(cut: Cut, rng: random.Random, share: float) -> None:
    block = rng.randbytes(cut.nbytes)
    mask = np.array([rng.random() < share for _ in range(cut.count)])
    wanted = np.array([m and rng.random() < 0.5 for m in mask])
    entry = decode_table(encode_table({7: entry_of(cut, 5, mask)}))[7]
    assert (entry.cut, entry.offset) == (cut, 5)
    assert entry.mask().tolist() == mask.tolist()
    target = bytearray(cut.nbytes)
    placed(picked(memoryview(block), cut, mask), memoryview(target), cut, mask, wanted)
    edges = np.cumsum([0, *cut.sizes()])
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        assert target[a:b] == (block[a:b] if wanted[i] else bytes(b - a))


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), cuts), max_size=5), st.data())
def test_a_table_that_is_altered_is_refused_or_is_another_table(
    drawn: list[tuple[int, Cut]], data: st.DataObject
) -> None:
    """No crash, only ValueError."""
    rng = np.random.default_rng(1)
    entries = {k: entry_of(cut, 0, rng.random(cut.count) < 0.3) for k, cut in drawn}
    content = bytearray(encode_table(entries))
    for _ in range(data.draw(st.integers(1, 4))):
        if content and data.draw(st.booleans()):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        else:
            del content[data.draw(st.integers(0, len(content))) :]
    try:
        for entry in decode_table(bytes(content)).values():
            assert len(entry.mask()) == entry.cut.count
    except ValueError:
        pass


# ---------------------------------------------------------------- whole jobs


def loaded(store: ModelStore, manifest: Manifest) -> dict[str, Array]:
    wanted = plan_read(manifest, [0])
    image = memoryview(bytearray(wanted.nbytes))
    fetch(store, "m", wanted.targets, image, threads=1)
    return {
        t.name: np.frombuffer(image[t.offset : t.offset + t.nbytes], t.dtype).reshape(t.shape)
        for t in wanted.tensors[0]
    }


@st.composite
def states(draw: st.DrawFn) -> dict[str, Array]:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    drawn = draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3))
    return {
        f"t{i}": rng.integers(0, 200, shape).astype(dtype) for i, (shape, dtype) in enumerate(drawn)
    }


def edit(state: dict[str, Array], rng: random.Random) -> dict[str, Array]:
    """A few bytes, rows, runs or whole tensors of ``state`` changed."""
    result = {name: array.copy() for name, array in state.items()}
    for array in result.values():
        raw = array.reshape(-1).view(np.uint8)
        kind = rng.choice(["nothing", "bytes", "run", "rows", "all"])
        if not raw.size or kind == "nothing":
            continue
        if kind == "bytes":
            for _ in range(rng.randint(1, 20)):
                raw[rng.randrange(raw.size)] ^= rng.randint(1, 255)
        elif kind == "run":
            first = rng.randrange(raw.size)
            raw[first : first + rng.randint(1, 5000)] += np.uint8(1)
        elif kind == "rows":
            for _ in range(rng.randint(1, 30)):
                row = rng.randrange(len(array))
                array[row : row + 1].reshape(-1).view(np.uint8)[:] ^= np.uint8(1)
        else:
            raw += np.uint8(1)
    return result


@settings(max_examples=40)
@given(states(), st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.integers(1, 3))
def test_any_edits_load_bit_for_bit(state: dict[str, Array], seeds: list[int], nodes: int) -> None:
    store = ModelStore()
    job = SavingJob(store, keep=2, block_bytes=BLOCK)
    history: list[tuple[CommitRef, dict[str, Array]]] = []
    for step, seed in enumerate(seeds, 1):
        world = 1 + seed % 3
        ref = job.save(step, state, world=world, nodes=nodes)
        history.append((ref, state))
        for kept, expected in history[-2:]:
            assert same(loaded(store, commit.read_manifest(store, kept)), expected)
        state = edit(state, random.Random(seed))


def embedding(rows: int = 40_000, width: int = 64) -> Array:
    return np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)


def written(store: ModelStore) -> int:
    return sum(i.nbytes for i in store.find("data/"))


def test_rows_that_change_cost_their_bytes() -> None:
    store = ModelStore()
    job = SavingJob(store, keep=100, block_bytes=4 * 2**20)
    table = embedding()
    job.save(1, {"table": table})
    rng = np.random.default_rng(2)
    for step in range(2, 6):
        before = written(store)
        rows = rng.choice(len(table), len(table) // 100, replace=False)
        table[rows] += 1
        ref = job.save(step, {"table": table})
        assert written(store) - before <= 1.2 * table[rows].nbytes
        assert same(loaded(store, commit.read_manifest(store, ref)), {"table": table})


@pytest.mark.parametrize("width", [3, 16, 50, 300, 1000, 1025, 5000])
def test_rows_of_any_width(width: int) -> None:
    store = ModelStore()
    job = SavingJob(store, keep=100, block_bytes=4 * 2**20)
    table = embedding(8 * 2**20 // width // 4, width)
    job.save(1, {"table": table})
    before = written(store)
    rows = np.random.default_rng(2).choice(len(table), len(table) // 200 % 1500 + 1, replace=False)
    table[rows] += 1
    ref = job.save(2, {"table": table})
    grain = max(table[rows].nbytes, len(rows) * grain_of(table.shape, 4))
    assert written(store) - before <= 1.2 * grain
    assert same(loaded(store, commit.read_manifest(store, ref)), {"table": table})


def test_a_block_is_never_in_too_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "LAYERS_MAX", 10)
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=2**20)
    table = embedding(4096)
    rng = np.random.default_rng(2)
    most = 0
    for step in range(1, 30):
        ref = job.save(step, {"table": table})
        manifest = commit.read_manifest(store, ref)
        [piece] = manifest.tensors
        most = max(most, *(len(b.layers) for b in piece.blocks))
        assert same(loaded(store, manifest), {"table": table})
        table[rng.choice(len(table), 20, replace=False)] += 1
    assert most == 10


def test_a_tensor_that_changes_throughout_is_not_looked_at_each_time() -> None:
    job = SavingJob(ModelStore(), keep=1, block_bytes=2**20)
    table = embedding(8192)
    held = []
    for step in range(1, 2 + deltas.PAUSE_WRITES):
        job.save(step, {"table": table})
        held.append(job.prints[0].nbytes)
        table += 1
    assert held[1] > 0
    assert held[-1] == 0
    job.save(99, {"table": table})  # it may have become worthwhile
    job.save(100, {"table": table + 1})
    table = table + 1
    table[5] = 0
    before = written(job.store)  # type: ignore[arg-type]
    job.save(101, {"table": table})
    assert written(job.store) - before < 2000  # type: ignore[arg-type]


def test_a_change_that_is_missed_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: with tags that do not see the first words of a row."""
    monkeypatch.setattr(deltas, "_folded", lambda words: words[:, -2:])
    store = ModelStore()
    job = SavingJob(store, block_bytes=BLOCK)
    table = embedding(2000)
    job.save(1, {"table": table})
    table[0, 0] += 1
    table[1, -1] += 1
    ref = job.save(2, {"table": table})
    with pytest.raises(CheckpointDamaged, match="altered"):
        loaded(store, commit.read_manifest(store, ref))


# ---------------------------------------------------------------- space


def space(manifest: Manifest) -> float:
    return sum(manifest.objects.values()) / manifest.nbytes


def test_what_is_left_in_old_objects_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "PACK_BYTES", 2**20)
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK, space_ratio=1.1)
    rng = np.random.default_rng(3)
    # Every pack holds one frozen block among fifteen that change.
    state: dict[str, Array] = {
        f"{i:02}{'frozen' if i % 16 == 0 else 'dense'}": rng.integers(0, 255, BLOCK).astype(
            np.uint8
        )
        for i in range(160)
    }
    ratios, news = [], []
    for step in range(1, 12):
        ref = job.save(step, state)
        manifest = commit.read_manifest(store, ref)
        assert same(loaded(store, manifest), state)
        ratios.append(space(manifest))
        news.append(manifest.bytes_new)
        state = {
            n: a if "frozen" in n else rng.integers(0, 255, BLOCK).astype(np.uint8)
            for n, a in state.items()
        }
    assert max(ratios) > 1.5  # just after the first change
    assert max(ratios[3:]) < 1.2
    # What was moved is not moved again and again.
    assert max(news[4:]) == 150 * BLOCK


def test_when_nothing_changes_nothing_is_written() -> None:
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK)
    state = {"table": embedding(2000)}
    for step in range(1, 4):
        ref = job.save(step, state)
    assert commit.read_manifest(store, ref).bytes_new == 0


@settings(max_examples=8)
@given(
    st.integers(0, 10**6), st.floats(0.001, 0.9), st.booleans(), st.sampled_from([1.2, 1.5, 2.2])
)
def test_space_stays_within_the_stated_bound(
    seed: int, share: float, hot: bool, ratio: float
) -> None:
    rng = np.random.default_rng(seed)
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=BLOCK, space_ratio=ratio)
    table = rng.standard_normal((2500, 64)).astype(np.float32)
    last = table.nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "PACK_BYTES", 2 * BLOCK)
        for step in range(1, 25):
            ref = job.save(step, {"table": table})
            manifest = commit.read_manifest(store, ref)
            assert same(loaded(store, manifest), {"table": table})
            bound = ratio * manifest.nbytes + max(last, manifest.bytes_new) + 2 * BLOCK
            assert sum(manifest.objects.values()) <= bound
            last = manifest.bytes_new
            among = len(table) // 4 if hot and step % 5 else len(table)
            table[rng.choice(among, max(1, int(share * among)), replace=False)] += 1


def test_many_small_objects_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "OBJECTS_MAX", 64)
    store = ModelStore()
    job = SavingJob(store, keep=1, block_bytes=2**20)
    table = embedding(8000)
    for step in range(1, 2 * reclaim.OBJECTS_MAX):
        ref = job.save(step, {"table": table})
        manifest = commit.read_manifest(store, ref)
        assert len(manifest.objects) <= reclaim.OBJECTS_MAX + 2
        assert same(loaded(store, manifest), {"table": table})
        table[step * 37] += 1
