"""``reproducible`` under real launchers that come and go: the weights are those of a fixed run."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.coordination.embedded import EmbeddedEtcd
from tests.integration.jobs import (
    FAST_ETCD,
    TINY,
    Launcher,
    final,
    steps_done,
    used_samples,
    wait_until,
)

pytestmark = [pytest.mark.paddle, pytest.mark.etcd, pytest.mark.timeout(400)]

SAMPLES, EPOCHS = 100, 2
STEPS = EPOCHS * 13


@pytest.fixture
def etcd() -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd() as server:
        yield server


def script(record: Path, delay: float) -> tuple[str, ...]:
    shards = ("--reproducible", "6", "--epochs", str(EPOCHS))
    return str(TINY), "--record", str(record), "--delay", str(delay), *shards


class Job:
    """Launchers of one rank each that belong together."""

    def __init__(self, directory: Path, etcd: EmbeddedEtcd, nodes: str, delay: float) -> None:
        self.record = directory / "record"
        self._directory = directory
        self._flags = ("--etcd", etcd.endpoint, "--nnodes", nodes, "--job_id", "exact")
        self._flags += ("--checkpoint", str(directory / "store"), "--checkpoint_every", "3")
        self._script = script(self.record, delay)
        self.launchers: list[Launcher] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            directory = self._directory / f"launcher-{len(self.launchers)}"
            self.launchers.append(Launcher(directory, (*self._flags, *self._script), FAST_ETCD))

    def output(self) -> str:
        return "".join(launcher.output for launcher in self.launchers)

    def await_world(self, ranks: int, after: int) -> None:
        """Until ``after`` steps were tried and so many ranks are at it."""

        def is_there() -> bool:
            worlds = re.findall(r"generation (\d+): (\d) rank", self.output())
            assert all(one.process.poll() is None for one in self.launchers), self.output()
            newest = max(((int(g), int(w)) for g, w in worlds), default=(0, 0))
            return newest[1] == ranks and steps_done(self.record) >= after

        try:
            wait_until(is_there, 120)
        except AssertionError as error:
            raise AssertionError(f"{ranks} ranks after step {after}: {self.output()}") from error


def run_through(job: Job, changes: list[int]) -> str:
    """What the launchers have said when the world has had each of these sizes."""
    try:
        job.start(changes[0])
        for before, now in itertools.pairwise(changes):
            job.await_world(before, steps_done(job.record) + 2)
            for launcher in job.launchers[: max(0, before - now)]:
                launcher.send(signal.SIGKILL)
                launcher.wait()
                job.launchers.remove(launcher)
            job.start(max(0, now - before))
        job.await_world(changes[-1], 0)
        for launcher in job.launchers:
            assert launcher.wait() == 0, launcher.output
        return job.output()
    finally:
        for launcher in job.launchers:
            launcher.close()


@pytest.mark.parametrize(
    ("nodes", "changes", "delay"),
    [("1:2", [2, 1], 0.05), ("2:4", [4, 3, 2, 4], 0.4)],
    ids=["2, 1", "4, 3, 2, 4"],
)
@pytest.mark.slow
def test_the_weights_are_those_of_a_fixed_run(
    tmp_path: Path, etcd: EmbeddedEtcd, nodes: str, changes: list[int], delay: float
) -> None:
    fixed = Launcher(tmp_path / "fixed", script(tmp_path / "fixed-record", 0.0))
    try:
        assert fixed.wait() == 0, fixed.output
    finally:
        fixed.close()
    job = Job(tmp_path, etcd, nodes, delay)
    output = run_through(job, changes)
    assert "a lost worker means a restart" not in output
    told, alone = final(output), final(fixed.output)
    assert (told["world"], alone["world"]) == (str(changes[-1]), "1")
    assert told["step"] == alone["step"] == str(STEPS)
    assert told["weights"] == alone["weights"], output
    used = used_samples(job.record, STEPS)
    assert sorted(used) == sorted([*range(SAMPLES)] * EPOCHS)
