"""The launchers of a job with faults, as ``chaos run`` keeps them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from paddle_ft.chaos.plan import Node, Plan
from paddle_ft.chaos.run import Job


class Process(subprocess.Popen[bytes]):
    """Ends at once; while it is looked at, another one is started."""

    job: Job

    def poll(self) -> int | None:
        if "b" not in self.job._running:
            self.job._running["b"] = self
        super().poll()
        return None


def test_launchers_are_listed_while_others_start(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    plan = Plan((), (Node("a"), Node("b")))
    job = Job(plan, ["--log_dir", str(tmp_path), str(script)], [], {})
    with Process([sys.executable, "-c", ""]) as process:
        process.job = job
        job._running["a"], job._eras = process, {"a": 0, "b": 0}
        assert [launcher.node for launcher in job.launchers()] == ["a"]
        assert [launcher.node for launcher in job.launchers()] == ["a", "b"]
