"""Worker processes of one node: start, warm spares, output, end.

Invariant: none of the processes started here outlives this one (the bootstrap asks the kernel for
that), and the end of each is told. ``start`` and ``refill`` must be called on the main thread: the
kernel ties "my parent died" to the thread that started the child.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from paddle_ft.agent.bootstrap import LAUNCHER_VARIABLE
from paddle_ft.config import without_secrets

log = logging.getLogger("paddle_ft")

OUTPUT_LINE_BYTES_MAX = 64 * 1024
RESERVE_LOG = "workerlog.reserve"
RESERVE_DEATHS_MAX = 3
"""So many processes in reserve that end one after another tell that this script cannot have any."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  only files that name an ended worker are removed
CLEAN_UP_S = 2.0
"""How long after a worker what it started may take to be gone."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    rank: int
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """Event: process ``pid`` has ended; ``rank`` is None if it was in reserve."""

    pid: int
    rank: int | None
    exit_code: int
    stopped: bool
    at_s: float


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    rank: int | None
    """None: in reserve, with the script run up to its session."""
    stopped: bool = False


class WorkerPool:
    """Starts and ends workers, one a rank, and keeps processes in reserve.

    Args:
        command: what the bootstrap runs: script and arguments, or ``-m module …``.
        on_end: called from a thread for every worker that ends.
        on_line: called from a thread for every line a worker prints, with its rank.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_dir: Path,
        on_end: Callable[[WorkerEnded], None],
        on_line: Callable[[int, bytes], None],
    ) -> None:
        self._command = list(command)
        self._log_dir = log_dir
        self._on_end = on_end
        self._on_line = on_line
        self._ranks: dict[int, _Running] = {}
        self._reserve: dict[int, _Running] = {}
        """By process id: they wait at the door of their session, or are on their way to it."""
        self._reserve_deaths = 0
        self._spares: list[subprocess.Popen[bytes]] = []
        """Paddle is imported; they wait for what to run."""
        self._threads: list[threading.Thread] = []

    def start(self, generation: int, spec: WorkerSpec) -> int:
        """Starts the worker of a rank that has none; gives its process id."""
        assert spec.rank not in self._ranks, "the worker before is still there"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        running = _Running(self._from_spare(spec) or self._spawn(spec.env, []), spec.rank)
        self._ranks[spec.rank] = running
        self._follow(running, generation)
        return running.process.pid

    def take(self, pid: int, rank: int) -> None:
        """A process in reserve becomes the worker of ``rank``."""
        assert rank not in self._ranks, "the worker before is still there"
        self._ranks[rank] = self._reserve.pop(pid)
        self._ranks[rank].rank = rank
        self._reserve_deaths = 0

    def rename(self, ranks: Mapping[int, int]) -> None:
        """Workers go on under other ranks: old to new. The others must have been dropped."""
        self._ranks = {new: self._ranks[old] for old, new in ranks.items()}
        for rank, running in self._ranks.items():
            running.rank = rank

    def reserve(self) -> list[int]:
        """Process ids, the one started first at first."""
        return [pid for pid, running in self._reserve.items() if not running.stopped]

    def candidate(self, ready: Iterable[int]) -> int | None:
        """Who in reserve takes the next place: one of ``ready``, if any, but none that was told to
        end and whose end is still to be heard of."""
        there = self.reserve()
        return next((pid for pid in (*ready, *there) if pid in there), None)

    def pid(self, rank: int) -> int | None:
        running = self._ranks.get(rank)
        return running.process.pid if running is not None else None

    def refill(self, spares: int, reserve: int, env: Mapping[str, str]) -> None:
        """Starts what is missing in reserve; called when there is nothing more urgent.

        ``reserve``: processes that run the script until it needs its rank, with ``env``; of a
        script that cannot do that, imported ones take their place. Those that are too many are
        ended.
        """
        if self._reserve_deaths >= RESERVE_DEATHS_MAX:
            spares, reserve = max(spares, reserve), 0
        self._spares = [s for s in self._spares if s.poll() is None]
        while len(self._spares) > spares:
            process = self._spares.pop()
            _signal_group(process, signal.SIGKILL)
            process.wait()
        while len(self._spares) < spares:
            self._spares.append(self._spawn({}, ["--spare"], stdin=subprocess.PIPE))
        for running in list(self._reserve.values())[reserve:]:
            running.stopped = True
            _signal_group(running.process, signal.SIGKILL)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        while len(self._reserve) < reserve:
            running = _Running(self._spawn(env, []), None)
            self._reserve[running.process.pid] = running
            self._follow(running, 0)

    def stop(self, gently: bool = False, grace_s: float = 5.0) -> None:
        """Ends all workers; returns when the signal is sent. ``gently``: SIGTERM, then SIGKILL."""
        for running in list(self._ranks.values()):
            process = running.process
            if process.poll() is None:
                running.stopped = True
                _signal_group(process, signal.SIGTERM if gently else signal.SIGKILL)
                if gently:
                    timer = threading.Timer(grace_s, _signal_group, (process, signal.SIGKILL))
                    timer.daemon = True
                    timer.start()

    def kill(self, rank: int) -> None:
        """Ends the worker of ``rank`` as a failure of its own."""
        running = self._ranks.get(rank)
        if running is not None:
            _signal_group(running.process, signal.SIGKILL)

    def drop(self, rank: int) -> None:
        """Ends the worker of ``rank``, if it has not ended, and forgets it."""
        running = self._ranks.pop(rank, None)
        if running is not None:
            running.stopped = True
            _signal_group(running.process, signal.SIGKILL)

    def reap(self, event: WorkerEnded) -> None:
        """Forgets a process whose end has been told."""
        if self._reserve.pop(event.pid, None) is not None and not event.stopped:
            self._reserve_deaths += 1
            if self._reserve_deaths == RESERVE_DEATHS_MAX:
                log.warning(
                    "workers in reserve end before they get to their session (exit code %d): from "
                    "here on they only import Paddle; see %s",
                    event.exit_code,
                    self._log_dir / RESERVE_LOG,
                )
        if event.rank is not None and self.pid(event.rank) == event.pid:
            del self._ranks[event.rank]

    def close(self) -> None:
        """Ends everything that was started here and waits for it."""
        self.stop()
        for running in self._reserve.values():
            running.stopped = True
            _signal_group(running.process, signal.SIGKILL)
        for process in self._spares:
            _signal_group(process, signal.SIGKILL)
        started = [r.process for r in (*self._ranks.values(), *self._reserve.values())]
        for process in (*started, *self._spares):
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
            env={**_clean_environment(), **env, LAUNCHER_VARIABLE: str(os.getpid())},
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

    def _follow(self, running: _Running, generation: int) -> None:
        threads = [
            threading.Thread(target=target, args=args, name=name, daemon=True)
            for target, args, name in (
                (self._pump, (running, generation), f"pump-{running.process.pid}"),
                (self._wait, (running,), f"wait-{running.process.pid}"),
            )
        ]
        for thread in threads:
            thread.start()
        self._threads = [t for t in self._threads if t.is_alive()] + threads

    def _pump(self, running: _Running, generation: int) -> None:
        output = running.process.stdout
        assert output is not None
        rank, pid = running.rank, running.process.pid
        file = self._open_log(rank, f"--- generation {generation}, pid {pid}\n")
        with output:
            while line := output.readline(OUTPUT_LINE_BYTES_MAX):
                if running.rank != rank:  # it has been given another one
                    file.close()
                    rank = running.rank
                    file = self._open_log(rank, f"--- goes on here, pid {pid}\n")
                file.write(line)
                if rank is not None:
                    self._on_line(rank, line)
        file.close()

    def _open_log(self, rank: int | None, title: str) -> _Log:
        name = RESERVE_LOG if rank is None else f"workerlog.{rank}"
        file = _Log(self._log_dir / name)
        file.write(title.encode())
        return file

    def _wait(self, running: _Running) -> None:
        process = running.process
        with contextlib.suppress(ChildProcessError):  # until it is waited for, its id is its own
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        started = _session_of(process.pid)
        _kill(started)  # data loaders hold its sockets and its output
        code = process.wait()
        ended = WorkerEnded(process.pid, running.rank, code, running.stopped, time.monotonic())
        self._on_end(ended)
        _clean_up_after(process.pid, started)

    def write_pids(self, generation: int, ready: Sequence[int]) -> None:
        """``workers.json`` in the log directory: who runs where, for people and tools.

        ``ready``: processes in reserve that wait at the door.
        """
        workers = [{"rank": r, "pid": w.process.pid} for r, w in sorted(self._ranks.items())]
        told = {"generation": generation, "workers": workers, "ready": list(ready)}
        path = self._log_dir / "workers.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # launchers may share the directory
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(told))
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
    return {k: v for k, v in without_secrets(os.environ).items() if not k.startswith(foreign)}


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
    for name in os.listdir("/proc"):
        try:
            # One system call a process: recovery waits for this, and reading all of their files
            # takes tens of milliseconds on a busy machine.
            if not name.isdigit() or os.getsid(pid := int(name)) != leader or pid == leader:
                continue
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it has ended
        if state not in "ZX":
            members.add(pid)
    return members


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
