"""Every fault of the store, fifty times at random moments: what was acknowledged loads bit for bit,
what was not is never loaded. ``make chaos-checkpoint``; docs/chaos-checkpoint.md is from a run.

A *commit* is a head that the register (in place of etcd) has taken; it is *acknowledged* when its
marker is written, too. What was under way when a process died may be there as a whole or not at
all; everything else that is there must have been acknowledged.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.agent.tether import tethered
from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, StoreError
from paddle_ft.types import CommitRef
from tests.chaos.checkpoint_leader import Leader, holds, state_of
from tests.chaos.tally import RUNS, Tally, repeated
from tests.contract.store_fixtures import Bucket, served_bucket
from tests.integration.fault_proxy import FaultProxy
from tests.integration.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Writer:
    """The leader as a process."""

    def __init__(self, store: Path, register: Path) -> None:
        argv = [sys.executable, "-m", "tests.chaos.checkpoint_leader"]
        argv += [str(store), str(register), "{}"]
        self._process = subprocess.Popen(tethered(argv), stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.append(line.strip())

    def newest(self, word: str) -> int:
        """The step of the newest line that begins with ``word``."""
        steps = [int(line.split()[1]) for line in [*self._lines] if line.startswith(f"{word} ")]
        return max(steps, default=0)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self._process.poll() is None, self._lines[-5:]
            assert time.monotonic() < deadline, self._lines[-5:]
            time.sleep(0.005)

    def ready(self) -> None:
        self.wait(lambda: "ready" in self._lines)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, *, kill: bool = True) -> None:
        if kill:
            self._process.kill()
        self._process.wait(timeout=60)
        self._reader.join()
        assert self._process.stdout
        self._process.stdout.close()


# ---------------------------------------------------------------- processes that are killed


def test_the_writer_is_killed(tmp_path: Path) -> None:
    with repeated("SIGKILL of the writing process") as (tally, choose):
        acknowledged = 0
        store = open_store(str(tmp_path / "store"))
        for _ in range(RUNS):
            writer = Writer(tmp_path / "store", tmp_path / "register")
            try:
                writer.ready()
                time.sleep(choose.uniform(0, 0.25))
            finally:
                writer.end()
            acknowledged = max(acknowledged, writer.newest("ack"))
            tally.check(store, acknowledged, writer.newest("begin"))
            tally.runs += 1
        tally.saves = acknowledged


@pytest.mark.s3
def test_the_server_of_the_store_is_killed(tmp_path: Path) -> None:
    with (
        repeated("SIGKILL of the store's server") as (tally, choose),
        S3Server() as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        config = server.config(attempts=12, connect_timeout_s=1.0, read_timeout_s=2.0)
        store = open_store(server.bucket("checkpoints") + "/a", config)
        leader = Leader(store, tmp_path / "register")
        stop, failures = threading.Event(), []

        def save() -> None:
            for step in itertools.count(1):
                if stop.is_set():
                    return
                try:
                    assert leader.save(step)
                except StoreError:
                    tally.refused += 1
                except BaseException as error:  # noqa: BLE001  told by the test
                    failures.append(error)
                    return

        saver = threading.Thread(target=save)
        saver.start()
        try:
            for _ in range(RUNS):
                before = leader.step
                time.sleep(choose.uniform(0, 0.3))
                server.kill()
                server.start()
                _wait_until(lambda before=before: leader.step > before, failures)
                head = commit.newest_head(store)
                assert head
                assert head.newest.step >= before
                assert _holds_or_is_gone(store, head.newest)
                tally.loads += 1
                tally.runs += 1
        finally:
            stop.set()
            saver.join()
        assert not failures
        tally.check(store, leader.step, leader.step)
        tally.saves = leader.step


def _wait_until(condition: Callable[[], bool], failures: list[BaseException]) -> bool:
    deadline = time.monotonic() + 100
    while not condition():
        assert not failures, failures
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


def _holds_or_is_gone(store: Store, ref: CommitRef) -> bool:
    """While a writer goes on, retention may overtake who reads; then the head has moved on."""
    try:
        return holds(store, ref)
    except CheckpointDamaged:
        head = commit.newest_head(store)
        assert head
        return ref not in (head.newest, *head.lineage)


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk_of_4_mib(tmp_path: Path) -> Iterator[Path]:
    yield from _mounted(tmp_path / "small", ["-t", "tmpfs", "-o", "size=4m", "tmpfs"])


_ONCE = CheckpointConfig(attempts=1)
"""Or a fault would be over by the time the last attempt is made."""


def _mounted(place: Path, what: list[str]) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", *what, place], check=True, timeout=20)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=20)


def _fill(place: Path, leave: int) -> None:
    """Takes all space of ``place`` but ``leave`` bytes, or as near as it gets."""
    free = shutil.disk_usage(place).free
    with (place / "filler").open("wb") as stream, contextlib.suppress(OSError):
        os.posix_fallocate(stream.fileno(), 0, max(1, free - leave))


def _save_on_a_disk(
    tally: Tally, leader: Leader, store: Store, step: int, free: Callable[[], None]
) -> None:
    """One save that may be refused, by a StoreError alone; then ``free`` makes the disk good."""
    before = leader.step
    helper = threading.Timer(1.0, free)  # a marker is tried until it is taken
    helper.start()
    try:
        assert leader.save(step)
        tally.saves += 1
    except (StoreError, CheckpointDamaged) as error:
        tally.refused += 1
        tally.said.add(str(error))
        assert leader.step == before
    finally:
        helper.cancel()
        helper.join()
        free()
    tally.check(store, leader.step, leader.step)
    tally.runs += 1


@pytest.mark.root
def test_the_disk_of_the_store_is_full(disk_of_4_mib: Path, tmp_path: Path) -> None:
    with repeated("ENOSPC on the store") as (tally, choose):
        url = str(disk_of_4_mib / "store")
        store = open_store(url)
        leader = Leader(open_store(url, _ONCE), tmp_path / "register")
        assert leader.save(1)
        filler = disk_of_4_mib / "filler"
        for step in range(2, RUNS + 2):
            _fill(disk_of_4_mib, choose.randrange(0, 200_000))
            _save_on_a_disk(tally, leader, store, step, lambda: filler.unlink(missing_ok=True))
        assert tally.refused > RUNS // 10
        assert tally.saves > RUNS // 10


@pytest.mark.root
def test_the_disk_of_the_cache_is_full(disk_of_4_mib: Path, tmp_path: Path) -> None:
    with repeated("ENOSPC on the cache") as (tally, choose):
        url = str(tmp_path / "store")
        settings = {"cache": str(disk_of_4_mib / "cache"), "cache_bytes_max": 2**21}
        leader = Leader(open_store(url), tmp_path / "register", **settings)
        leader.store = store = open_store(url, leader.config)
        for step in range(1, RUNS + 1):
            _fill(disk_of_4_mib, choose.randrange(0, 200_000))
            assert leader.save(step)
            (disk_of_4_mib / "filler").unlink()
            tally.check(store, step, step)
            tally.check(open_store(url), step, step)
            tally.saves, tally.runs = step, tally.runs + 1


class Loop:
    """A block device on a file, which can lose its end and get it back."""

    _GET, _SET, _LIMIT_AT, _SIZE = 0x4C05, 0x4C04, 32, 232

    def __init__(self, file: Path) -> None:
        argv = ["losetup", "--find", "--show", str(file)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20)
        self.device = done.stdout.strip()

    def limit(self, nbytes: int) -> None:
        """What lies beyond answers with EIO; 0: nothing does."""
        with open(self.device, "rb") as stream:
            status = bytearray(self._SIZE)
            fcntl.ioctl(stream, self._GET, status)
            struct.pack_into("<Q", status, self._LIMIT_AT, nbytes)
            for _ in range(100):
                try:
                    fcntl.ioctl(stream, self._SET, status)
                    return
                except BlockingIOError:  # pages of it are in use
                    time.sleep(0.01)
        raise AssertionError(f"{self.device} does not take another size")

    def close(self) -> None:
        subprocess.run(["losetup", "--detach", self.device], check=True, timeout=20)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Loop]]:
    """An ext4 of 64 MiB, its inodes all in the first two."""
    file = tmp_path / "disk.img"
    with file.open("wb") as stream:
        stream.truncate(64 * 2**20)
    options = [
        "-q",
        "-F",
        "-b",
        "4096",
        "-O",
        "^has_journal",
        "-N",
        "4000",
        "-E",
        "lazy_itable_init=0",
    ]
    subprocess.run(["mkfs.ext4", *options, file], check=True, timeout=60)
    loop = Loop(file)
    try:
        for place in _mounted(tmp_path / "disk", ["-o", "errors=continue", loop.device]):
            yield place, loop
    finally:
        loop.close()


@pytest.mark.root
@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4")
def test_the_disk_fails(failing_disk: tuple[Path, Loop], tmp_path: Path) -> None:
    place, loop = failing_disk
    with repeated("EIO on the store") as (tally, choose):
        url = str(place / "store")
        store = open_store(url)
        leader = Leader(open_store(url, _ONCE), tmp_path / "register")
        assert leader.save(1)
        for step in range(2, RUNS + 2):
            loop.limit(choose.choice((300, 600, 1200, 2400, 4800, 9600, 12_000, 16_000)) * 4096)
            _save_on_a_disk(tally, leader, store, step, lambda: loop.limit(0))
        assert any("Input/output error" in sentence for sentence in tally.said), tally.said
        assert tally.saves > 0


# ---------------------------------------------------------------- a network that fails


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    yield from served_bucket()


@pytest.mark.s3
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("500", "S3 answers 500"),
        ("503", "S3 answers 503"),
        ("stall", "S3 is slow beyond the time-out"),
        ("half", "S3 sends half a body"),
        ("reset", "S3 resets the connection"),
        ("lost", "S3 does it, its answer is lost"),
        ("flip", "S3 sends an altered body"),
    ],
)
def test_the_network_fails(bucket: Bucket, tmp_path: Path, fault: str, name: str) -> None:
    with repeated(name) as (tally, choose), FaultProxy(bucket.server.endpoint) as proxy:
        url = f"{bucket.url}/{os.urandom(4).hex()}"
        config = bucket.server.config(endpoint_url=proxy.endpoint, read_timeout_s=0.5)
        through, direct = open_store(url, config), open_store(url, bucket.server.config())
        leader = Leader(through, tmp_path / "register")
        for step in range(1, RUNS + 1):
            before = len(proxy.requests)
            faults = [[""] * choose.randrange(8) + [fault] for _ in range(choose.randrange(1, 4))]
            proxy.faults[:] = list(itertools.chain.from_iterable(faults))
            try:
                assert leader.save(step)
                tally.saves += 1
            except (StoreError, CheckpointDamaged):
                tally.refused += 1
            assert len(proxy.requests) > before
            # What was altered on its way must not be taken for what is stored.
            with contextlib.suppress(CheckpointDamaged, StoreError):
                head = commit.newest_head(through)
                assert head is None or holds(through, head.newest)
            proxy.faults.clear()
            tally.check(direct, leader.step, leader.step)
            tally.runs += 1
        assert tally.saves > RUNS // 2


# ---------------------------------------------------------------- objects that are damaged


@pytest.mark.parametrize(
    ("damage", "name"), [("flip", "a byte of any object is altered"), ("delete", "any object goes")]
)
def test_an_object_is_damaged(tmp_path: Path, damage: str, name: str) -> None:
    with repeated(name) as (tally, choose):
        root = tmp_path / "store"
        leader = Leader(open_store(str(root)), tmp_path / "register")
        for step in range(1, 7):
            assert leader.save(step)
        tally.saves = 6
        store = leader.store
        whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        names = sorted(path for path in whole if whole[path])
        for number in range(max(RUNS, len(names))):
            path = names[number] if number < len(names) else choose.choice(names)
            content = bytearray(whole[path])
            if damage == "flip":
                content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
                path.write_bytes(content)
            else:
                path.unlink()
            loaded = _load_newest_intact(store, tally)
            if "/data/" not in str(path) and "/manifests/" not in str(path):
                assert loaded in (5, 6)  # its marker at most
            assert loaded >= 1 or "/data/" in str(path) or "store.json" in str(path)
            path.write_bytes(whole[path])
            assert _load_newest_intact(store, tally) == 6
            tally.runs += 1


def _load_newest_intact(store: Store, tally: Tally) -> int:
    """As a job does that begins: the newest that loads; its step, 0 if none does."""
    for ref in commit.list_commits(store):
        try:
            assert holds(store, ref), ref
        except CheckpointDamaged:
            tally.refused += 1
            continue
        tally.loads += 1
        return ref.step
    return 0


# ---------------------------------------------------------------- a leader that wakes up


def test_a_leader_wakes_up_after_its_successor_has_committed(tmp_path: Path) -> None:
    with repeated("a zombie leader wakes up") as (tally, choose):
        root, register = tmp_path / "store", tmp_path / "register"
        store = open_store(str(root))
        for _ in range(RUNS):
            zombie = Writer(root, register)
            try:
                zombie.ready()
                zombie.wait(lambda zombie=zombie: zombie.newest("begin") > 0)  # type: ignore[misc]
                time.sleep(choose.uniform(0, 0.2))
                zombie.signal(signal.SIGSTOP)
                successor = Leader(store, register)
                for _ in range(choose.randrange(1, 4)):
                    assert successor.save(successor.step + 1)
                    tally.saves += 1
                acknowledged = successor.step
                zombie.signal(signal.SIGCONT)
                if choose.random() < 0.5:  # both at once
                    assert successor.save(acknowledged + 1)
                    acknowledged += 1
                zombie.end(kill=False)  # it gives up after some attempts by itself
            finally:
                zombie.end()
            tally.refused += 1
            # Either its commit is refused, or what it builds upon is gone by then.
            assert max(zombie.newest("lost"), zombie.newest("failed")) > 0
            assert successor.register.read()[1] == successor.head
            tally.check(store, acknowledged, acknowledged)
            tally.runs += 1


# ---------------------------------------------------------------- the checker itself


def test_the_checker_sees_what_is_lost_wrong_or_made_up(tmp_path: Path) -> None:
    leader = Leader(open_store(str(tmp_path / "store")), tmp_path / "register")
    for step in (1, 2):
        assert leader.save(step)
    tally = Tally("none")
    tally.check(leader.store, 2, 2)
    for acknowledged, begun in ((3, 3), (1, 1)):  # lost; never acknowledged
        with pytest.raises(AssertionError):
            tally.check(leader.store, acknowledged, begun)
    with pytest.MonkeyPatch.context() as patch:  # other bytes under the same step
        patch.setattr("tests.chaos.checkpoint_leader.state_of", lambda step: state_of(step + 1))
        with pytest.raises(AssertionError):
            tally.check(leader.store, 2, 2)
