"""Random faults from a seed against real launchers; the weights are those of an undisturbed run.
Part of ``make chaos-all``; ``FAULTS`` and ``CHAOS_SEED`` choose others.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from paddle_ft.chaos import run
from paddle_ft.chaos.plan import EtcdMember, Node, Plan, random_plan
from tests.chaos import digests
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.jobs import FAST_ETCD

FAULTS = int(os.environ.get("FAULTS", "20"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
GAP_S = 6.0
"""Between faults, on the average."""
STEP_S = 0.05
KINDS = ("kill-worker", "stop-worker", "kill-node", "stop-node", "kill-etcd", "stop-etcd-leader")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.paddle,
    pytest.mark.etcd,
    pytest.mark.timeout(300 + 40 * FAULTS),
]


def arguments(place: Path, seconds: float) -> list[str]:
    """A training of two ranks that lasts at least so long."""
    epochs = round(seconds / STEP_S / 13)
    return [
        *("--checkpoint", str(place / "store"), "--checkpoint_every", "20", "--quiet"),
        *("--max_restart", str(10 * FAULTS), "--log_dir", str(place / "log"), "--job_id", "chaos"),
        *(digests.__file__, "--record", str(place / "record")),
        *("--epochs", str(epochs), "--delay", str(STEP_S)),
    ]


def check(place: Path, plan: Plan, given: list[str], name: str) -> None:
    report, code = run.run(plan, given, place / "report.json")
    text = "\n".join(report)
    print(text)
    if wanted := os.environ.get("CHAOS_REPORT"):
        Path(wanted).mkdir(parents=True, exist_ok=True)
        (Path(wanted) / f"{name}.md").write_text(text + "\n")
    told = json.loads((place / "report.json").read_text())
    outputs = "\n".join(p.read_text() for p in (place / "log").glob("*/launcher.txt"))
    assert (code, told["weights"]) == (0, "equal"), text + outputs
    hit = [f for f in told["faults"] if f["victim"]]
    assert len(hit) > FAULTS // 2, text
    twofold = {s for s, found in digests.written(place / "record").items() if len(found) > 1}
    assert not twofold, f"steps {sorted(twofold)} came to different states\n{text}"


def test_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and the launcher itself, which has a private etcd."""
    for key, value in (FAST_ETCD | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(key, value)
    faults = random_plan(SEED, FAULTS, FAULTS * GAP_S, KINDS[:4])
    given = ["--nproc_per_node", "2", *arguments(tmp_path, FAULTS * GAP_S)]
    check(tmp_path, Plan(faults, compare=True), given, "one-node")


def test_two_nodes_and_three_etcd_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind that needs no root."""
    for key, value in (FAST_ETCD | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(key, value)
    faults = random_plan(SEED, FAULTS, FAULTS * GAP_S, KINDS)
    with EtcdCluster(3) as etcd:
        members = tuple(EtcdMember(e, etcd.pid(i)) for i, e in enumerate(etcd.endpoints))
        plan = Plan(faults, (Node("a"), Node("b")), members, compare=True)
        given = ["--nnodes", "2", "--etcd", ",".join(etcd.endpoints)]
        check(tmp_path, plan, [*given, *arguments(tmp_path, FAULTS * GAP_S)], "two-nodes")
