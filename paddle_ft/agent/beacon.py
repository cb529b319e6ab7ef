"""One shared page a worker: where it is, written by the worker without a system call.

The pages behind it in the same file are its board (``health.board``).

The worker owns all fields; the agent only reads. Every field is one aligned 8-byte word, so a
reader sees each of them whole, though not all of one instant.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_ft.health.board import BOARD_BYTES

PAGE_BYTES = 4096
_STEP, _LOSS, _AT, _EPOCH, _SAMPLES, _STEPS_TOTAL = range(6)
_BEGAN_STEP, _BEGAN_AT, _FIRST_AT, _HELD = range(6, 10)


@dataclass(frozen=True, slots=True)
class Reading:
    step: int
    """Last step that was applied; 0 before the first."""
    loss: float
    at_s: float
    """CLOCK_MONOTONIC of that step; 0.0 before the first one of this process."""
    epoch: int
    samples: int
    """Samples of the whole job used so far."""
    steps_total: int
    """Steps the training will have, as far as known; 0 if not."""
    began_step: int = 0
    began_s: float = 0.0
    """CLOCK_MONOTONIC of the first write, when the group stood at ``began_step``; 0.0 before."""
    first_s: float = 0.0
    """CLOCK_MONOTONIC of the first step applied since; 0.0 before."""
    held_s: float = 0.0
    """For how long checkpoints have held training up since."""


class Beacon:
    """Maps ``path``; the agent creates it with ``create``, the worker opens and writes it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), PAGE_BYTES)
        self._words = np.frombuffer(self._map, dtype=np.float64)
        self._writes = 0

    @classmethod
    def create(cls, path: str | Path) -> Beacon:
        """Zeroed pages at ``path``, readable by this user only."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # Else a full disk would be a SIGBUS.
            os.posix_fallocate(descriptor, 0, PAGE_BYTES + BOARD_BYTES)
        finally:
            os.close(descriptor)
        return cls(path)

    def write(
        self,
        step: int,
        loss: float,
        epoch: int,
        samples: int,
        steps_total: int = 0,
        held_s: float = 0.0,
    ) -> None:
        """The first call tells where the worker begins, each further one a step applied."""
        words, now_s = self._words, time.monotonic()
        words[_LOSS] = loss
        words[_EPOCH] = epoch
        words[_SAMPLES] = samples
        words[_STEPS_TOTAL] = steps_total
        words[_HELD] = held_s
        words[_AT] = now_s
        words[_STEP] = step
        if self._writes < 2:
            if self._writes:
                words[_FIRST_AT] = now_s
            else:
                words[_BEGAN_STEP], words[_BEGAN_AT] = step, now_s
            self._writes += 1

    def read(self) -> Reading:
        words = self._words
        return Reading(
            step=int(words[_STEP]),
            loss=float(words[_LOSS]),
            at_s=float(words[_AT]),
            epoch=int(words[_EPOCH]),
            samples=int(words[_SAMPLES]),
            steps_total=int(words[_STEPS_TOTAL]),
            began_step=int(words[_BEGAN_STEP]),
            began_s=float(words[_BEGAN_AT]),
            first_s=float(words[_FIRST_AT]),
            held_s=float(words[_HELD]),
        )
