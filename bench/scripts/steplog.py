"""Writes down each step that this process has applied; needs the standard library alone."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


class StepLog:
    """``<folder>/<pid>.steps``: a line ``monotonic_s rank world_size step pid`` for each step.

    The clock is the same in all processes of a machine. A line is one write, so that one which was
    cut short can only be the last one.
    """

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._path = os.path.join(folder, f"{os.getpid()}.steps")
        self._file = -1

    def applied(self, rank: int, world_size: int, step: int) -> None:
        now_s = time.monotonic()
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._file, f"{now_s:.6f} {rank} {world_size} {step} {os.getpid()}\n".encode())


def parse(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """What all scripts are told."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--record", required=True, help="folder of the step logs")
    parser.add_argument("--state", default="", help="folder for checkpoints of the script's own")
    parser.add_argument("--every", type=int, default=10, help="steps between these")
    parser.add_argument("--sleep_s", type=float, default=0.048, help="what a step lasts, nearly")
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--mbytes", type=float, default=0.0, help="of state that is not trained")
    return parser.parse_args()


WIDTH = 64
HIDDEN = 128
SAMPLES = 24
"""Of a step, over all ranks."""
