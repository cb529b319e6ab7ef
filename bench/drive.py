"""Starts what is measured: jobs under the launcher, and PyTorch in its own environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddle_ft.agent.tether import tethered

HERE = Path(__file__).parent
TORCH_PYTHON = HERE.parent / ".venv-torch" / "bin" / "python"
JOB_TIMEOUT_S = 180.0


@dataclass
class Memory:
    """The most that a launcher and its snapshots took, bytes."""

    agent: int = 0
    """Private memory of the launcher's process; the buffers it maps are not in it."""
    shared: int = 0
    """Files on shared memory."""
    shared_last: int = 0

    def sample(self, pid: int) -> None:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            for line in status.splitlines():  # a process that has ended has no such line
                if line.startswith("RssAnon:"):
                    self.agent = max(self.agent, int(line.split()[1]) * 1024)
        used = 0
        for path in Path("/dev/shm").glob(f"paddle_ft-{pid}-*/*"):
            with suppress(OSError):
                used += path.stat().st_blocks * 512
        self.shared = max(self.shared, used)
        self.shared_last = used or self.shared_last


@dataclass
class Job:
    """One launcher with ``bench/job.py``; ``folder`` is its own."""

    folder: Path
    arguments: Sequence[str]
    ranks: int = 1
    flags: Sequence[str] = ()
    memory: Memory = field(default_factory=Memory)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "paddle_ft.launch", "--quiet",
            "--job_id", "bench", "--nproc_per_node", str(self.ranks),
            "--log_dir", str(self.folder / "log"),
            "--checkpoint", str(self.folder / "store"), *self.flags,
            str(HERE / "job.py"), "--report", str(self.folder), *self.arguments,
        ]  # fmt: skip
        with (self.folder / "out.txt").open("wb") as out:
            self.process = subprocess.Popen(
                tethered(command),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self, sample_interval_s: float | None = None) -> list[dict[str, Any]]:
        """Reports of all ranks. Raises RuntimeError, with the output, if the job failed."""
        waited_s, pause_s = 0.0, sample_interval_s or JOB_TIMEOUT_S
        while True:
            try:
                code = self.process.wait(pause_s)
                break
            except subprocess.TimeoutExpired:
                waited_s += pause_s
                self.memory.sample(self.process.pid)
                if waited_s >= JOB_TIMEOUT_S:
                    self.stop()
                    code = -1
                    break
        if code != 0:
            told = (self.folder / "out.txt").read_text()
            for log in sorted((self.folder / "log").glob("*log*")):
                told += f"\n{log.name}: {log.read_text(errors='replace')[-2000:]}"
            raise RuntimeError(f"the job in {self.folder} ended with {code}:\n{told}")
        return [
            json.loads((self.folder / f"rank-{rank}.json").read_text())
            for rank in range(self.ranks)
        ]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Line:
    """Requests and answers as lines of JSON."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader, self._writer = reader, writer

    def ask(self, **request: Any) -> dict[str, Any]:
        self._writer.write(json.dumps(request) + "\n")
        self._writer.flush()
        answer = self._reader.readline()
        if not answer:
            raise RuntimeError("the process at the other end has ended")
        result: dict[str, Any] = json.loads(answer)
        return result


@contextmanager
def driven_job(folder: Path, mbytes: float) -> Iterator[Line]:
    """A job that makes one step and its checkpoint whenever it is asked to."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="paddle_ft-bench-"))
        control = os.path.join(directory, "control")
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(control)
        server.listen(1)
        server.settimeout(60)
        job = Job(
            folder,
            ["--case", "driven", "--mbytes", str(mbytes), "--steps", "1000", "--samples", "1",
             "--every", "1", "--control", control],
        )  # fmt: skip
        job.start()
        stack.callback(job.stop)
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(60)
        stream = stack.enter_context(connection.makefile("rw"))
        stream.readline()
        yield Line(stream, stream)


@contextmanager
def torch_peer(folder: Path, mbytes: float) -> Iterator[Line | None]:
    """PyTorch with a state of the same size; None if it is not installed."""
    if not TORCH_PYTHON.exists():
        yield None
        return
    process = subprocess.Popen(
        [str(TORCH_PYTHON), str(HERE / "torch_peer.py"), str(folder), str(mbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(900, process.kill)
    timer.start()
    try:
        yield Line(process.stdout, process.stdin)
    finally:
        timer.cancel()
        process.kill()
        process.communicate()
