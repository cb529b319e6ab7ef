"""What a person sees of a launcher: its own words, the workers' output, one progress line.

Everything goes to standard error but the workers' lines, which go to standard output. On a
terminal the progress line stays at the bottom and is redrawn; elsewhere it is printed now and then.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TextIO

from paddle_ft.agent.beacon import Reading
from paddle_ft.types import Generation

REDRAW_S = 0.5
PRINT_S = 10.0
FIRST_S = 2.0
"""What takes less at the start needs no progress line."""
RATE_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    reading: Reading | None
    generation: int
    world_size: int
    committed_step: int
    """-1: nothing is committed yet."""
    store_trouble: str
    doing: str


class Console:
    """Thread-safe. ``quiet``: no progress line."""

    def __init__(self, node: str, quiet: bool = False) -> None:
        self._node = node
        self._quiet = quiet
        self._lock = threading.Lock()
        self._drawn = 0
        self._terminal = sys.stderr.isatty()
        self._next_s = time.monotonic() + FIRST_S
        self._steps: deque[tuple[float, int]] = deque()
        self._last = ""
        self._handler = _LogHandler(self)
        logger = logging.getLogger("paddle_ft")
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def say(self, text: str) -> None:
        """One line of the launcher's own."""
        self._write(sys.stderr, f"[paddle_ft] {text}\n")

    def worker_line(self, rank: int, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\n")
        self._write(sys.stdout, f"[rank {rank}] {text}\n")

    def generation(self, generation: Generation, me: str) -> None:
        """Tells what begins, and from where."""
        restore = generation.restore
        start = f"from the checkpoint of step {restore.step}" if restore else "from the beginning"
        if generation.in_place:
            start = "in place"
        first = generation.first_rank(me)
        slots = next(m.slots for m in generation.members if m.id == me)
        ranks = f"rank {first}" if slots == 1 else f"ranks {first}-{first + slots - 1}"
        self.say(
            f"generation {generation.number}: {_count(generation.world_size, 'rank')} on "
            f"{_count(len(generation.members), 'node')}, {ranks} here ({self._node}), {start}; "
            f"{generation.reason}"
        )
        self._steps.clear()

    def end(self, exit_code: int, reason: str) -> None:
        told = "done" if exit_code == 0 else f"ended with exit code {exit_code}"
        self.say(f"{told}: {reason}")

    def progress(self, progress: Progress) -> None:
        """Draws or prints the line when it is time to."""
        now_s = time.monotonic()
        if self._quiet or now_s < self._next_s:
            return
        self._next_s = now_s + (REDRAW_S if self._terminal else PRINT_S)
        line = self._line(progress, now_s)
        if self._terminal:
            self._redraw(line)
        elif line != self._last:
            self.say(line)
        self._last = line

    def _line(self, progress: Progress, now_s: float) -> str:
        reading = progress.reading
        if reading is None or reading.at_s == 0.0:
            return progress.doing
        self._steps.append((now_s, reading.step))
        while len(self._steps) > 2 and now_s - self._steps[0][0] > RATE_WINDOW_S:
            self._steps.popleft()
        span_s, steps = now_s - self._steps[0][0], reading.step - self._steps[0][1]
        rate = f" · {steps / span_s:.1f} steps/s" if span_s > 0.2 else ""
        total = f"/{reading.steps_total}" if reading.steps_total else ""
        saved = f"{progress.committed_step}" if progress.committed_step >= 0 else "none yet"
        waits = " (the store is in trouble)" if progress.store_trouble else ""
        loss = f" · loss {reading.loss:.4f}" if reading.step > 0 else ""
        return (
            f"step {reading.step}{total}{rate}{loss} · world "
            f"{progress.world_size} · generation {progress.generation} · checkpoint {saved}{waits}"
        )

    def _redraw(self, line: str) -> None:
        with self._lock:
            try:
                sys.stderr.write(f"\r\x1b[K{line}")
                sys.stderr.flush()
            except (OSError, ValueError):
                self._terminal = False  # it was closed
            self._drawn = len(line) if self._terminal else 0

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            try:
                if self._drawn:
                    self._drawn = 0
                    sys.stderr.write("\r\x1b[K")
                    sys.stderr.flush()
                stream.write(text)
                stream.flush()
            except (OSError, ValueError):
                pass  # nobody reads any more; training goes on

    def close(self) -> None:
        logging.getLogger("paddle_ft").removeHandler(self._handler)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _LogHandler(logging.Handler):
    """Warnings, and what is marked ``tell`` though nothing is wrong."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or getattr(record, "tell", False)

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(self.format(record))
