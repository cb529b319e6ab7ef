"""Local durability: acknowledged on the local disk, in the store later, never lost (A5, B4)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paddle_ft import failpoints
from paddle_ft.checkpoint import layout, uploads
from paddle_ft.checkpoint.collect import collect
from paddle_ft.checkpoint.store import open_store
from paddle_ft.config import CheckpointConfig, load
from paddle_ft.errors import CheckpointDamaged, ConfigError, StoreError, StoreFull
from tests.unit import local_job
from tests.unit.local_job import Launcher, away, come_back, in_store, leave, refs, wait_until

ROOT = Path(__file__).parents[2]
Start = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Launcher] = []

    def begin(**settings: Any) -> Launcher:
        running.append(Launcher(tmp_path, **settings))
        return running[-1]

    yield begin
    come_back(tmp_path)
    for launcher in running:
        launcher.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "RETRY_INTERVAL_S", 0.05)


def test_it_needs_a_cache() -> None:
    with pytest.raises(ConfigError, match="durable = local needs .*--cache"):
        load({"checkpoint.durable": "local"}, {})


def test_a_commit_needs_no_store(start: Start, tmp_path: Path) -> None:
    job = start()
    kept = [job.save(step) for step in (1, 2)]
    with away(tmp_path):
        kept += [job.save(step) for step in (3, 4, 5)]
        assert all(job.holds(ref) for ref in kept[2:])
        assert job.waiting()
    assert job.drained()
    found = in_store(tmp_path)
    assert found[5]
    assert all(found.values())


def test_markers_come_in_the_order_of_commits(start: Start, tmp_path: Path) -> None:
    job = start()
    job.save(1)
    assert job.drained()
    leave(tmp_path)
    for step in (2, 3, 4):
        job.save(step)
    seen: list[list[int]] = []
    store = open_store(str(tmp_path / "store"))
    with failpoints.switched(
        upload__settled=lambda: seen.append(sorted(ref.step for ref in refs(store)))
    ):
        come_back(tmp_path)
        assert job.drained()
    assert seen == [[1, 2]]
    assert max(in_store(tmp_path)) == 4


def test_a_launcher_goes_on_with_what_another_left(start: Start, tmp_path: Path) -> None:
    first = start()
    first.save(1)
    assert first.drained()
    leave(tmp_path)
    first.save(2)
    first.close()
    second = start()  # the store is still away
    assert second.head is not None
    assert second.head.newest.step == 2
    assert second.room._owner == first.room._owner
    assert second.holds(second.head.newest)
    second.save(3)
    come_back(tmp_path)
    assert second.drained()
    assert in_store(tmp_path)[3]
    second.room.release()
    second.close()
    third = start()
    assert third.head is not None
    assert third.head.newest.step == 3
    assert third.room._owner != first.room._owner


def test_another_file_system_in_its_place_gets_nothing_for_good(
    start: Start, tmp_path: Path
) -> None:
    job = start()
    job.save(1)
    assert job.drained()
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with failpoints.recorded() as names:
        job.save(2)
        wait_until(lambda: names.count("upload.stored") >= 2)
    assert job.uploads.drain(0, print)
    job.uploads._closed.set()
    job.uploads._thread.join()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "unmounted").rename(tmp_path / "store")
    job.close()
    assert start().drained()
    assert in_store(tmp_path)[2]


def test_a_store_that_was_never_reached_is_an_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file in the way")
    with pytest.raises(StoreError):
        start()
    (tmp_path / "store").unlink()
    start()  # what it held is free again


def test_the_bound_holds_and_the_store_takes_the_rest(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bound = 2**20
    job = start(cache_bytes_max=bound)
    size = 300_000
    job.save(1, size)
    assert job.drained()
    with failpoints.switched(upload__before=lambda: leave(tmp_path)):
        for step in range(2, 20):
            try:
                job.save(step, size)
            except StoreError:  # as long as the store is away, the next one waits
                break
        else:
            pytest.fail("the bound did not hold")
    assert step > 3
    used = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert used <= bound
    assert "written to the store at once" in caplog.text
    come_back(tmp_path)
    assert job.drained()
    job.save(step, size)
    assert job.drained()
    [newest, *_] = refs(open_store(str(tmp_path / "store")))
    assert newest.step == step


def test_a_cache_that_fails_makes_commits_wait_for_the_store(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start()

    def refuse(name: str, data: object) -> None:
        raise StoreFull(f"{name} does not fit.")

    monkeypatch.setattr(job.uploads.spool, "keep", refuse)
    for step in (1, 2):
        job.save(step)
        assert in_store(tmp_path)[step]
    with away(tmp_path), pytest.raises(StoreError):
        job.save(3)


def test_copies_give_way_to_what_waits_and_come_after_it(start: Start, tmp_path: Path) -> None:
    job = start(cache_bytes_max=2**20)
    for step in range(1, 8):
        job.save(step, 300_000)
        assert job.drained()
    copies = list((tmp_path / "cache" / "data").rglob("n0*"))
    assert copies  # what was sent is read from here
    assert sum(p.stat().st_size for p in copies) <= 2**20


def test_garbage_is_collected_behind_the_backlog(start: Start, tmp_path: Path) -> None:
    job = start()
    for step in range(1, 15):
        job.save(step)
        assert job.drained()
    data = [p.parent.name for p in (tmp_path / "store" / "data").rglob("n0*")]
    assert len(refs(open_store(str(tmp_path / "store")))) <= 4
    assert len(data) < 12


def test_a_living_launcher_keeps_its_spool(start: Start, tmp_path: Path) -> None:
    etcd: dict[str, str] = {}
    first = start(nodes=2, etcd=etcd)
    second = start(nodes=2, etcd=etcd)
    assert first.uploads.spool.root != second.uploads.spool.root
    with failpoints.switched("upload.before=raise"):
        first.part(1)
        first.close()
    assert first.waiting()
    wait_until(lambda: list((tmp_path / "store" / "data").rglob("n0*")))
    assert second.drained()
    assert not first.waiting()


def test_a_failed_attempt_takes_no_room(start: Start, tmp_path: Path) -> None:
    job = start(nodes=2)
    with away(tmp_path), pytest.raises(StoreError):
        job.part(1)
    assert job.waiting() == []
    with failpoints.switched("part.objects=raise:StoreFull"), pytest.raises(StoreError):
        job.part(1)
    assert job.waiting() == []
    job.save(2)
    assert job.drained()
    assert in_store(tmp_path)[2]


# ---------------------------------------------------------------- several nodes


def two(start: Start) -> tuple[Launcher, Launcher]:
    etcd: dict[str, str] = {}
    return start(cache="a", nodes=2, etcd=etcd), start(cache="b", nodes=2, etcd=etcd)


def test_a_marker_waits_for_the_blocks_of_the_other_node(start: Start, tmp_path: Path) -> None:
    one, other = two(start)
    other.uploads._closed.set()  # it does not come to its uploads
    other.uploads._thread.join()
    ref = one.commit(1, one.part(1, 0, 2), other.part(1, 1, 2))
    wait_until(lambda: one.waiting() == [layout.commit_name(ref.manifest)])
    assert in_store(tmp_path) == {}
    with pytest.raises(CheckpointDamaged, match="missing"):
        one.holds(ref)
    assert one.room.coming(ref)
    other.close()
    again = start(cache="b", nodes=2, etcd={})
    assert again.drained()
    assert one.drained()
    assert in_store(tmp_path) == {1: True}
    assert not one.room.coming(ref)
    assert one.holds(ref)


def test_blocks_that_do_not_come_are_given_up(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two(start)
    leave_it = other.uploads
    leave_it._closed.set()
    leave_it._thread.join()
    ref = one.commit(1, one.part(1, 0, 2), other.part(1, 1, 2))
    assert one.room.coming(ref)
    monkeypatch.setattr(uploads, "COMING_S", 0.0)
    wait_until(lambda: not one.room.coming(ref))


def test_the_lineage_keeps_what_the_store_has(start: Start, tmp_path: Path) -> None:
    one, other = two(start)
    settled = one.commit(1, one.part(1, 0, 2), other.part(1, 1, 2))
    assert one.drained()
    other.uploads._closed.set()
    other.uploads._thread.join()
    for step in range(2, 9):
        other.head = one.head
        one.commit(step, one.part(step, 0, 2), other.part(step, 1, 2))
    assert one.head is not None
    assert len(one.head.lineage) > 1
    assert settled in one.head.lineage
    assert in_store(tmp_path) == {1: True}


def test_a_collector_leaves_what_waits_elsewhere(start: Start, tmp_path: Path) -> None:
    one, other = two(start)
    other.uploads._closed.set()
    other.uploads._thread.join()
    one.commit(1, one.part(1, 0, 2), other.part(1, 1, 2))
    wait_until(lambda: len(one.waiting()) == 1)
    plain = open_store(str(tmp_path / "store"))
    assert one.head is not None
    before = {i.name for i in plain.find("data/")}
    plain.delete([one.head.newest.manifest])
    with pytest.raises(CheckpointDamaged):
        collect(plain, one.head, one.room._owner)
    assert {i.name for i in plain.find("data/")} == before


# ---------------------------------------------------------------- crashes at any step

NAMES = ["spool.kept", "upload.before", "upload.stored", "upload.complete", "upload.settled"]


def run_steps(tmp_path: Path, spec: str) -> tuple[int, list[int]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.local_job", str(tmp_path), "6"],
        env=os.environ | {failpoints.VARIABLE: spec},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    lines = done.stdout.split("\n")
    return done.returncode, [int(line.split()[1]) for line in lines if line.startswith("ack ")]


def test_every_step_has_a_failpoint(start: Start) -> None:
    with failpoints.recorded() as names:
        job = start()
        job.save(1)
        assert job.drained()
        wait_until(lambda: "collect.before" in names)
    assert set(NAMES) <= set(names)


@pytest.mark.parametrize(
    ("name", "passing"), [*((name, 4) for name in NAMES), ("upload.settled", 1)]
)
def test_a_crash_at_any_step_loses_nothing(tmp_path: Path, name: str, passing: int) -> None:
    code, acknowledged = run_steps(tmp_path, f"{name}=crash@{passing}")
    assert code == failpoints.EXIT_CRASHED
    code, more = run_steps(tmp_path, "")
    assert code == 0
    assert not acknowledged or more[0] >= acknowledged[-1] + 1
    found = in_store(tmp_path)
    assert all(found.values())
    assert max(found) == more[-1]


@pytest.mark.parametrize("name", ["upload.before", "upload.stored", "upload.complete"])
def test_an_error_of_the_store_is_tried_again(start: Start, tmp_path: Path, name: str) -> None:
    job = start()
    with failpoints.switched(f"{name}=raise:StoreFull@2"):
        for step in (1, 2, 3):
            job.save(step)
        assert job.drained()
    assert in_store(tmp_path)[3]


def test_a_library_use_is_durable_in_the_store(tmp_path: Path) -> None:
    config = CheckpointConfig(cache=str(tmp_path / "cache"), durable="local")
    store = open_store(str(tmp_path / "store"), config)
    name = f"data/{layout.write_prefix('o', 1, 1, '0f')}n.0"
    store.put(name, b"x")
    assert (tmp_path / "store" / name).read_bytes() == b"x"
    assert local_job.KEEP == 2
