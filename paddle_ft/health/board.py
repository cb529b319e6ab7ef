"""What a rank is doing, on pages it shares with its agent; written without a system call.

The worker owns all words; the agent only reads. Each is one aligned 8-byte float, so a reader sees
each of them whole, though not all of one instant: an entry of a ring carries its number, which is
taken away before and set after the entry is written.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

from paddle_ft.health.phases import (
    DATA,
    JOINING,
    LOADING,
    LOOSE,
    NOTHING,
    OUTSIDE,
    OVER,
    SAVING,
    Call,
    Look,
    Step,
)

OFFSET_BYTES = 4096
"""Where the board begins in the file whose first page is the beacon."""
BOARD_BYTES = 8192
CALLS_MAX = 32
STEPS_MAX = 64
_PHASE, _SINCE, _ENTERED, _LEFT, _STEPS = range(5)
_CALLS, _CALL_WORDS = 16, 3
_STEP_RING, _STEP_WORDS = 128, 8


class Board:
    """Written by one thread, that of the training loop. Without a page it is kept for itself."""

    def __init__(self, path: str | Path = "") -> None:
        self.loose = True
        """The script's loop is its own: between two steps nobody knows what it does."""
        self._map(path)

    def move(self, path: str | Path) -> None:
        """Goes on at another page, that of another group; collectives are counted anew."""
        self._map(path)

    def _map(self, path: str | Path) -> None:
        if path:
            with open(path, "r+b") as file:
                page = mmap.mmap(file.fileno(), BOARD_BYTES, offset=OFFSET_BYTES)
            self._words = memoryview(page).cast("d")
        else:
            self._words = memoryview(bytearray(BOARD_BYTES)).cast("d")
        self._phase, self._since_s = NOTHING, time.monotonic()
        self._calls = self._steps = 0
        self._called_s = self._inside_s = 0.0
        self._spent_s = [0.0] * (OVER + 1)

    @property
    def phase(self) -> int:
        return self._phase

    def enter(self, phase: int) -> None:
        """From now on the rank is in ``phase``."""
        now_s = time.monotonic()
        self._spent_s[self._phase] += now_s - self._since_s
        self._phase, self._since_s = phase, now_s
        words = self._words
        words[_PHASE] = phase
        words[_SINCE] = now_s

    def call(self) -> None:
        """A collective is entered."""
        self._calls = number = self._calls + 1
        self._called_s = now_s = time.monotonic()
        words, at = self._words, _CALLS + number % CALLS_MAX * _CALL_WORDS
        words[at] = 0.0
        words[at + 1] = now_s
        words[at + 2] = 0.0
        words[at] = number
        words[_ENTERED] = number

    def called(self) -> None:
        """The collective has ended well."""
        now_s = time.monotonic()
        self._inside_s += now_s - self._called_s
        number, words = self._calls, self._words
        words[_CALLS + number % CALLS_MAX * _CALL_WORDS + 2] = now_s
        words[_LEFT] = number

    def step(self, share: float) -> None:
        """A step has been applied; ``share``: this rank's part of the global batch."""
        self.enter(LOOSE if self.loose else OUTSIDE)
        spent_s = self._spent_s
        total_s, saving_s, outside_s = sum(spent_s), spent_s[SAVING], spent_s[OUTSIDE]
        aside_s = outside_s + saving_s + spent_s[JOINING] + spent_s[LOADING]
        words, at = self._words, _STEP_RING + self._steps % STEPS_MAX * _STEP_WORDS
        words[at] = 0.0
        words[at + 1] = total_s
        words[at + 2] = total_s - aside_s - self._inside_s
        words[at + 3] = self._inside_s
        words[at + 4] = spent_s[DATA]
        words[at + 5] = outside_s
        words[at + 6] = saving_s
        words[at + 7] = share
        words[at] = self._calls + 1
        self._steps += 1
        words[_STEPS] = self._steps
        self._inside_s = 0.0
        self._spent_s = [0.0] * (OVER + 1)


class BoardReader:
    """The agent's side of the board in the file at ``path``."""

    def __init__(self, path: str | Path) -> None:
        with open(path, "r+b") as file:
            page = mmap.mmap(
                file.fileno(), BOARD_BYTES, mmap.MAP_SHARED, mmap.PROT_READ, 0, OFFSET_BYTES
            )
        self._words = memoryview(page).cast("d")
        self._taken = 0

    def look(self) -> Look:
        words = self._words
        left = int(words[_LEFT])  # before ``entered``: or it could seem to be the later one
        entered, since_s = int(words[_ENTERED]), words[_SINCE]
        at = _CALLS + entered % CALLS_MAX * _CALL_WORDS
        return Look(
            phase=int(words[_PHASE]),
            since_s=since_s,
            left=left,
            entered=entered,
            steps=int(words[_STEPS]),
            changed_s=max(since_s, words[at + 1], words[at + 2]),
        )

    def calls(self) -> tuple[Call, ...]:
        """The last collectives, in their order."""
        found = []
        for slot in range(CALLS_MAX):
            entry = self._entry(_CALLS + slot * _CALL_WORDS, _CALL_WORDS)
            if entry:
                found.append(Call(int(entry[0]), entry[1], entry[2]))
        return tuple(sorted(found, key=lambda call: call.number))

    def new_steps(self) -> tuple[Step, ...]:
        """Steps since the last time this was asked, as far as the board still holds them."""
        done = int(self._words[_STEPS])
        first = max(self._taken, done - STEPS_MAX + 1)  # the oldest may be written over just now
        self._taken = done
        found = []
        for index in range(first, done):
            entry = self._entry(_STEP_RING + index % STEPS_MAX * _STEP_WORDS, _STEP_WORDS)
            if entry:
                found.append(Step(int(entry[0]), *entry[1:]))
        return tuple(found)

    def _entry(self, at: int, count: int) -> list[float]:
        """Empty if it was never written, or is being written."""
        entry = [float(word) for word in self._words[at : at + count]]
        return entry if entry[0] and self._words[at] == entry[0] else []
