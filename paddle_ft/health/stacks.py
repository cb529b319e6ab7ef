"""Lets the agent ask this worker for the Python stacks of its threads, whatever it is doing.

On ``SIGNAL`` they are written to a file that stands in the launcher's private directory. The file
exists only once the signal is handled; to a process without the file it must not be sent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from pathlib import Path
from typing import IO

SIGNAL = int(signal.SIGRTMIN) + 9
"""Scripts and libraries use SIGUSR1 and SIGUSR2 themselves."""
_file: IO[bytes] | None = None


def path_of(directory: Path, pid: int) -> Path:
    return directory / f"stacks-{pid}"


def install(directory: Path) -> None:
    """From now on SIGNAL writes the stacks; without a file, because of a full disk, it does not."""
    global _file
    path = path_of(directory, os.getpid())
    temporary = path.with_suffix(".new")
    try:
        file = temporary.open("wb", buffering=0)
        faulthandler.register(SIGNAL, file, all_threads=True, chain=False)
        temporary.replace(path)
    except (OSError, RuntimeError):
        return
    _file = file


def remove(directory: Path, pid: int) -> None:
    """Process ``pid`` has ended; another one may get its id, and must not be asked too early."""
    path = path_of(directory, pid)
    for left in (path, path.with_suffix(".new")):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)
