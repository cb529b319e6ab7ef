"""Real launchers for tests: start them, hurt them, read what they said."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
TINY = SCRIPTS / "tiny.py"
KNOWS_NOTHING = SCRIPTS / "knows_nothing.py"
FAST_ETCD = {
    "PADDLE_FT_ETCD__LEASE_TTL_S": "2",
    "PADDLE_FT_ETCD__RENEW_INTERVAL_S": "0.3",
    "PADDLE_FT_ETCD__RPC_TIMEOUT_S": "1",
}
"""The shortest leases that etcd grants."""


@dataclass
class Launcher:
    """One launcher process, in a directory of its own."""

    directory: Path
    arguments: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    inside: Sequence[str] = ()
    """What stands before the command, such as ``ip netns exec NAME``."""

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._out = (self.directory / "out.txt").open("wb")
        self.process = subprocess.Popen(
            [
                *self.inside,
                sys.executable,
                "-m",
                "paddle_ft.launch",
                "--log_dir",
                str(self.log_dir),
                *self.arguments,
            ],
            cwd=self.directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environ},
            stdout=self._out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )

    @property
    def log_dir(self) -> Path:
        return self.directory / "log"

    @property
    def output(self) -> str:
        return (self.directory / "out.txt").read_text(errors="replace")

    def wait(self, timeout_s: float = 90.0) -> int:
        """The exit code; on a time-out the launcher is killed and its output shown."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no end after {timeout_s} s:\n{self.output}") from None
        finally:
            self._out.close()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def workers(self) -> dict[int, int]:
        """pid by rank of the workers that were started last."""
        return {worker["rank"]: worker["pid"] for worker in self._told().get("workers", ())}

    def ready(self) -> list[int]:
        """pids of the workers in reserve that wait at the door of their session."""
        return list(self._told().get("ready", ()))

    def _told(self) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads((self.log_dir / "workers.json").read_text())
        except FileNotFoundError:
            return {}
        return told

    def kill_worker(self, rank: int, number: int = signal.SIGKILL) -> int:
        pid = self.workers()[rank]
        os.kill(pid, number)
        return pid

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._out.close()


def final(output: str) -> dict[str, str]:
    """The fields of the last ``final …`` line."""
    lines = re.findall(r"final (step=.*)", output)
    assert lines, f"no final line in:\n{output}"
    return dict(pair.split("=", 1) for pair in lines[-1].split())


def steps_done(record: Path) -> int:
    """The highest step that any rank has written down."""
    return max((line["step"] for line in lines(record)), default=0)


def lines(record: Path) -> list[dict[str, object]]:
    found = []
    for path in record.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # a killed worker may have cut its last line
                found.append(json.loads(line))
    return found


def used_samples(record: Path, steps: int) -> list[int]:
    """Sample ids that went into the final weights, in the order of steps.

    A step that was done again counts as it was done last: the earlier one was never committed.
    """
    by_step: dict[int, list[dict[str, object]]] = {}
    for line in lines(record):
        by_step.setdefault(line["step"], []).append(line)
    used: list[int] = []
    for step in range(1, steps + 1):
        last = max(line["generation"] for line in by_step[step])
        for line in by_step[step]:
            if line["generation"] == last:
                used += line["ids"]
    return used


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.02)


def undisturbed_run(places: pytest.TempPathFactory, world: int, steps: int) -> str:
    """The weights of ``TINY`` on ``world`` ranks to which nothing happened; who asks first runs it.

    One run serves all processes of pytest-xdist.
    """
    base = places.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept = common / f"undisturbed-{world}.txt"
    with (common / f"undisturbed-{world}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            place = places.mktemp("undisturbed")
            script = (str(TINY), "--record", str(place / "record"))
            launcher = Launcher(place, ("--nproc_per_node", str(world), *script))
            assert launcher.wait() == 0, launcher.output
            told = final(launcher.output)
            assert (told["step"], told["world"], told["restarts"]) == (str(steps), str(world), "0")
            kinds = {event["kind"] for event in lines(launcher.log_dir)}
            assert "ended" in kinds and "hung" not in kinds, kinds
            assert not (launcher.log_dir / "flight").exists()
            kept.write_text(told["weights"])
        return kept.read_text()
