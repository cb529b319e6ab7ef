"""Worker processes of one node: start, warm spares, output, end.

Invariant: every process started here is in ``_processes`` or ``_spares`` until it has been waited
for, and none outlives this one (the bootstrap asks the kernel for that). ``start`` must be called
on the main thread: the kernel ties "my parent died" to the thread that started the child.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from paddle_ft.config import secret_variables

log = logging.getLogger("paddle_ft")

OUTPUT_LINE_BYTES_MAX = 64 * 1024
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  only files that name an ended worker are removed
CLEAN_UP_S = 2.0
"""How long after a worker what it started may take to be gone."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    rank: int
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """Event: the process of ``rank`` in ``generation`` has ended."""

    generation: int
    rank: int
    exit_code: int
    stopped: bool
    at_s: float


class WorkerPool:
    """Starts and ends the workers of one generation at a time.

    Args:
        command: what the bootstrap runs: script and arguments, or ``-m module …``.
        spares: processes kept ready with paddle imported.
        on_end: called from a thread for every worker that ends.
        on_line: called from a thread for every line a worker prints, with its rank.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_dir: Path,
        spares: int,
        on_end: Callable[[WorkerEnded], None],
        on_line: Callable[[int, bytes], None],
    ) -> None:
        self._command = list(command)
        self._log_dir = log_dir
        self._spares_wanted = spares
        self._on_end = on_end
        self._on_line = on_line
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._stopped: set[int] = set()
        self._spares: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def start(self, generation: int, specs: Sequence[WorkerSpec]) -> None:
        """Starts one worker for each of ``specs``; the ones before must have ended."""
        assert not self._processes, "workers of the generation before are still there"
        self._stopped.clear()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            process = self._from_spare(spec) or self._spawn(spec.env, [])
            self._processes[spec.rank] = process
            self._follow(generation, spec.rank, process)
        self._write_pids(generation)

    def refill(self) -> None:
        """Starts missing spares; called when there is nothing more urgent."""
        self._spares = [s for s in self._spares if s.poll() is None]
        while len(self._spares) < self._spares_wanted:
            self._spares.append(self._spawn({}, ["--spare"], stdin=subprocess.PIPE))

    def stop(self, gently: bool = False, grace_s: float = 5.0) -> None:
        """Ends all workers; returns when the signal is sent. ``gently``: SIGTERM, then SIGKILL."""
        for rank, process in list(self._processes.items()):
            if process.poll() is None:
                self._stopped.add(rank)
                _signal_group(process, signal.SIGTERM if gently else signal.SIGKILL)
                if gently:
                    timer = threading.Timer(grace_s, _signal_group, (process, signal.SIGKILL))
                    timer.daemon = True
                    timer.start()

    def reap(self, rank: int) -> None:
        """Forgets the worker of ``rank``, whose end has been told."""
        self._processes.pop(rank, None)

    def close(self) -> None:
        """Ends everything that was started here and waits for it."""
        self.stop()
        for process in self._spares:
            _signal_group(process, signal.SIGKILL)
        for process in [*self._processes.values(), *self._spares]:
            process.wait()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._spares.clear()

    def _spawn(
        self, env: Mapping[str, str], extra: Sequence[str], stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        script = [] if extra else self._command
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "paddle_ft.agent.bootstrap", *extra, *script],
            env={**_clean_environment(), **env},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _from_spare(self, spec: WorkerSpec) -> subprocess.Popen[bytes] | None:
        while self._spares:
            process = self._spares.pop(0)
            order = {"env": dict(spec.env), "argv": self._command, "cwd": os.getcwd()}
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.close()
            except OSError:
                process.kill()
                process.wait()
                continue
            return process
        return None

    def _follow(self, generation: int, rank: int, process: subprocess.Popen[bytes]) -> None:
        log = _Log(self._log_dir / f"workerlog.{rank}")
        log.write(f"--- generation {generation}, pid {process.pid}\n".encode())
        threads = [
            threading.Thread(
                target=self._pump, args=(rank, process, log), name=f"pump-{rank}", daemon=True
            ),
            threading.Thread(
                target=self._wait,
                args=(generation, rank, process),
                name=f"wait-{rank}",
                daemon=True,
            ),
        ]
        for thread in threads:
            thread.start()
        self._threads = [t for t in self._threads if t.is_alive()] + threads

    def _pump(self, rank: int, process: subprocess.Popen[bytes], log: _Log) -> None:
        assert process.stdout is not None
        with process.stdout as output, contextlib.closing(log):
            while line := output.readline(OUTPUT_LINE_BYTES_MAX):
                log.write(line)
                self._on_line(rank, line)

    def _wait(self, generation: int, rank: int, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ChildProcessError):  # until it is waited for, its id is its own
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        started = _session_of(process.pid)
        _kill(started)  # data loaders hold its sockets and its output
        code = process.wait()
        self._on_end(WorkerEnded(generation, rank, code, rank in self._stopped, time.monotonic()))
        _clean_up_after(process.pid, started)

    def _write_pids(self, generation: int) -> None:
        """``workers.json`` in the log directory: who runs where, for people and tools."""
        workers = [{"rank": r, "pid": p.pid} for r, p in sorted(self._processes.items())]
        path = self._log_dir / "workers.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # launchers may share the directory
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({"generation": generation, "workers": workers}))
            temporary.replace(path)


class _Log:
    """A worker's log file. A disk that is full costs lines of the log, not the training."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._complained = False
        self._file: IO[bytes] | None = None
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._complain(error)

    def write(self, data: bytes) -> None:
        try:
            if self._file is not None:
                self._file.write(data)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("%s cannot be written: %s; training goes on", self._path, error.strerror)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _clean_environment() -> dict[str, str]:
    """The launcher's environment without what an outer launcher left for workers of its own.

    Secrets stay with the launcher: it alone signs checkpoints and talks to etcd.
    """
    foreign = ("PADDLE_TRAINER", "PADDLE_MASTER", "FLAGS_selected", "MASTER_ADDR", "MASTER_PORT")
    secrets = secret_variables()
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in secrets}


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signals the worker and what it started (data loader processes)."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass


def _session_of(leader: int) -> set[int]:
    """The living processes of the session of ``leader``, without itself."""
    members = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it has ended
        if int(session) == leader and state not in "ZX":
            members.add(int(stat.parent.name))
    return members - {leader}


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _clean_up_after(leader: int, started: set[int]) -> None:
    """Sees to the end of what a worker had ``started``, and removes what is left of it.

    Paddle's data loaders pass batches in ``/dev/shm/paddle_<pid>_…``, which nobody removes after
    they were killed.
    """
    until_s = time.monotonic() + CLEAN_UP_S
    pids = {leader} | started
    while (left := _session_of(leader)) and time.monotonic() < until_s:
        pids |= left
        _kill(left)  # one of them may have started another one
        time.sleep(0.01)
    for pid in pids:
        for path in SHARED_MEMORY.glob(f"paddle_{pid}_*"):
            with contextlib.suppress(OSError):
                path.unlink()
