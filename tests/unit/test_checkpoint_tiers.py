"""The cache in front of a store: faster, bounded, and never to be relied upon (A5, B4)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.restore import verify
from paddle_ft.checkpoint.store import open_store
from paddle_ft.checkpoint.tiers import Cache, TieredStore
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, StoreMissing
from tests.unit.checkpoint_job import SavingJob, load, same

MIB = 2**20


def state_of(value: int, nbytes: int = 300_000) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(value).integers(0, 255, nbytes).astype(np.uint8)}


class Place:
    """A store with a cache, and both directories."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.cache, self.remote = root / "cache", root / "remote"
        config = CheckpointConfig.model_validate({"cache": str(self.cache), **settings})
        store = open_store(str(self.remote), config)
        assert isinstance(store, TieredStore)
        self.store = store
        self.job = SavingJob(store)

    def files(self, directory: Path) -> list[Path]:
        return sorted(p for p in (directory / "data").rglob("*") if p.is_file())

    @property
    def used_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.files(self.cache))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_written_is_read_from_the_cache(place: Place) -> None:
    ref = place.job.save(1, state_of(1))
    for path in place.files(place.remote):
        path.write_bytes(b"")  # not needed
    assert same(load(place.store, ref), state_of(1))


def test_what_is_read_comes_into_the_cache(place: Place) -> None:
    ref = place.job.save(1, state_of(1))
    for path in place.files(place.cache):
        path.unlink()
    assert same(load(place.store, ref), state_of(1))
    assert [p.name for p in place.files(place.cache)] == [p.name for p in place.files(place.remote)]


@pytest.mark.parametrize("harm", ["flip", "truncate", "directory", "unreadable"])
def test_a_fault_of_the_cache_is_a_slower_read(place: Place, harm: str) -> None:
    ref = place.job.save(1, state_of(1))
    for path in place.files(place.cache):
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        if harm == "flip":
            path.write_bytes(content)
        elif harm == "truncate":
            path.write_bytes(content[:1000])
        else:
            path.unlink()
            path.mkdir()
            if harm == "unreadable":
                (path / "x").write_text("x")
    assert same(load(place.store, ref), state_of(1))
    assert same(load(place.store, ref), state_of(1))


def test_an_altered_copy_is_dropped(place: Place) -> None:
    ref = place.job.save(1, state_of(1))
    [path] = place.files(place.cache)
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    load(place.store, ref)
    load(place.store, ref)
    assert path.read_bytes() == good


def test_what_is_gone_everywhere_is_damage(place: Place) -> None:
    ref = place.job.save(1, state_of(1))
    for path in place.files(place.cache) + place.files(place.remote):
        path.unlink()
    with pytest.raises(CheckpointDamaged, match="missing"):
        load(place.store, ref)


def test_verify_looks_at_the_store_behind(place: Place) -> None:
    ref = place.job.save(1, state_of(1))
    [path] = place.files(place.remote)
    path.write_bytes(b"x" * path.stat().st_size)
    assert verify(place.store, ref, commit.read_manifest(place.store, ref))


def test_the_bound_holds_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    place = Place(tmp_path, cache_bytes_max=MIB)
    refs = []
    for step in range(1, 4):
        refs.append(place.job.save(step, state_of(step)))
        assert place.used_bytes <= MIB
    assert len(place.files(place.cache)) == 3
    old = [os.stat(p).st_mtime - 1000 for p in place.files(place.cache)]
    for path, at_s in zip(place.files(place.cache), old, strict=True):
        os.utime(path, (at_s, at_s))
    load(place.store, refs[0])  # now the most recently used
    place.job.save(4, state_of(4))
    assert place.used_bytes <= MIB
    names = {p.parent.name.split("-")[0] for p in place.files(place.cache)}
    assert int(min(names)) == 1
    assert 2 not in {int(n) for n in names}


def test_what_is_larger_than_the_cache_passes_by(tmp_path: Path) -> None:
    place = Place(tmp_path, cache_bytes_max=MIB)
    ref = place.job.save(1, state_of(1, 3 * MIB))
    assert place.used_bytes == 0
    assert same(load(place.store, ref), state_of(1, 3 * MIB))


def test_what_is_collected_leaves_the_cache(place: Place) -> None:
    for step in range(1, 15):
        place.job.save(step, state_of(step))
    cached = {p.parent.name for p in place.files(place.cache)}
    assert cached == {p.parent.name for p in place.files(place.remote)}


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    config = CheckpointConfig(cache=str(tmp_path / "cache"))
    job = SavingJob(open_store(str(tmp_path / "remote"), config))
    ref = job.save(1, state_of(1))
    assert same(load(job.store, ref), state_of(1))
    assert "cache" in caplog.text


@pytest.mark.root
def test_a_full_cache_is_no_error(tmp_path: Path, small_tmpfs: Path) -> None:
    config = CheckpointConfig(cache=str(small_tmpfs))
    job = SavingJob(open_store(str(tmp_path / "remote"), config))
    for step in range(1, 9):
        ref = job.save(step, state_of(step))
        assert same(load(job.store, ref), state_of(step))


def test_a_missing_object_is_missing(place: Place) -> None:
    cache = place.store.tiers[0]
    assert isinstance(cache, Cache)
    with pytest.raises(StoreMissing):
        cache.read_into("data/o/0000000001-1-0f/n.0", 0, [memoryview(bytearray(1))])
