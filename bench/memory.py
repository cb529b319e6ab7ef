"""Peak memory of the agent and of the snapshots, against what ``agent/snapshots.py`` states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.drive import Job, Memory
from bench.report import Row
from paddle_ft.config import CheckpointConfig

GROUP = "Memory"
INTERVAL_S = 0.05
SLACK = 1.02
"""Of the formula: pages are whole."""
AGENT_MBYTES = 150.0
"""An agent that holds no state; etcd's and boto3's clients are in it."""


def measure(folder: Path, mbytes: float, say: Callable[[str], None]) -> list[Row]:
    buffers = CheckpointConfig().buffers
    runs: dict[str, Memory] = {}
    for name, steps in (("training", 20), ("after a restart", 40)):
        say(f"memory: {name}")
        job = Job(
            folder / "job",
            ["--case", "heavy", "--mbytes", str(mbytes), "--steps", str(steps), "--samples", "1",
             "--every", "2"],
        )  # fmt: skip
        job.start()
        done = len(job.wait(INTERVAL_S)[0]["iterations"])
        assert done == 20, f"{done} steps: the job did not go on from its checkpoint"
        runs[name] = job.memory
    rows = []
    for name, images in (("training", 0), ("after a restart", 1)):
        formula = (buffers + images) * mbytes
        rows.append(
            Row(
                GROUP,
                f"{name}: shared memory, peak",
                "MB",
                [runs[name].shared / 1e6],
                [formula],
                f"{buffers} buffers" + (" + 1 image" if images else ""),
                goal=SLACK,
            )
        )
        rows.append(
            Row(GROUP, f"{name}: the agent's own memory, peak", "MB", [runs[name].agent / 1e6],
                goal=AGENT_MBYTES)
        )  # fmt: skip
    rows.append(
        Row(
            GROUP,
            "after a restart: shared memory at the end",
            "MB",
            [runs["after a restart"].shared_last / 1e6],
            [buffers * mbytes],
            f"{buffers} buffers",
            goal=SLACK,
            note="the image that was restored from must be gone once training goes on",
        )
    )
    return rows
