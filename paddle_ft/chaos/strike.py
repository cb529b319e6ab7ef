"""The hands that do the faults of a plan to processes, networks, disks and stores.

Only what was named is touched: children of the job's own launchers, the etcd members and network
namespaces of the plan, a directory on a small file system of its own. Everything that can be
taken back is, after its time or at the end.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from paddle_ft.agent.tether import tethered
from paddle_ft.chaos import network
from paddle_ft.chaos.plan import EtcdMember, Fault, Plan
from paddle_ft.chaos.proxy import StoreProxy
from paddle_ft.chaos.report import Struck
from paddle_ft.chaos.watch import Launcher, descendants

FILL_BYTES_MAX = 2**30
FILLER = "paddle_ft-chaos-filler"


class Refused(Exception):
    """The fault cannot be done, and why."""


class NoVictim(Refused):
    """There is nobody to hit just now; there may be in a moment."""


@dataclass
class Hands:
    """``strike`` does a fault, ``tend`` takes back what is due, ``close`` what is left.

    ``launchers`` tells who runs now; ``begin_again`` starts the launcher of a node once more, and
    ``expect`` is told before it is killed whether it will be.
    Not thread-safe. Etcd members are started again on the calling thread, and live as long as it.
    """

    plan: Plan
    launchers: Callable[[], Sequence[Launcher]]
    begin_again: Callable[[str], object] = lambda _node: None
    expect: Callable[[str, bool], object] = lambda _node, _back: None
    proxy: StoreProxy | None = None
    _due: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    _etcd_pids: dict[str, int] = field(default_factory=dict)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def strike(self, fault: Fault) -> Struck:
        """Raises NoVictim; what is refused for good is told in the result."""
        acts: dict[str, Callable[[Fault], str]] = {
            "kill-worker": self._worker,
            "stop-worker": self._worker,
            "kill-node": self._kill_node,
            "stop-node": self._stop_node,
            "kill-etcd-leader": self._kill_etcd,
            "kill-etcd": self._kill_etcd,
            "stop-etcd-leader": self._stop_etcd,
            "partition": self._network,
            "slow-network": self._network,
            "full-disk": self._fill,
            "store-errors": self._store,
        }
        try:
            victim = acts[fault.kind](fault)
        except NoVictim:
            raise
        except (Refused, network.CommandFailed, OSError, subprocess.SubprocessError) as error:
            return Struck(str(fault), "", time.monotonic(), " ".join(str(error).split()))
        return Struck(str(fault), victim, time.monotonic())

    def tend(self) -> None:
        now_s = time.monotonic()
        due = [act for at_s, act in self._due if at_s <= now_s]
        self._due = [(at_s, act) for at_s, act in self._due if at_s > now_s]
        for act in due:
            with suppress(OSError, subprocess.SubprocessError, Refused, network.CommandFailed):
                act()

    def close(self) -> None:
        """Thaws, heals and frees; nobody is started any more."""
        self.begin_again = lambda _node: None
        self._due = [(0.0, act) for _, act in self._due]
        self.tend()
        for process in self._started:
            process.kill()
            process.wait()

    def _later(self, after_s: float, act: Callable[[], object]) -> None:
        if not math.isinf(after_s):
            self._due.append((time.monotonic() + after_s, act))

    # ------------------------------------------------------------ workers and nodes

    def _worker(self, fault: Fault) -> str:
        rank, node = fault.get("rank"), fault.get("node")
        there = [w for launcher in self.launchers() for w in launcher.workers()]
        fits = [w for w in there if rank in ("", str(w.rank)) and node in ("", w.node)]
        if not fits:
            raise NoVictim("no such worker runs")
        victim = fits[fault.pick % len(fits)]
        try:
            if fault.kind == "kill-worker":
                os.kill(victim.pid, signal.SIGKILL)
            else:
                os.kill(victim.pid, signal.SIGSTOP)
                self._later(fault.seconds("for"), lambda: _send(victim.pid, signal.SIGCONT))
        except ProcessLookupError:
            raise NoVictim("it has just ended") from None
        return f"rank {victim.rank}" + (f" on {victim.node}" if victim.node else "")

    def _launcher(self, fault: Fault) -> Launcher:
        node = fault.get("node")
        fits = [one for one in self.launchers() if node in ("", one.node)]
        if not fits:
            raise NoVictim("no such launcher runs")
        return fits[fault.pick % len(fits)]

    def _kill_node(self, fault: Fault) -> str:
        launcher = self._launcher(fault)
        below = descendants(launcher.pid)
        self.expect(launcher.node, not math.isinf(fault.seconds("back")))
        for pid in (launcher.pid, *below):
            _send(pid, signal.SIGKILL)
        self._later(fault.seconds("back"), lambda: self.begin_again(launcher.node))
        return f"node {launcher.node or 'of the job'}"

    def _stop_node(self, fault: Fault) -> str:
        launcher = self._launcher(fault)
        pids = (launcher.pid, *descendants(launcher.pid))
        for pid in pids:
            _send(pid, signal.SIGSTOP)

        def thaw() -> None:
            for pid in reversed(pids):
                _send(pid, signal.SIGCONT)

        self._later(fault.seconds("for"), thaw)
        return f"node {launcher.node or 'of the job'}"

    # ------------------------------------------------------------ etcd

    def _member(self, fault: Fault) -> tuple[EtcdMember, int]:
        if fault.kind == "kill-etcd":
            named = fault.get("member")
            fits = [m for m in self.plan.etcd if named in ("", m.endpoint)]
            member = fits[fault.pick % len(fits)] if fits else None
        else:
            member = next((m for m in self.plan.etcd if leads(m.endpoint)), None)
        if member is None:
            raise NoVictim("no such etcd member answers")
        pid = self._etcd_pids.get(member.endpoint, member.pid)
        if not pid and member.pid_file:
            pid = int(Path(member.pid_file).read_text())
        if not pid or b"etcd" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise Refused(f"process {pid} is not the etcd of {member.endpoint}")
        return member, pid

    def _kill_etcd(self, fault: Fault) -> str:
        member, pid = self._member(fault)
        argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        argv[0] = os.readlink(f"/proc/{pid}/exe")
        directory = os.readlink(f"/proc/{pid}/cwd")
        if namespace := network.of_process(pid):
            argv = [*network.inside(namespace), *argv]
        os.kill(pid, signal.SIGKILL)

        def again() -> None:
            process = subprocess.Popen(
                tethered(argv),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._started.append(process)
            self._etcd_pids[member.endpoint] = process.pid

        self._later(fault.seconds("back"), again)
        return f"etcd {member.endpoint}"

    def _stop_etcd(self, fault: Fault) -> str:
        member, pid = self._member(fault)
        os.kill(pid, signal.SIGSTOP)
        self._later(fault.seconds("for"), lambda: _send(pid, signal.SIGCONT))
        return f"etcd {member.endpoint}"

    # ------------------------------------------------------------ network, disk, store

    def _network(self, fault: Fault) -> str:
        if os.geteuid() != 0:
            raise Refused("only root can change a network namespace")
        fits = [n for n in self.plan.nodes if n.namespace and fault.get("node") in ("", n.name)]
        if not fits:
            raise Refused("no node of the plan is in a network namespace of its own")
        namespace = fits[fault.pick % len(fits)].namespace
        if fault.kind == "partition":
            undo = network.cut(namespace)
        else:
            undo = network.slow(namespace, fault.get("rate"), fault.seconds("latency"))
        self._later(fault.seconds("for"), lambda: [network.run(argv) for argv in undo])
        return f"namespace {namespace}"

    def _fill(self, fault: Fault) -> str:
        place = Path(fault.get("dir"))
        device = place.stat().st_dev
        shared = ("/", tempfile.gettempdir(), os.getcwd())
        if any(Path(other).stat().st_dev == device for other in shared):
            raise Refused(f"{place} is on a file system that others need: give one of its own")
        free = shutil.disk_usage(place).free
        if free > FILL_BYTES_MAX:
            raise Refused(
                f"{place} has more than {FILL_BYTES_MAX >> 30} GiB free: give a small one"
            )
        filler = place / FILLER
        self._later(fault.seconds("for"), lambda: filler.unlink(missing_ok=True))
        with filler.open("wb", buffering=0) as stream:
            with suppress(OSError):
                os.posix_fallocate(stream.fileno(), 0, max(1, free))
            with suppress(OSError):  # what fallocate did not get
                while True:
                    stream.write(bytes(4096))
        return str(place)

    def _store(self, fault: Fault) -> str:
        proxy = self.proxy
        if proxy is None:
            raise Refused("the checkpoints are not in an S3 store with a checkpoint.endpoint_url")
        proxy.fail(fault.get("answer"))
        self._later(fault.seconds("for"), lambda: proxy.fail(""))
        return proxy.target


def leads(endpoint: str) -> bool:
    """Whether the etcd member at ``endpoint`` (host:port, or a URL) is the leader."""
    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port or 2379, timeout=1.0)
    try:
        connection.request("POST", "/v3/maintenance/status", "{}")
        told = json.loads(connection.getresponse().read())
        return bool(told["leader"] == told["header"]["member_id"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return False
    finally:
        connection.close()


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
