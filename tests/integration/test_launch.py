"""The main job with real parts: train, kill, go on; the result is the same (A1, A2, A7, A8)."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paddle_ft import cli
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from tests.integration.jobs import (
    FAST_ETCD,
    KNOWS_NOTHING,
    TINY,
    Launcher,
    final,
    lines,
    steps_done,
    undisturbed_run,
    used_samples,
    wait_until,
)

pytestmark = [pytest.mark.paddle, pytest.mark.etcd, pytest.mark.timeout(240)]

SAMPLES, EPOCHS, BATCH = 100, 3, 8
STEPS = EPOCHS * -(-SAMPLES // BATCH)

Start = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(name, *flags, delay=…)`` starts a launcher that runs the tiny training."""
    launchers: list[Launcher] = []

    def start(
        name: str,
        *flags: str,
        record: str = "record",
        delay: float = 0.0,
        script: Sequence[str] = (),
        lease_ttl_s: int = 2,
    ) -> Launcher:
        given = script or (str(TINY), "--record", str(tmp_path / record), "--delay", str(delay))
        environ = FAST_ETCD | {"PADDLE_FT_ETCD__LEASE_TTL_S": str(lease_ttl_s)}
        launcher = Launcher(tmp_path / name, (*flags, *given), environ)
        launchers.append(launcher)
        return launcher

    yield start
    for launcher in launchers:
        launcher.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run of two ranks in which nothing happened."""
    return undisturbed_run(tmp_path_factory, 2, STEPS)


@pytest.fixture
def etcd() -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd() as server:
        yield server


def exactly_once(record: Path) -> bool:
    used = used_samples(record, STEPS)
    per_epoch = -(-SAMPLES // BATCH)
    assert len(used) == EPOCHS * SAMPLES, f"{len(used)} samples in {EPOCHS} epochs"
    assert per_epoch * EPOCHS == STEPS
    return all(
        sorted(used[e * SAMPLES : (e + 1) * SAMPLES]) == list(range(SAMPLES)) for e in range(EPOCHS)
    )


def test_killed_workers_do_not_change_the_weights(
    start: Start, tmp_path: Path, undisturbed: str
) -> None:
    """Five workers are killed, each at a random moment of the training."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    launcher = start(
        "job",
        "--nproc_per_node",
        "2",
        "--checkpoint_every",
        "3",
        "--max_restart",
        "9",
        delay=0.06,
    )
    record = tmp_path / "record"
    killed: set[int] = set()
    for goal in sorted(chance.sample(range(2, STEPS - 2), 5)):
        wait_until(
            lambda goal=goal: (
                launcher.process.poll() is not None
                or (steps_done(record) >= goal and not killed & set(launcher.workers().values()))
            )
        )
        time.sleep(chance.random() * 0.06)
        if launcher.process.poll() is None:
            killed.add(launcher.kill_worker(chance.randrange(2)))
    assert launcher.wait() == 0, f"seed {seed}\n{launcher.output}"
    told = final(launcher.output)
    assert told["weights"] == undisturbed, f"seed {seed}\n{launcher.output}"
    assert int(told["restarts"]) >= 3, launcher.output
    assert re.search(r"has the state of step \d+ from rank", launcher.output)
    assert exactly_once(record)
    check_goodput(launcher, int(told["restarts"]))


def check_goodput(launcher: Launcher, restarts: int) -> None:
    """Every second is told, and all faults; while a rank is left, no step is done again."""
    run = CliRunner().invoke(cli.app, ["goodput", str(launcher.log_dir), "--json"])
    told = json.loads(run.output)
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_s"], rel=0.01)
    assert min(told["seconds"].values()) >= 0, told
    assert (told["steps"], told["ended"]) == (STEPS, True)
    assert 1 <= len(told["faults"]) <= restarts, told
    assert all(fault["over"] and fault["recovery_s"] > 0 for fault in told["faults"]), told
    assert told["seconds"]["recovery"] > 0 and told["seconds"]["startup"] > 0
    if launcher.output.count("has the state of step") == restarts:  # never were both ranks gone
        assert told["steps_redone"] <= 1, told  # a rank that dies may have been ahead by one
    assert re.search(r"goodput \d+\.\d % \(.*recovery ", launcher.output), launcher.output


def test_the_leaders_launcher_is_killed_and_another_takes_its_place(
    start: Start, tmp_path: Path, etcd: EmbeddedEtcd, undisturbed: str
) -> None:
    """Two launchers of one rank each; a third stands by as a spare and takes over the rank.

    The dead leader's lease would stand longer than this test may take.
    """
    ttl_s = 300
    flags = (
        "--etcd",
        etcd.endpoint,
        "--nnodes",
        "2",
        "--job_id",
        "pair",
        "--checkpoint",
        str(tmp_path / "store"),
        "--checkpoint_every",
        "3",
    )
    first = start("first", *flags, delay=0.25, lease_ttl_s=ttl_s)
    wait_until(lambda: first.workers() or "node" in first.output)
    second = start("second", *flags, delay=0.25, lease_ttl_s=ttl_s)
    wait_until(lambda: steps_done(tmp_path / "record") >= 4)
    spare = start("spare", *flags, delay=0.25, lease_ttl_s=ttl_s)
    wait_until(lambda: len(members(etcd, "pair")) == 3)
    leader, other = (first, second) if leads(etcd, "pair", first) else (second, first)
    leader.send(signal.SIGKILL)
    assert other.wait() == 0, other.output
    assert spare.wait() == 0, spare.output
    told = final(other.output + spare.output)
    assert told["weights"] == undisturbed
    assert told["world"] == "2"
    assert exactly_once(tmp_path / "record")


def test_every_sample_is_used_once_when_the_world_changes(
    start: Start, tmp_path: Path, etcd: EmbeddedEtcd
) -> None:
    """2 ranks, then 1 (a launcher is killed), then 2 (another joins)."""
    flags = (
        "--etcd",
        etcd.endpoint,
        "--nnodes",
        "1:2",
        "--job_id",
        "elastic",
        "--checkpoint",
        str(tmp_path / "store"),
        "--checkpoint_every",
        "3",
    )
    first, second = (start(name, *flags, delay=0.3) for name in ("first", "second"))
    record = tmp_path / "record"
    wait_until(lambda: steps_done(record) >= 5)
    second.send(signal.SIGKILL)
    wait_until(lambda: "1 rank on 1 node" in first.output)
    third = start("third", *flags, delay=0.3)
    assert first.wait() == 0, first.output
    assert third.wait() == 0, third.output
    assert final(first.output + third.output)["world"] == "2"
    worlds = re.findall(r"generation \d+: (\d) rank", first.output)
    changes = [now for before, now in zip(["0", *worlds], worlds, strict=False) if now != before]
    assert changes in (["1", "2", "1", "2"], ["2", "1", "2"]), first.output
    assert exactly_once(record)


def test_a_stop_saves_and_leaves_nothing(
    start: Start, tmp_path: Path, etcd: EmbeddedEtcd, undisturbed: str
) -> None:
    """The last step is saved, children and keys are gone, and the next run goes on from it; by
    SIGTERM, and then by Ctrl-C."""
    flags = (
        "--etcd",
        etcd.endpoint,
        "--nproc_per_node",
        "2",
        "--job_id",
        "stop",
        "--checkpoint",
        str(tmp_path / "store"),
        "--checkpoint_every",
        "1000",
    )
    done = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        launcher = start(number.name, *flags, delay=0.1)
        wait_until(lambda done=done: steps_done(tmp_path / "record") >= done + 5)
        assert not done or f"from the checkpoint of step {done}" in launcher.output
        workers = launcher.workers()
        launcher.send(number)
        assert launcher.wait() == code, launcher.output
        done = steps_done(tmp_path / "record")
        assert f"after saving step {done}" in launcher.output, launcher.output
        assert not any(os.path.exists(f"/proc/{pid}") for pid in workers.values())
        assert not members(etcd, "stop")
    again = start("last", *flags)
    assert again.wait() == 0, again.output
    assert f"from the checkpoint of step {done}" in again.output
    assert final(again.output)["weights"] == undisturbed
    assert exactly_once(tmp_path / "record")


@pytest.mark.slow
def test_a_private_etcd_is_not_needed_to_find_the_checkpoint_again(
    start: Start, tmp_path: Path, undisturbed: str
) -> None:
    """The launcher itself is killed, and its etcd with it; the store alone is left."""
    flags = (
        "--nproc_per_node",
        "2",
        "--checkpoint",
        str(tmp_path / "store"),
        "--checkpoint_every",
        "3",
    )
    launcher = start("first", *flags, delay=0.05)
    wait_until(lambda: any((tmp_path / "store" / "commits").glob("*.json")))
    workers = launcher.workers()
    launcher.send(signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers.values()))
    again = start("second", *flags)
    assert again.wait() == 0, again.output
    assert "from the checkpoint of step" in again.output
    assert final(again.output)["weights"] == undisturbed
    assert exactly_once(tmp_path / "record")


def test_a_finished_job_started_again_has_nothing_to_do(start: Start, tmp_path: Path) -> None:
    flags = ("--checkpoint", str(tmp_path / "store"))
    first = start("first", *flags)
    assert first.wait() == 0, first.output
    before = steps_done(tmp_path / "record")
    again = start("second", *flags, record="again")
    assert again.wait() == 0, again.output
    assert steps_done(tmp_path / "again") == 0
    assert final(again.output)["weights"] == final(first.output)["weights"]
    assert before == STEPS


def test_a_node_is_drained_without_losing_a_step(
    start: Start, tmp_path: Path, etcd: EmbeddedEtcd
) -> None:
    where = ("--etcd", etcd.endpoint, "--job_id", "drained")
    flags = (*where, "--nnodes", "1:2", "--checkpoint", str(tmp_path / "store"))
    first, second = (start(name, *flags, delay=0.25) for name in ("first", "second"))
    record = tmp_path / "record"
    wait_until(lambda: steps_done(record) >= 5 and len(members(etcd, "drained")) == 2)
    node = re.search(r"job tiny|job drained, node (\S+),", second.output)
    assert node is not None
    command = [sys.executable, "-m", "paddle_ft.cli", "drain"]
    unknown = subprocess.run(
        [*command, "nobody", *where], capture_output=True, text=True, timeout=60, check=False
    )
    assert (unknown.returncode, "it has" in unknown.stderr) == (2, True), unknown.stderr
    drained = subprocess.run(
        [*command, node[1], *where], capture_output=True, text=True, timeout=60, check=False
    )
    assert drained.returncode == 0, drained.stderr
    assert second.wait() == 143, second.output
    assert first.wait() == 0, first.output
    told = final(first.output)
    assert (told["world"], told["restarts"]) == ("1", "0")
    assert (told["paddle"], told["group"]) == ("1", "False"), "the group of two is gone"
    assert exactly_once(record)
    generations = {line["step"]: line["generation"] for line in lines(record)}
    assert len({(g["step"], g["generation"]) for g in lines(record)}) == len(generations)


def test_a_bug_in_the_script_ends_the_job_with_its_traceback(start: Start, tmp_path: Path) -> None:
    script = (str(TINY), "--record", str(tmp_path / "record"), "--fail-at", "2")
    launcher = start("job", "--max_restart", "9", "--spares", "1", script=script)
    assert launcher.wait() == 6, launcher.output
    assert "ValueError: a bug in the script" in launcher.output
    assert "ended with exit code 1 after step 2 in each of the last 3 attempts" in launcher.output
    assert "it is the script or its data" in launcher.output


def test_a_script_that_knows_nothing_of_paddle_ft(start: Start, tmp_path: Path) -> None:
    """fleet.init, DataParallel and dist work as under paddle.distributed.launch, and restart."""
    launcher = start(
        "job", "--nproc_per_node", "2", script=(str(KNOWS_NOTHING), str(tmp_path / "first"))
    )
    assert launcher.wait() == 0, launcher.output
    assert "rank 1 was killed by SIGKILL" in launcher.output
    for rank in (0, 1):
        assert f"rank={rank} world=2 sum=3 local={rank}" in launcher.output
        assert f"rank={rank} " in (launcher.log_dir / f"workerlog.{rank}").read_text()


def test_spares_take_over(start: Start, tmp_path: Path, undisturbed: str) -> None:
    """Workers that were started before anything failed go on with the same result."""
    launcher = start(
        "job", "--nproc_per_node", "2", "--spares", "2", "--checkpoint_every", "3", delay=0.3
    )
    wait_until(lambda: len(launcher.ready()) == 2 and steps_done(tmp_path / "record") >= 2)
    spares, survivor = launcher.ready(), launcher.workers()[0]
    launcher.kill_worker(1)
    assert launcher.wait() == 0, launcher.output
    now = launcher.workers()
    assert now[0] == survivor
    assert now[1] in spares
    assert final(launcher.output)["weights"] == undisturbed


@pytest.mark.slow
def test_workers_that_start_anew_come_from_the_reserve(start: Start, tmp_path: Path) -> None:
    """Of a script with ``paddle.DataParallel``: the same result, and all of them were there."""
    script = (str(TINY), "--record", str(tmp_path / "a"), "--parallel")
    alone = start("alone", "--nproc_per_node", "2", script=script)
    assert alone.wait() == 0, alone.output
    script = (str(TINY), "--record", str(tmp_path / "b"), "--parallel", "--delay", "0.15")
    flags = ("--nproc_per_node", "2", "--spares", "2", "--checkpoint_every", "3")
    launcher = start("job", *flags, script=script)
    wait_until(lambda: len(launcher.ready()) == 2 and steps_done(tmp_path / "b") >= 2)
    spares = launcher.ready()
    launcher.kill_worker(1)
    assert launcher.wait() == 0, launcher.output
    assert sorted(launcher.workers().values()) == sorted(spares)
    assert final(launcher.output)["restarts"] == "1"
    assert final(launcher.output)["weights"] == final(alone.output)["weights"]


def test_a_signal_saves_now_and_a_terminal_that_closes_saves_and_ends(
    start: Start, tmp_path: Path
) -> None:
    launcher = start(
        "job", "--checkpoint", str(tmp_path / "store"), "--checkpoint_every", "SIGUSR1", delay=0.25
    )
    wait_until(lambda: steps_done(tmp_path / "record") >= 3)
    assert not list((tmp_path / "store" / "commits").glob("*"))
    launcher.send(signal.SIGUSR1)
    wait_until(lambda: list((tmp_path / "store" / "commits").glob("*.json")))
    saved = steps_done(tmp_path / "record")
    assert saved < STEPS, "it was saved while training went on"
    wait_until(lambda: steps_done(tmp_path / "record") > saved)
    launcher.send(signal.SIGHUP)
    assert launcher.wait() == 143, launcher.output
    assert "SIGHUP: saving a last checkpoint, then leaving" in launcher.output
    assert f"after saving step {steps_done(tmp_path / 'record')}" in launcher.output


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def members(etcd: EmbeddedEtcd, job: str) -> list[str]:
    coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,)))
    try:
        return [kv.key for kv in coordinator.read(f"/paddle_ft/{job}/nodes/").kvs]
    finally:
        coordinator.close()


def leads(etcd: EmbeddedEtcd, job: str, launcher: Launcher) -> bool:
    """Whether ``launcher`` is the leader, by the name it gave itself."""
    coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,)))
    try:
        (leader,) = coordinator.read(f"/paddle_ft/{job}/leader").kvs
    finally:
        coordinator.close()
    return f"node {leader.value.decode().partition('.')[0]}," in launcher.output
