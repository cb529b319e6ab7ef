"""A worker that is stopped is named, written down and replaced; the result is the same (A6)."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.jobs import FAST_ETCD, TINY, Launcher, final, steps_done, wait_until

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


def hangs(launcher: Launcher) -> list[dict[str, object]]:
    lines = (launcher.log_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "hung"]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stopped_worker_is_named_and_replaced_and_the_weights_are_the_same(
    run: Callable[..., Launcher], tmp_path: Path, world: int
) -> None:
    launcher = run("job", world, delay=0.06)
    record = tmp_path / "record-job"
    wait_until(lambda: steps_done(record) >= 14)
    culprit = world - 1
    pid = launcher.kill_worker(culprit, signal.SIGSTOP)
    assert launcher.wait() == 0, launcher.output
    told = final(launcher.output)
    assert (told["step"], told["restarts"]) == (str(STEPS), "1"), launcher.output
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

    undisturbed = run("undisturbed", world)
    assert undisturbed.wait() == 0, undisturbed.output
    assert final(undisturbed.output)["weights"] == told["weights"]
    assert not hangs(undisturbed) and not (undisturbed.log_dir / "flight").exists()
