"""What the ranks of a job are seen to do: their beacons, looked at every few milliseconds.

Bounded: a training of millions of steps keeps the newest ``SAMPLES_MAX`` samples.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paddle_ft.agent.beacon import Beacon
from paddle_ft.chaos.report import Group, Sample, all_beyond

LOOK_S = 0.003
LIST_S = 0.012
"""How often directories are listed for pages of a new group."""
SAMPLES_MAX = 2_000_000


@dataclass(frozen=True, slots=True)
class Worker:
    node: str
    rank: int
    pid: int
    launcher: int
    """Process id."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher that runs on this machine."""

    node: str
    pid: int
    log_dir: Path
    era: int = 0

    def run_dirs(self) -> list[Path]:
        places = dict.fromkeys((tempfile.gettempdir(), "/tmp"))  # noqa: S108  as launch.run does
        return [d for place in places for d in Path(place).glob(f"paddle_ft-{self.pid}-run-*")]

    def workers(self) -> list[Worker]:
        """Those of its children that it says are workers, in the order of ranks."""
        try:
            told = json.loads((self.log_dir / "workers.json").read_text())
            listed = [(int(w["rank"]), int(w["pid"])) for w in told["workers"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [
            Worker(self.node, rank, pid, self.pid)
            for rank, pid in sorted(listed)
            if parent_of(pid) == self.pid
        ]


def parent_of(pid: int) -> int | None:
    """None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]) if fields[0] not in "ZX" else None


def descendants(pid: int) -> list[int]:
    """Living processes below ``pid``, without itself."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (parent := parent_of(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


class Watch:
    """Samples the pages of ``launchers()`` on a thread, from ``start`` to ``close``."""

    def __init__(self, launchers: Callable[[], Iterable[Launcher]]) -> None:
        self._launchers = launchers
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self._pages: dict[tuple[Group, int, Path], Beacon] = {}
        self._last: dict[tuple[Group, int, Path], int] = {}
        self._newest: Group = (0, 0)
        self.log_dirs: set[Path] = set()
        """Of all launchers that were seen."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)

    def samples(self) -> list[Sample]:
        return list(self._samples.copy())

    def running(self) -> bool:
        """Whether all ranks of the newest group have made a step in it."""
        own = [s for s in self.samples() if s.group == self._newest]
        return all_beyond(own, None, 0.0) is not None

    def _run(self) -> None:
        listed_s = 0.0
        while not self._stop.wait(LOOK_S):
            now_s = time.monotonic()
            if now_s - listed_s >= LIST_S:
                listed_s = now_s
                self._list(now_s)
            self._look()
        self._look()

    def _list(self, now_s: float) -> None:
        for launcher in self._launchers():
            self.log_dirs.add(launcher.log_dir)
            for directory in launcher.run_dirs():
                for path in _pages_in(directory):
                    number, rank = (int(part) for part in path.name.split("-")[1:])
                    key = ((launcher.era, number), rank, directory)
                    if key in self._last:
                        continue
                    with suppress(OSError, ValueError):  # removed, or not whole yet
                        self._pages[key] = Beacon(path)
                        self._last[key] = -1
                        self._newest = max(self._newest, key[0])
                        self._samples.append(Sample(now_s, key[0], rank, -1))
        for key in [k for k in self._pages if k[0] < self._newest]:
            self._see(key)
            if (self._newest[0], self._newest[1] - 1) > key[0]:
                del self._pages[key]

    def _look(self) -> None:
        for key in list(self._pages):
            self._see(key)

    def _see(self, key: tuple[Group, int, Path]) -> None:
        reading = self._pages[key].read()
        if reading.at_s and reading.step != self._last[key]:
            self._last[key] = reading.step
            self._samples.append(Sample(reading.at_s, key[0], key[1], reading.step))


def _pages_in(directory: Path) -> list[Path]:
    """None, if its launcher removes it just now."""
    try:
        return list(directory.glob("beacon-*-*"))
    except OSError:
        return []
