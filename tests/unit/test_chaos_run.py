"""The launchers of a job with faults, as ``chaos run`` keeps them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paddle_ft.chaos.plan import Node, Plan
from paddle_ft.chaos.run import Job, read_plan
from paddle_ft.errors import ConfigError


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


def test_a_plan_that_cannot_be_read_is_named_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file or directory$"):
        read_plan(tmp_path / "none.toml")
    (tmp_path / "plan.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"plan\.toml is not a text file"):
        read_plan(tmp_path / "plan.toml")
