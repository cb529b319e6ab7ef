"""What has happened to a job, one JSON line an event, in ``events.jsonl`` of a launcher's log dir.

Invariant: an event costs the loop an entry in a bounded queue. A thread writes; what it cannot
write, because the disk is full or slow, is dropped and counted, and training goes on.

Each line has ``run`` (which life of which launcher), ``kind``, ``wall_s`` (since 1970), ``at_s``
(CLOCK_MONOTONIC of when it happened), and by kind:

    started         node, job, pid, slots         the launcher begins
    registered      member                        it is known to the others, under this id
    members         live, needed                  nodes that could take part, and the minimum
    leader          member                        "" while there is none
    quarantine      nodes                         those in quarantine; not told before there is one
    generation      number, members, world_size, in_place, planned, restarts, restore_step, reason,
                    here (this node is a member)  restore_step is -1 without a checkpoint
    trouble         generation, lost, collateral, reason      it cannot go on; lost: members that
                    are gone; collateral: whose own fault it is, is not known yet
    worker_started  rank, pid, generation
    order           rank, pid, generation         a living worker goes on in another generation
    hello           rank, pid, generation, recovery      it has come to its session; 0: in reserve
    formed          generation, step              the group stands; with the state of this step
    first_step      generation, step              the first one applied since, and exactly when
    progress        generation, step, step_s, samples, held_s
                    about once a second, and when something else happens: the last step applied, the
                    CLOCK_MONOTONIC of it, and how long checkpoints have held training up since the
                    generation began
    lost_peer       rank, pid, generation, reason
    hung            rank, pid, generation, collective, still_s, reason   it is ended
    pace            rank (-1: the links), generation, slower    named as slow; 0: not any more
    link            nodes (one: all of its; two: that between them; none: not any more), generation,
                    reason                        which one it is; told by the first node of it
    farewell        rank, pid, why, reason, step  a worker says why it is about to end
    worker_ended    rank (None: in reserve), pid, exit_code, signal (0: none), stopped (by us),
                    generation                    the one that runs here now
    stored          generation, step, ok          this node's part of a snapshot is written, or not
    commit          generation, step, sequence
    pause           generation, reason            all workers are to save and leave
    leaving                                       this node was asked to leave
    outcome         exit_code, reason             the job has ended
    ended           exit_code, reason             the launcher ends; missing if it was killed
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from paddle_ft.types import Event

FILE = "events.jsonl"
OLDER = "events.1.jsonl"
BYTES_MAX = 4 * 2**20
"""A file that is longer becomes the older one, and the older one before goes."""
QUEUE_MAX = 2000
CLOSE_S = 2.0
"""How long the end waits for a slow disk."""

__all__ = ["FILE", "Event", "EventLog", "read"]


class EventLog:
    """Appends to ``directory/events.jsonl``. ``add`` is thread-safe and never blocks or raises.

    Launchers may share the directory: each line is appended as a whole.
    """

    def __init__(self, directory: str | Path, run: str, bytes_max: int = BYTES_MAX) -> None:
        self.dropped = 0
        """Events that could not be written."""
        self._path = Path(directory) / FILE
        self._run = run
        self._bytes_max = bytes_max
        self._queue: queue.Queue[bytes | threading.Event | None] = queue.Queue(QUEUE_MAX)
        self._torn = False
        self._thread = threading.Thread(target=self._write_all, name="events", daemon=True)
        self._thread.start()

    def add(self, kind: str, *, at_s: float | None = None, **fields: Any) -> None:
        """``at_s``: CLOCK_MONOTONIC of when it happened, if that was not now."""
        now_s = time.monotonic()
        at_s = now_s if at_s is None else at_s
        wall_s = time.time() - (now_s - at_s)
        head = {"run": self._run, "kind": kind, "wall_s": round(wall_s, 6), "at_s": round(at_s, 6)}
        line = json.dumps(head | fields, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Returns once all that was added is written or dropped; False if that takes longer."""
        written = threading.Event()
        try:
            self._queue.put(written, timeout=timeout_s)
        except queue.Full:
            return False
        return written.wait(timeout_s)

    def close(self) -> None:
        """Writes what is left, unless that takes too long."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._append(item)
            except OSError:
                self.dropped += 1

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if self._torn:
                line = b"\n" + line
            written = os.write(descriptor, line)
            self._torn = written < len(line)
            self.dropped += self._torn
            if os.fstat(descriptor).st_size > self._bytes_max:
                with contextlib.suppress(OSError):
                    self._path.replace(self._path.with_name(OLDER))
        finally:
            os.close(descriptor)


def read(directories: Iterable[str | Path]) -> list[Event]:
    """All events in the log directories (or files) given, in the order in which they were written.

    Lines that are cut or not ours are left out. Raises OSError if one cannot be read.
    """
    found: dict[str, None] = {}
    for directory in map(Path, directories):
        places = [directory / OLDER, directory / FILE] if directory.is_dir() else [directory]
        for place in places:
            if place.exists():
                found[os.path.realpath(place)] = None
    return [event for place in found for event in _read_one(Path(place).read_bytes())]


def _read_one(data: bytes) -> Iterator[Event]:
    for line in data.split(b"\n"):
        if (event := parse(line)) is not None:
            yield event


def parse(line: bytes) -> Event | None:
    """The event of one line; None if it is not one."""
    try:
        fields = json.loads(line)
        run, kind = str(fields.pop("run")), str(fields.pop("kind"))
        wall_s, at_s = float(fields.pop("wall_s")), float(fields.pop("at_s"))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return Event(run, kind, wall_s, at_s, fields)
