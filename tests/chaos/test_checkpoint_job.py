"""Workers and launchers of real jobs are killed, fifty times each at random moments: the newest
checkpoint that was acknowledged loads and is bit for bit what the job had computed for that step,
and a job begins from nothing else. Part of ``make chaos-checkpoint``.

*Acknowledged* is a checkpoint whose marker is written. What the job had computed it writes down
itself, step by step (``digests.py``); so a training that went another way would be seen as well.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft import checkpoint
from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.store import open_store
from tests.chaos import digests
from tests.chaos.tally import RUNS, Tally, repeated
from tests.integration.jobs import FAST_ETCD, Launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.paddle,
    pytest.mark.etcd,
    pytest.mark.timeout(1500),
]

KEPT = 20
"""More than are committed while the newest one is read."""
EVERY = 3


class Job:
    """Launchers one after the other on one store, each told by its number."""

    def __init__(self, place: Path, tally: Tally, choose: random.Random, *flags: str) -> None:
        self.url = str(place / "store")
        self.record = place / "record"
        self.acknowledged: set[int] = set()
        self.launched = 0
        self._place = place
        self._tally = tally
        self._flags = flags
        self.choose = choose

    def start(self) -> Launcher:
        self.launched += 1
        script = (str(Path(digests.__file__)), "--record", str(self.record))
        flags = ("--nproc_per_node", "2", "--checkpoint", self.url, "--quiet", *self._flags)
        often = ("--checkpoint_every", str(EVERY), "--max_restart", "100000")
        environ = FAST_ETCD | {"PADDLE_FT_CHECKPOINT__KEEP_LAST": str(KEPT)}
        place = self._place / f"launcher-{self.launched}"
        return Launcher(place, (*flags, *often, *script), environ)

    def computed(self, launcher: Launcher) -> dict[int, set[str]]:
        """Digests by step; each step has come to one state, however often it was done."""
        found = digests.written(self.record)
        twofold = {step for step, told in found.items() if len(told) > 1}
        assert not twofold, f"steps {sorted(twofold)} came to different states\n{launcher.output}"
        return found

    def markers(self) -> list[int]:
        """Steps of what is acknowledged by now, the newest first."""
        found = [ref.step for ref in commit.list_commits(open_store(self.url))]
        self.acknowledged.update(found)
        self._tally.saves = len(self.acknowledged)
        return found

    def newest(self) -> int:
        return max(self.markers(), default=0)

    def check(self, launcher: Launcher, before: int) -> int:
        """What was acknowledged ``before`` is still there, or something newer; gives the newest."""
        newest = self.newest()
        assert newest >= before, launcher.output
        if newest:
            arrays = checkpoint.load(self.url, newest, names="*")
            (digest,) = self.computed(launcher)[newest]
            assert digests.digest_of(arrays) == digest, f"step {newest}\n{launcher.output}"
            self._tally.loads += 1
        return newest


def steps(record: Path) -> dict[str, int]:
    """How many lines each process has written."""
    return {path.name: path.read_bytes().count(b"\n") for path in record.glob("*-*")}


def wait(launcher: Launcher, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert launcher.process.poll() is None, launcher.output
        assert time.monotonic() < deadline, launcher.output
        time.sleep(0.01)


def both_step(launcher: Launcher, job: Job, more: int) -> None:
    """Returns when both workers of now have made ``more`` steps, each from now on."""
    first = steps(job.record)

    def stepped() -> bool:
        names = [f"-{pid}" for pid in launcher.workers().values()]
        now = steps(job.record)
        made = {n: max(0, *(c - first.get(f, 0) for f, c in now.items() if f.endswith(n)), 0)
                for n in names}  # fmt: skip
        return len(made) == 2 and min(made.values()) >= more

    wait(launcher, stepped)


@pytest.fixture
def launched() -> Iterator[list[Launcher]]:
    launchers: list[Launcher] = []
    yield launchers
    for launcher in launchers:
        launcher.close()


def restored(launcher: Launcher) -> list[int]:
    """Steps of the checkpoints that workers of this launcher were given."""
    return [int(n) for n in re.findall(r"restored step (\d+):", launcher.output)]


def test_workers_are_killed(tmp_path: Path, launched: list[Launcher]) -> None:
    """One of two, or both at once: then the job begins from the newest checkpoint."""
    with repeated("SIGKILL of worker") as (tally, choose):
        job = Job(tmp_path, tally, choose, "--spares", "1")
        launcher = job.start()
        launched.append(launcher)
        while tally.runs < RUNS:
            both_step(launcher, job, 3)
            time.sleep(choose.uniform(0, 0.3))
            before = job.newest()
            victims = choose.sample((0, 1), 2 if tally.runs % 3 == 2 else 1)
            for rank in victims:
                launcher.kill_worker(rank)
            job.check(launcher, before)
            tally.runs += 1
        both_step(launcher, job, 3)
        job.check(launcher, job.newest())
        assert len(restored(launcher)) > RUNS // 10, launcher.output
        assert set(restored(launcher)) <= job.acknowledged, launcher.output


def test_launchers_are_killed(tmp_path: Path, launched: list[Launcher]) -> None:
    """With all its workers and its private etcd; another one goes on with what the store holds."""
    with repeated("SIGKILL of agent (launcher with its workers)") as (tally, choose):
        job = Job(tmp_path, tally, choose)
        newest = 0
        while tally.runs < RUNS:
            launcher = job.start()
            launched.append(launcher)
            both_step(launcher, job, 1)
            time.sleep(choose.uniform(0, 0.8))
            begun = restored(launcher)
            assert begun == ([newest] if newest else []), launcher.output
            before = job.newest()
            launcher.send(signal.SIGKILL)
            launcher.wait()
            newest = job.check(launcher, before)
            tally.runs += 1


def test_the_checker_sees_another_state_and_a_lost_one(
    tmp_path: Path, launched: list[Launcher]
) -> None:
    job = Job(tmp_path, Tally("none"), random.Random(0))
    launcher = job.start()
    launched.append(launcher)
    wait(launcher, lambda: job.newest() > 0)
    launcher.send(signal.SIGKILL)
    launcher.wait()
    newest = job.check(launcher, job.newest())
    with pytest.raises(AssertionError):
        job.check(launcher, newest + 1)
    (path,) = job.record.glob("0-*")
    path.write_text(f"{newest} {'0' * 64}\n")
    with pytest.raises(AssertionError):
        job.check(launcher, newest)
