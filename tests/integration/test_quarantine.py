"""A node whose workers hang again and again gets no more work, until a person lifts that."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import schema
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from tests.integration.jobs import (
    FAST_ETCD,
    TINY,
    Launcher,
    final,
    steps_done,
    used_samples,
    wait_until,
)

pytestmark = [
    pytest.mark.paddle, pytest.mark.etcd, pytest.mark.slow, pytest.mark.timeout(300),
]  # fmt: skip

SAMPLES, EPOCHS, BATCH = 96, 40, 8
STEPS = EPOCHS * SAMPLES // BATCH
ENVIRON = {**FAST_ETCD, "PADDLE_FT_HEALTH__QUARANTINE_AFTER": "2"}


@dataclass
class Job:
    """Three launchers, a, b and c, of which two are enough."""

    directory: Path
    etcd: str
    coordinator: EtcdCoordinator
    launchers: dict[str, Launcher]

    @property
    def record(self) -> Path:
        return self.directory / "record"

    def state(self) -> schema.JobState:
        keys = schema.Keys("j")
        return schema.parse(keys, self.coordinator.read(keys.prefix).kvs)

    def members(self) -> set[str]:
        generation = self.state().generation
        return {m.node for m in generation.value.members} if generation else set()

    def leader(self) -> str:
        leader = self.state().leader
        return leader.value.partition(".")[0] if leader else ""

    def stop_worker(self, node: str) -> None:
        """Stops the worker of ``node`` and waits until it was replaced and all go on."""
        launcher = self.launchers[node]
        ((rank, pid),) = launcher.workers().items()
        launcher.kill_worker(rank, signal.SIGSTOP)
        wait_until(lambda: pid not in launcher.workers().values())
        self.go_on()

    def go_on(self, steps: int = 12) -> None:
        """Waits until the bound of a hang is learnt by whoever has come last."""
        wanted = steps_done(self.record) + steps
        wait_until(lambda: steps_done(self.record) >= wanted)

    def told(self, *arguments: str) -> str:
        shared = ["--etcd", self.etcd, "--job-id", "j", "--log-dir", str(self.directory)]
        done = CliRunner().invoke(app, ["health", *shared, *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    launchers: dict[str, Launcher] = {}
    with EmbeddedEtcd() as etcd:
        coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,)))
        shared = ("--etcd", etcd.endpoint, "--job_id", "j", "--nnodes", "2:3", "--checkpoint")
        shared = (*shared, str(tmp_path / "store"), "--max_restart", "20")
        script = (str(TINY), "--record", str(tmp_path / "record"), "--delay", "0.08")
        script = (*script, "--samples", str(SAMPLES), "--epochs", str(EPOCHS))
        try:
            for name in "abc":
                arguments = (*shared, "--node", name, *script)
                launchers[name] = Launcher(tmp_path / name, arguments, ENVIRON)
            yield Job(tmp_path, etcd.endpoint, coordinator, launchers)
        finally:
            for launcher in launchers.values():
                launcher.close()
            coordinator.close()


def events(launcher: Launcher, kind: str) -> list[dict[str, Any]]:
    lines = (launcher.log_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("leads", [False, True], ids=["another node", "the leader's node"])
def test_it_is_left_out_and_taken_again_when_that_is_lifted(job: Job, leads: bool) -> None:
    wait_until(lambda: job.members() == {"a", "b", "c"} and steps_done(job.record) >= 8)
    leader = job.leader()
    bad = leader if leads else min({"a", "b", "c"} - {leader})
    others = {"a", "b", "c"} - {bad}
    job.go_on()
    job.stop_worker(bad)
    assert not job.state().quarantine
    job.stop_worker(bad)

    wait_until(lambda: job.state().quarantine == {bad} and job.members() == others)
    assert f"in quarantine: {bad}: 2 of its workers hung within 60 min" in job.told()
    job.go_on(30)
    assert job.members() == others and job.state().quarantine == {bad}
    assert job.leader() == leader, "the launcher that leads is well, whatever its workers do"
    assert not job.launchers[bad].workers()

    assert "may take part" in job.told("--lift", bad)
    wait_until(lambda: job.members() == {"a", "b", "c"})
    job.go_on(20)
    assert not job.state().quarantine, "what is forgiven is not held against it again"

    for launcher in job.launchers.values():
        assert launcher.wait() == 0, launcher.output
    output = "".join(launcher.output for launcher in job.launchers.values())
    assert final(output)["step"] == str(STEPS)
    used = Counter(used_samples(job.record, STEPS))
    assert set(used) == set(range(SAMPLES)) and set(used.values()) == {EPOCHS}
    barred = [e["nodes"] for e in events(job.launchers[leader], "quarantine")]
    assert barred == [[bad], []]
    assert any(
        f"node {bad} is in quarantine" in e["reason"]
        for e in events(job.launchers[leader], "generation")
    )
