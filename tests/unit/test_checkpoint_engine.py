"""Saving and loading: exact, incremental, and never from damaged bytes (B1, B2, B3, B5, B6)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paddle_ft import failpoints
from paddle_ft.checkpoint import commit, deltas, layout, plan, retention, write
from paddle_ft.checkpoint.restore import check_tensors, restore, verify
from paddle_ft.checkpoint.store import open_store
from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    StoreFull,
    StoreUnavailable,
)
from paddle_ft.types import CommitRef, Head
from tests.unit.checkpoint_job import BLOCK, SavingJob, State, as_bfloat16, images, load, same

RNG = np.random.default_rng(7)


def state_of(value: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(value)
    return {
        "big": rng.standard_normal(5 * BLOCK // 4 + 3, dtype=np.float32),
        "frozen": np.arange(2 * BLOCK, dtype=np.int64),
        "scalar": np.array(value, dtype=np.int32),
        "empty": np.zeros((0, 3), dtype=np.float16),
        "flags": rng.integers(0, 2, 11).astype(bool),
        "nan": np.array([np.nan, -0.0, np.inf]),
    }


def local_of(value: int, world: int) -> dict[str, np.ndarray]:
    return {"mean": np.random.default_rng(value).standard_normal((world, 7))}


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(("world", "nodes", "new"), [(1, 1, 1), (2, 1, 3), (4, 3, 1), (3, 3, 5)])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, world: int, nodes: int, new: int) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    state, local = state_of(1), local_of(1, world)
    ref = job.save(10, state, local, world, nodes)
    for rank in range(new):
        expected = state | {"mean": local["mean"][rank % world]}
        assert same(load(job.store, ref, rank, new), expected)


def test_bfloat16_is_kept_as_raw_bytes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    bits = RNG.integers(0, 2**16, 5000).astype(np.uint16)
    [(info, image)] = images({"w": bits}, {}, 1, 1)
    job = SavingJob(store)
    share = write.Share(job.owner, 1, 1, "m")
    part = write.write_part(store, [(as_bfloat16(info, {"w"}), image)], share, job.config)
    manifest = plan.merge([write.read_part(store, part)], head=None, parents={}, created_s=0)
    ref = write.store_manifest(store, manifest)
    assert manifest.tensors[0].dtype == "bfloat16"
    assert load(store, ref)["w"].tobytes() == bits.tobytes()


def test_replicated_bytes_are_written_once_whatever_the_world(tmp_path: Path) -> None:
    for world in (1, 4):
        job = SavingJob(open_store(str(tmp_path / str(world))))
        job.save(1, state_of(1), {}, world, world)
        written = sum(i.nbytes for i in job.store.find("data/"))
        assert written == sum(a.nbytes for a in state_of(1).values())


def test_only_changed_blocks_are_written(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    state = state_of(1)
    job.save(1, state)
    before = sum(i.nbytes for i in job.store.find("data/"))
    ref = job.save(2, state)
    assert sum(i.nbytes for i in job.store.find("data/")) == before
    assert commit.read_manifest(job.store, ref).bytes_new == 0
    state["big"][BLOCK // 4] += 1  # the first element of the second block
    ref = job.save(3, state)
    changed = deltas.grain_of(state["big"].shape, 4)
    assert changed < BLOCK
    table = sum(i.nbytes for i in job.store.find("data/")) - before - changed
    assert 0 < table < deltas.ENTRY_BYTES
    assert commit.read_manifest(job.store, ref).bytes_new == changed + table
    assert same(load(job.store, ref), state)


def test_equal_blocks_are_written_once(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    state = {"zeros": np.zeros(100 * BLOCK, dtype=np.uint8), "more": np.zeros(BLOCK, np.uint8)}
    ref = job.save(1, state)
    assert sum(i.nbytes for i in job.store.find("data/")) == BLOCK
    assert same(load(job.store, ref), state)


def test_many_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "PACK_BYTES", 3 * BLOCK)
    job = SavingJob(open_store(str(tmp_path)))
    state = {f"t{i}": RNG.integers(0, 255, 10 * BLOCK + i).astype(np.uint8) for i in range(5)}
    ref = job.save(1, state)
    assert len(job.store.find("data/")) > 15
    assert same(load(job.store, ref), state)


# ---------------------------------------------------------------- retention


def test_only_what_is_kept_stays(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)), keep=2)
    for step in range(1, 15):
        job.save(step, state_of(step))
    assert [r.step for r in commit.list_commits(job.store)] == [14, 13]
    for ref in commit.list_commits(job.store):
        assert same(load(job.store, ref), state_of(ref.step))
    kinds = [layout.parse(i.name) for i in job.store.find("")]
    old = [k for k in kinds if k and k.kind in ("data", "part") and k.sequence <= 6]
    # The blocks that never change are in the first object; all else of that age is gone.
    assert len(old) == 1


def test_rules_read_like_sentences() -> None:
    refs = [CommitRef(i, i * 10, 1, f"m{i}", "") for i in range(10, 0, -1)]
    loss = {r: {"loss": float((r.sequence - 4) ** 2)} for r in refs}
    loss[refs[-1]] = {"loss": float("nan")}
    candidates = [retention.Candidate(r, loss[r]) for r in refs]

    def steps(rule: retention.Keep) -> list[int]:
        return sorted(r.step for r in rule(candidates))

    assert steps(retention.KeepLast(3)) == [80, 90, 100]
    assert steps(retention.KeepEvery(50)) == [10, 50, 100]
    assert steps(retention.KeepBest("loss", 2)) == [40, 50]  # of equal ones the newer
    assert steps(retention.KeepBest("loss", 1, highest=True)) == [100]
    assert steps(retention.KeepBest("accuracy", 1)) == []
    both = retention.KeepAny((retention.KeepLast(1), retention.KeepBest("loss", 1)))
    assert steps(both) == [40, 100]


def test_a_pinned_checkpoint_stays(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)), keep=1)
    pinned = job.save(1, state_of(1))
    commit.pin(job.store, pinned, "me")
    for step in range(2, 14):
        job.save(step, state_of(step))
    assert same(load(job.store, pinned), state_of(1))
    assert [r.step for r in commit.list_commits(job.store)] == [13, 1]
    commit.unpin(job.store, pinned.manifest, "me")
    job.save(14, state_of(14))
    assert [r.step for r in commit.list_commits(job.store)] == [14]


def test_what_is_dropped_already_cannot_be_pinned(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)), keep=1)
    old = job.save(1, state_of(1))
    job.save(2, state_of(2))
    with pytest.raises(CheckpointMismatch, match="no longer kept"):
        commit.pin(job.store, old, "me")
    assert commit.pins(job.store) == {}


# ---------------------------------------------------------------- fences of the engine


def test_a_part_that_is_too_old_is_refused(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    job.save(1, state_of(1))
    share = write.Share(job.owner, 2, 1, "slow")
    part = write.write_part(job.store, images(state_of(2), {}, 99, 1), share, job.config)
    listing = write.read_part(job.store, part)
    for step in range(2, 2 + plan.IN_FLIGHT_SEQUENCES):
        plan.merge([listing], head=job.head, parents={}, created_s=0)
        job.save(step, state_of(step))
    job.save(50, state_of(50))
    with pytest.raises(CheckpointMismatch, match=r"slow.*save again"):
        plan.merge([listing], head=job.head, parents={}, created_s=0)


def test_a_part_upon_a_parent_that_is_not_kept_is_refused(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)), keep=1)
    ref = job.save(1, state_of(1))
    parent = commit.read_manifest(job.store, ref)
    share = write.Share(job.owner, 2, 1, "slow", (ref, parent))
    part = write.write_part(job.store, images(state_of(1), {}, 2, 1), share, job.config)
    job.save(2, state_of(2))
    with pytest.raises(CheckpointMismatch, match="no longer kept"):
        plan.merge(
            [write.read_part(job.store, part)], head=job.head, parents={ref.manifest: parent},
            created_s=0,
        )  # fmt: skip


def test_a_job_is_bound_to_one_store(tmp_path: Path) -> None:
    one, other = open_store(str(tmp_path / "1")), open_store(str(tmp_path / "2"))
    value = commit.binding(one)
    assert commit.bound(one, value) == value.rpartition(".")[2]
    with pytest.raises(CheckpointMismatch, match="another store"):
        commit.bound(other, value)
    with pytest.raises(CheckpointMismatch):
        commit.bound(one, "nonsense")


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put(layout.STORE, b'{"format":99,"identity":"x"}')
    with pytest.raises(ConfigError, match="99"):
        commit.identify(store)
    store.put(layout.STORE, b"{")
    with pytest.raises(CheckpointDamaged):
        commit.identify(store)


def test_another_model_is_named(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    manifest = commit.read_manifest(job.store, job.save(1, {"w": np.zeros((2, 3), np.float32)}))
    check_tensors(manifest, {"w": ("float32", (2, 3))})
    for expected, said in (
        ({"w": ("float32", (3, 2))}, r"w is float32 \[2, 3\].*\[3, 2\]"),
        ({"w": ("float16", (2, 3))}, "float16"),
        ({}, "has the tensor w"),
        ({"w": ("float32", (2, 3)), "v": ("int8", ())}, "lacks the tensor v"),
    ):
        with pytest.raises(CheckpointMismatch, match=said):
            check_tensors(manifest, expected)  # type: ignore[arg-type]


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [flip, truncate, empty, Path.unlink])
def test_damage_anywhere_is_found_and_the_checkpoint_before_still_loads(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    job.save(1, {"other": np.arange(5000), "frozen": np.arange(9)})
    before = {i.name for i in job.store.find("")}
    newest = job.save(2, state_of(2), local_of(2, 2), 2, 2)
    needed = set(commit.read_manifest(job.store, newest).objects) | {newest.manifest}
    harmed = sorted(needed - before)
    assert len(harmed) >= 3
    for name in harmed:
        content = job.store.get(name)
        harm(tmp_path / name)
        with pytest.raises(CheckpointDamaged) as caught:
            load(job.store, newest)
        assert name in str(caught.value)
        assert commit.list_commits(job.store)[1].step == 1
        load(job.store, commit.list_commits(job.store)[1])
        if name != newest.manifest:
            assert verify(job.store, newest, commit.read_manifest(job.store, newest))
        job.store.put(name, content)
    assert verify(job.store, newest, commit.read_manifest(job.store, newest)) == []


@pytest.mark.parametrize("harm", [flip, truncate, empty])
def test_a_damaged_marker_is_left_out(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    job = SavingJob(open_store(str(tmp_path)))
    job.save(1, state_of(1))
    newest = job.save(2, state_of(2))
    marker = tmp_path / layout.commit_name(newest.manifest)
    harm(marker)
    assert [r.step for r in commit.list_commits(job.store)] == [1]
    assert marker.name in caplog.text


def test_a_failed_restore_leaves_no_file(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path / "store")))
    ref = job.save(1, state_of(1))
    manifest = commit.read_manifest(job.store, ref)
    flip(tmp_path / "store" / next(iter(manifest.objects)))
    with pytest.raises(CheckpointDamaged, match=r"bytes of tensor \w+ are altered in data/"):
        restore(job.store, ref, manifest, ranks=[0], world_size=1, path=tmp_path / "image")
    assert not (tmp_path / "image").exists()


@pytest.mark.root
def test_a_restore_that_does_not_fit(tmp_path: Path) -> None:
    job = SavingJob(open_store(str(tmp_path / "store")))
    ref = job.save(1, {"w": np.zeros(2**21, np.uint8)})
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        with pytest.raises(StoreFull, match="does not fit"):
            restore(
                job.store, ref, commit.read_manifest(job.store, ref), ranks=[0], world_size=1,
                path=small / "image",
            )  # fmt: skip
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# ---------------------------------------------------------------- a crash between any two steps


def run_saves(root: Path, acknowledged: Callable[[Head], None], count: int = 10) -> None:
    """Saves and collects; ``acknowledged`` hears of each head once it is marked."""
    job = SavingJob(open_store(str(root)), keep=2)
    first = job.head.newest.step + 1 if job.head else 1
    for step in range(first, first + count):
        job.save(step, state_of(step), local_of(step, 2), 2, 2)
        assert job.head
        acknowledged(job.head)


def check_after_fault(root: Path, acknowledged: int) -> None:
    """The newest acknowledged step, or a later one, loads exactly; and saving goes on."""
    store = open_store(str(root))
    head = commit.newest_head(store)
    if head is None:
        assert acknowledged == 0
    else:
        assert head.newest.step >= acknowledged
        expected: State = state_of(head.newest.step) | {
            "mean": local_of(head.newest.step, 2)["mean"][1]
        }
        assert same(load(store, head.newest, 1, 2), expected)
    run_saves(root, lambda head: None, count=2)
    newest = commit.newest_head(store)
    assert newest
    assert newest.newest.step == (head.newest.step if head else 0) + 2
    load(store, newest.newest)


NAMES = [
    "collect.before", "collect.deleted", "collect.marked", "commit.before_marker", "commit.marked",
    "directory.written", "manifest.before", "manifest.stored", "part.listed", "part.objects",
]  # fmt: skip


def test_every_step_has_a_failpoint(tmp_path: Path) -> None:
    with failpoints.recorded() as names:
        run_saves(tmp_path, lambda head: None)
    assert sorted(set(names)) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passing", [1, 10])
def test_an_error_at_any_step_loses_nothing(tmp_path: Path, name: str, passing: int) -> None:
    heads: list[Head] = []
    with failpoints.switched(f"{name}=raise:StoreFull@{passing}"):
        try:
            run_saves(tmp_path, heads.append)
        except StoreFull:
            pass
        else:
            assert passing > 1
    check_after_fault(tmp_path, heads[-1].newest.step if heads else 0)


def test_a_passing_fault_at_any_step_is_not_seen(tmp_path: Path) -> None:
    with failpoints.switched("directory.written=raise:StoreUnavailable@9"):
        run_saves(tmp_path, lambda head: None)


CRASHER = """
import sys
from pathlib import Path
from tests.unit.test_checkpoint_engine import run_saves
run_saves(Path(sys.argv[1]), lambda head: print(head.newest.step, flush=True))
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_crash_at_any_step_loses_nothing(tmp_path: Path, name: str) -> None:
    passing = 7 if name != "directory.written" else 45
    done = subprocess.run(
        [sys.executable, "-c", CRASHER, str(tmp_path)],
        env=os.environ | {failpoints.VARIABLE: f"{name}=crash@{passing}"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == failpoints.EXIT_CRASHED
    acknowledged = [int(line) for line in done.stdout.split()]
    check_after_fault(tmp_path, acknowledged[-1] if acknowledged else 0)


def test_failpoints_refuse_what_they_do_not_know() -> None:
    for spec in ("a", "a=", "a=explode", "a=raise:Nothing", "a=sleep:x", "a=crash@z", "=crash"):
        with pytest.raises(ConfigError):
            failpoints.parse(spec)
    with failpoints.switched("x=raise"), pytest.raises(StoreUnavailable):
        failpoints.failpoint("x")
