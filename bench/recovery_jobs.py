"""The jobs of the recovery benchmark: started, watched through their step logs, hurt, ended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.drive import HERE, TORCH_PYTHON
from bench.recovery_analysis import Applied, latest, parse
from paddle_ft.agent.tether import tethered
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.schema import Keys
from paddle_ft.observe.events import read

SCRIPTS = HERE / "scripts"
POLL_S = 0.02
STEADY_STEPS = 8
"""A job is disturbed after so many steps on the world it should have."""
START_TIMEOUT_S = 90.0


class Stuck(Exception):
    """The job did not come to where it should be."""


@dataclass
class Job:
    """Processes that write step logs to ``folder/record``.

    ``units`` are what is started and, as a whole, killed: launchers, or single processes.
    """

    folder: Path
    ranks: int
    restart_units: bool = False
    """A unit that has ended is started again at once, as whoever runs the peer would do."""
    environ: dict[str, str] = field(default_factory=dict)
    units: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    lines: list[Applied] = field(default_factory=list)
    victim: int = 0
    """The process that was signalled last."""
    disturbed: list[tuple[float, float]] = field(default_factory=list)
    """From each signal until all ranks stepped again."""
    _read: dict[Path, int] = field(default_factory=dict)

    def command(self, unit: int) -> list[str]:
        raise NotImplementedError

    def count(self) -> int:
        return 1

    def start(self) -> None:
        self.record.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(exist_ok=True)
        for unit in range(self.count()):
            self.start_unit(unit)

    def start_unit(self, unit: int) -> None:
        directory = self.folder / f"unit-{unit}"
        directory.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", **self.environ}
        with (directory / "out.txt").open("ab") as out:
            self.units[unit] = subprocess.Popen(
                tethered(self.command(unit)), cwd=directory, env=env,
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def record(self) -> Path:
        return self.folder / "record"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def script(self, name: str, *more: str) -> list[str]:
        return [str(SCRIPTS / name), "--record", str(self.record), *more]

    # ------------------------------------------------------------ what it does

    def tend(self) -> None:
        """Reads what is new in the logs, and starts units again if that is somebody's part."""
        for path in self.record.glob("*.steps"):
            at = self._read.get(path, 0)
            if path.stat().st_size <= at:
                continue
            with path.open("rb") as file:
                file.seek(at)
                text = file.read().decode()
            whole = text[: text.rfind("\n") + 1]
            self._read[path] = at + len(whole.encode())
            self.lines += parse(whole)
        if self.restart_units:
            for unit, process in list(self.units.items()):
                if process.poll() is not None:
                    self.start_unit(unit)

    def alive(self) -> bool:
        return any(p.poll() is None for p in self.units.values())

    def wait(self, what: Callable[[], bool], timeout_s: float) -> bool:
        """Whether ``what`` came about in time, with the job still there."""
        until_s = time.monotonic() + timeout_s
        while True:
            self.tend()
            if what():
                return True
            if time.monotonic() >= until_s or not self.alive():
                return False
            time.sleep(POLL_S)

    def ready(self) -> bool:
        """Whatever is held in reserve is there."""
        return True

    def steady(self, since_s: float) -> bool:
        """All ranks have made some steps together since, and what is in reserve is there."""
        recent = [x for x in self.lines[-4 * STEADY_STEPS * self.ranks :] if x.at_s > since_s]
        if any(x.world != self.ranks for x in recent[-STEADY_STEPS * self.ranks :]):
            return False
        by_rank = [sum(x.rank == r for x in recent) for r in range(self.ranks)]
        return min(by_rank) >= STEADY_STEPS and self.ready()

    def await_steady(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises Stuck if the job does not run on all ranks within ``timeout_s``."""
        since_s = time.monotonic()
        if not self.wait(lambda: self.steady(since_s), timeout_s):
            raise Stuck(f"not steady within {timeout_s:g} s; see {self.folder}")

    # ------------------------------------------------------------ what is done to it

    def hurt_worker(self, number: int = signal.SIGKILL, rank: int | None = None) -> float:
        """Signals a worker, a random one unless it is named; gives when (monotonic)."""
        pids = latest(self.lines)
        pid = pids[random.randrange(self.ranks) if rank is None else rank]
        self.victim = pid
        at_s = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return at_s

    def kill_unit(self, unit: int) -> float:
        """SIGKILL for a unit and everything it has started; gives when (monotonic)."""
        process = self.units[unit]
        pids = descendants(process.pid)
        at_s = time.monotonic()
        for pid in (process.pid, *pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        return at_s

    def close(self) -> None:
        self.restart_units = False
        for process in self.units.values():
            pids = descendants(process.pid)
            for pid in (process.pid, *pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class PaddleFT(Job):
    """One launcher, or several with an etcd of their own (``nodes``)."""

    flags: Sequence[str] = ()
    arguments: Sequence[str] = ()
    spares: int = 0
    nodes: int = 0
    standby: int = 0
    """Further launchers than there are places."""
    _etcd: EmbeddedEtcd | None = None

    def count(self) -> int:
        return max(self.nodes, 1) + self.standby

    def start(self) -> None:
        if self.nodes:
            self._etcd = EmbeddedEtcd()
            self._etcd.start()
        super().start()

    def command(self, unit: int) -> list[str]:
        where: list[str] = ["--nproc_per_node", str(self.ranks)]
        if self._etcd is not None:
            at_least = max(self.nodes - 1, 1)
            where = ["--nproc_per_node", "1", "--etcd", self._etcd.endpoint,
                     "--nnodes", f"{at_least}:{self.nodes}", "--node", f"n{unit}"]  # fmt: skip
        return [
            sys.executable, "-m", "paddle_ft.launch", "--quiet", "--job_id", "bench", *where,
            "--max_restart", "1000000", "--spares", str(self.spares),
            "--log_dir", str(self.folder / f"unit-{unit}" / "log"),
            "--checkpoint", str(self.folder / "store"), *self.flags,
            *self.script("with_paddle_ft.py", *self.arguments),
        ]  # fmt: skip

    def ready(self) -> bool:
        return all(self._held(unit) for unit in self.units)

    def _held(self, unit: int) -> bool:
        """This launcher has in reserve what it should."""
        wanted = 1 if self.nodes and unit not in self._members() else self.spares
        if not wanted:
            return True
        try:
            text = (self.folder / f"unit-{unit}" / "log" / "workers.json").read_text()
            return len(json.loads(text)["ready"]) >= wanted
        except (OSError, ValueError):
            return False

    def _members(self) -> set[int]:
        """Units whose workers have made the newest steps."""
        pids = set(latest(self.lines).values())
        return {u for u, p in self.units.items() if pids & set(descendants(p.pid))}

    def named(self, after_s: float) -> list[tuple[int, float]]:
        """Process ids that were told to hang since ``after_s``, and when."""
        folders = [self.folder / f"unit-{unit}" / "log" for unit in self.units]
        told = [e for e in read(folders) if e.kind == "hung" and e.at_s > after_s]
        return [(int(e.fields["pid"]), e.at_s) for e in told]

    def paces(self, after_s: float) -> list[tuple[int, float, float]]:
        """(rank or -1 for the links, by how much slower or 0.0, when) of each naming and clearing
        since ``after_s``."""
        folders = [self.folder / f"unit-{unit}" / "log" for unit in self.units]
        told = [e for e in read(folders) if e.kind == "pace" and e.at_s > after_s]
        return [(int(e.fields["rank"]), float(e.fields["slower"]), e.at_s) for e in told]

    def leader(self) -> int:
        """The unit that leads."""
        assert self._etcd is not None
        coordinator = EtcdCoordinator(EtcdConfig(endpoints=(self._etcd.endpoint,)))
        try:
            kvs = coordinator.read(Keys("bench").leader).kvs
        finally:
            coordinator.close()
        return int(kvs[0].value.decode().partition(".")[0].removeprefix("n")) if kvs else -1

    def members(self) -> list[int]:
        return sorted(self._members())

    def close(self) -> None:
        super().close()
        if self._etcd is not None:
            self._etcd.stop()


@dataclass
class PaddleLaunch(Job):
    """``paddle.distributed.launch``: one launcher, or with ``nodes`` its elastic mode on etcd."""

    flags: Sequence[str] = ()
    nodes: str = ""
    script_steps: Sequence[str] = ()
    _etcd: EmbeddedEtcd | None = None

    def count(self) -> int:
        return self.ranks if self.nodes else 1

    def start(self) -> None:
        if self.nodes:
            self._etcd = EmbeddedEtcd()
            self._etcd.start()
            # Its etcd client does not import otherwise.
            self.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
        super().start()

    def command(self, unit: int) -> list[str]:
        where = ["--nproc_per_node", str(self.ranks)]
        if self._etcd is not None:
            where = ["--nproc_per_node", "1", "--nnodes", self.nodes, "--host", "127.0.0.1",
                     "--master", f"etcd://{self._etcd.endpoint}"]  # fmt: skip
        return [
            sys.executable, "-m", "paddle.distributed.launch", "--job_id", "bench", *where,
            "--log_dir", str(self.folder / f"unit-{unit}" / "log"), *self.flags,
            *self.script("with_paddle.py", "--state", str(self.state), *self.script_steps),
        ]  # fmt: skip

    def close(self) -> None:
        super().close()
        if self._etcd is not None:
            self._etcd.stop()


@dataclass
class Torchrun(Job):
    """``torchrun``: one agent, or with ``nodes`` one for each rank."""

    flags: Sequence[str] = ()
    nodes: str = ""
    _port: int = 0

    def count(self) -> int:
        return self.ranks if self.nodes else 1

    def command(self, unit: int) -> list[str]:
        where = ["--nproc-per-node", str(self.ranks), "--master-port", str(free_port())]
        if self.nodes:
            self._port = self._port or free_port()
            where = ["--nproc-per-node", "1", "--nnodes", self.nodes, "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", f"127.0.0.1:{self._port}", "--rdzv-id", "bench",
                     "--local-addr", "127.0.0.1"]  # fmt: skip
        return [
            str(TORCH_PYTHON), "-m", "torch.distributed.run", "--max-restarts", "1000000", *where,
            "--log-dir", str(self.folder / "torchrun"),  # else one in /tmp, which stays
            *self.flags, *self.script("with_torch.py", "--state", str(self.state)),
        ]  # fmt: skip


@dataclass
class TorchFT(Job):
    """A lighthouse and one process for each replica; a replica that has ended is started again."""

    restart_units: bool = True
    lighthouse_flags: Sequence[str] = ()
    timeout_s: float = 60.0
    lighthouse: subprocess.Popen[bytes] | None = None

    def count(self) -> int:
        return self.ranks

    def start(self) -> None:
        port = free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        program = str(TORCH_PYTHON.parent / "torchft_lighthouse")
        with (self.folder / "lighthouse.txt").open("wb") as out:
            self.lighthouse = subprocess.Popen(
                tethered([program, "--min_replicas", "1", "--bind", f"[::]:{port}",
                          *self.lighthouse_flags]),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.environ |= {"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}", "LOGLEVEL": "ERROR"}
        super().start()

    def command(self, unit: int) -> list[str]:
        more = ("--replica", str(unit), "--timeout_s", str(self.timeout_s))
        return [str(TORCH_PYTHON), *self.script("with_torchft.py", *more)]

    def close(self) -> None:
        super().close()
        if self.lighthouse is not None:
            self.lighthouse.kill()
            self.lighthouse.wait()


def has_torchft() -> bool:
    return (TORCH_PYTHON.parent / "torchft_lighthouse").exists()


def descendants(pid: int) -> list[int]:
    """Living processes that ``pid`` has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        own = children.get(left.pop(), [])
        found += own
        left += own
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
