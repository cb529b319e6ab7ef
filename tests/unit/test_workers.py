"""Worker processes of one node: what they start ends with them (A1, A7)."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.agent.workers import WorkerEnded, WorkerPool, WorkerSpec

CHILDREN = """
import multiprocessing, os, time

def child(name, apart):
    if apart:
        os.setpgid(0, 0)
    with open(f"/dev/shm/paddle_{os.getpid()}_{name}", "w"):
        os.write(1, f"{name} {os.getpid()}\\n".encode())  # in one piece
    time.sleep(60)

fork = multiprocessing.get_context("fork")
for name, apart in (("together", False), ("apart", True)):
    fork.Process(target=child, args=(name, apart)).start()
time.sleep(60)
"""

LOADER = """
import os, time
import numpy as np
import paddle

class Numbers(paddle.io.IterableDataset):
    def __iter__(self):
        os.write(1, f"loader {os.getpid()}\\n".encode())
        while True:
            yield np.zeros(1000, "float32")

if __name__ == "__main__":
    for _ in paddle.io.DataLoader(Numbers(), batch_size=4, num_workers=1):
        time.sleep(60)
"""


class Workers:
    """A pool of one worker, and what it says."""

    def __init__(self, directory: Path, script: str) -> None:
        self.ends: queue.Queue[WorkerEnded] = queue.Queue()
        self.lines: queue.Queue[str] = queue.Queue()
        self.log_dir = directory / "log"
        path = directory / "script.py"
        path.write_text(script)
        self.pool = WorkerPool([str(path)], self.log_dir, self.ends.put, self._on_line)
        self.pid = self.pool.start(1, WorkerSpec(0, {}))

    def _on_line(self, rank: int, line: bytes) -> None:
        self.lines.put(line.decode().strip())

    def told(self) -> tuple[str, int]:
        """A line that consists of a word and a process id."""
        name, pid = self.lines.get(timeout=30).split()
        return name, int(pid)

    def end(self) -> WorkerEnded:
        event = self.ends.get(timeout=30)
        self.pool.reap(event)
        self.pool.close()
        return event


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Workers]]:
    started: list[Workers] = []

    def start(script: str) -> Workers:
        started.append(Workers(tmp_path, script))
        return started[-1]

    yield start
    for workers in started:
        workers.pool.close()


def test_neither_secrets_nor_another_launchers_marks_reach_a_worker(
    start: Callable[[str], Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script hands its environment on, to loggers and to trackers of experiments."""
    for name in (
        "PADDLE_FT_CHECKPOINT__SIGN_KEY",
        "PADDLE_FT_ETCD__PASSWORD",
        "MASTER_ADDR",  # paddle.distributed.launch of an outer job, or torchrun
        "MASTER_PORT",
        "PADDLE_TRAINER_ENDPOINTS",
        "PADDLE_MASTER",
        "MASTER_OF_MINE",
    ):
        monkeypatch.setenv(name, "hidden")
    workers = start(
        "import os\n"
        "print(*sorted(k for k, v in os.environ.items() if v == 'hidden'), 'end', flush=True)"
    )
    assert workers.lines.get(timeout=30).split() == ["MASTER_OF_MINE", "end"]
    assert workers.end().exit_code == 0


def test_a_full_disk_costs_the_log_not_the_training(
    start: Callable[[str], Workers], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "workerlog.0").symlink_to("/dev/full")
    workers = start("for i in range(100): print(i, flush=True)")
    assert [workers.lines.get(timeout=30) for _ in range(100)] == [str(i) for i in range(100)]
    assert workers.end().exit_code == 0
    (told,) = caplog.messages
    assert told.endswith("workerlog.0 cannot be written: No space left on device; training goes on")


def runs(pid: int) -> bool:
    """Whether the process is there, and not merely to be waited for by somebody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_by(*pids: int) -> list[Path]:
    return [path for pid in pids for path in Path("/dev/shm").glob(f"paddle_{pid}_*")]


def test_what_a_killed_worker_started_ends_with_it(start: Callable[[str], Workers]) -> None:
    """Its children hold its sockets and its output; one of them has a process group of its own."""
    workers = start(CHILDREN)
    children = dict(workers.told() for _ in range(2))
    assert len(left_by(*children.values())) == 2
    os.kill(workers.pid, signal.SIGKILL)
    event = workers.end()
    assert (event.exit_code, event.stopped) == (-signal.SIGKILL, False)
    assert not [name for name, pid in children.items() if runs(pid)]
    assert not left_by(*children.values())


@pytest.mark.paddle
def test_a_killed_data_loader_leaves_no_shared_memory(
    start: Callable[[str], Workers], wait_for: Callable[..., None]
) -> None:
    workers = start(LOADER)
    _, pid = workers.told()
    wait_for(lambda: left_by(pid))
    os.kill(workers.pid, signal.SIGKILL)
    workers.end()
    assert not runs(pid)
    assert not left_by(pid, workers.pid)


def test_nobody_takes_a_place_who_was_told_to_end(tmp_path: Path) -> None:
    """Its end may be heard of later than the place is to be filled."""
    started = Workers(tmp_path, "import time; time.sleep(99)")
    pool = started.pool
    try:
        pool.refill(0, 2, {})
        first, second = pool.reserve()
        assert pool.candidate([second]) == second
        assert pool.candidate([]) == first
        pool.refill(0, 1, {})
        assert pool.candidate([second]) == first
        pool.refill(0, 0, {})
        assert pool.candidate([first, second]) is None
    finally:
        pool.close()
