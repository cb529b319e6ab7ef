"""A worker that is stopped is named, written down and replaced; the result is the same (A6)."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.coordination.embedded import EmbeddedEtcd
from tests.integration.jobs import (
    FAST_ETCD,
    SCRIPTS,
    TINY,
    Launcher,
    final,
    steps_done,
    undisturbed_run,
    wait_until,
)

pytestmark = [pytest.mark.paddle, pytest.mark.etcd, pytest.mark.timeout(240)]

SAMPLES, EPOCHS, BATCH = 100, 3, 8
STEPS = EPOCHS * -(-SAMPLES // BATCH)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """``run(name, world, delay=…)`` starts a launcher that runs the tiny training."""
    launchers: list[Launcher] = []

    def run(name: str, world: int, *flags: str, delay: float = 0.0) -> Launcher:
        script = (str(TINY), "--record", str(tmp_path / f"record-{name}"), "--delay", str(delay))
        arguments = ("--nproc_per_node", str(world), *flags, *script)
        launchers.append(Launcher(tmp_path / name, arguments, FAST_ETCD))
        return launchers[-1]

    yield run
    for launcher in launchers:
        launcher.close()


def told(launcher: Launcher, kind: str) -> list[dict[str, Any]]:
    """What the launcher wrote down of this kind."""
    lines = (launcher.log_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def hangs(launcher: Launcher) -> list[dict[str, Any]]:
    return told(launcher, "hung")


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stopped_worker_is_named_and_replaced_and_the_weights_are_the_same(
    run: Callable[..., Launcher],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    world: int,
) -> None:
    launcher = run("job", world, delay=0.06)
    record = tmp_path / "record-job"
    wait_until(lambda: steps_done(record) >= 14)
    culprit = world - 1
    pid = launcher.kill_worker(culprit, signal.SIGSTOP)
    assert launcher.wait() == 0, launcher.output
    result = final(launcher.output)
    assert (result["step"], result["restarts"]) == (str(STEPS), "1"), launcher.output
    (hang,) = hangs(launcher)
    assert (hang["rank"], hang["pid"]) == (culprit, pid)
    assert f"rank {culprit} was killed by SIGKILL (it " in launcher.output

    (flight,) = (launcher.log_dir / "flight").iterdir()
    whole = json.loads((flight / "flight.json").read_text())
    assert [v["rank"] for v in whole["verdicts"]] == [culprit]
    assert {r["row"]["rank"] for r in whole["ranks"]} == set(range(world))
    stopped = whole["ranks"][culprit]
    assert "stopped" in stopped["kernel"]["State"] and stopped["calls"]
    for rank in range(world):
        stacks = (flight / f"rank{rank}.stacks.txt").read_text()
        assert "tiny.py" in stacks or "session.py" in stacks, stacks
    assert f"rank {culprit}: hung" in (flight / "summary.txt").read_text()

    assert result["weights"] == undisturbed_run(tmp_path_factory, world, STEPS)


@pytest.mark.slow
def test_a_hang_on_another_node_is_named_there_and_ended(tmp_path: Path) -> None:
    """The script of rank 1 waits for something else; that the other one waits for it, its agent
    knows from the other node alone."""
    script = (str(SCRIPTS / "odd_rank.py"), "--hang-at", "30", "--mark", str(tmp_path / "mark"))
    with EmbeddedEtcd() as etcd:
        shared = ("--etcd", etcd.endpoint, "--job_id", "j", "--nnodes", "2", "--checkpoint")
        shared = (*shared, str(tmp_path / "store"))
        nodes = []
        try:
            for name in "ab":
                nodes.append(
                    Launcher(tmp_path / name, (*shared, "--node", name, *script), FAST_ETCD)
                )
            for node in nodes:
                assert node.wait() == 0, node.output
        finally:
            for node in nodes:
                node.close()
    output = "".join(node.output for node in nodes)
    assert "final step=60 restarts=1" in output
    (hang,) = hangs(nodes[0]) + hangs(nodes[1])
    assert hang["rank"] == 1 and "computes" in hang["reason"]
    (flight,) = [*tmp_path.glob("?/log/flight/*")]
    assert "waits_for_something_else" in (flight / "rank1.stacks.txt").read_text()


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    """Not how soon, which the other programs of the machine have a say in: see the properties."""
    script = (str(SCRIPTS / "odd_rank.py"), "--slower", "1.6", "--step-s", "0.1", "--steps", "90")
    launcher = Launcher(tmp_path / "slow", ("--nproc_per_node", "2", *script), FAST_ETCD)
    try:
        assert launcher.wait() == 0, launcher.output
    finally:
        launcher.close()
    paces = [event for event in told(launcher, "pace") if event["slower"]]
    assert {event["rank"] for event in paces} == {1}, launcher.output
    assert 0.2 < paces[0]["slower"] < 1.0
    assert "rank 1 is slow" in launcher.output
    assert not hangs(launcher)
