"""What holds for every test: its own temporary directory, and no process left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

# How long one example takes says more of the machine than of the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
# Under nohup launchers would ignore it, rightly, and the test that sends it would wait in vain.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Hundreds of processes start here; without bytecode each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Several processes compute on few cores: threads of each would only wait for those of the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LEAVE_S = 5.0
"""How long what a test started may take to be gone after it."""


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory() -> Iterator[Path]:
    """Sends ``tempfile`` of this process and its children to one directory, which goes at the end.

    Its name is short because the path of a Unix socket ends at 107 bytes. What runs that were
    killed have left goes first.
    """
    from paddle_ft.agent.buffers import hold, remove_leftovers

    remove_leftovers(Path(tempfile.gettempdir()), "pft-*", young_s=3600)
    with tempfile.TemporaryDirectory(prefix="pft-", ignore_cleanup_errors=True) as directory:
        hold(Path(directory))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", directory)
            patch.setattr(tempfile, "tempdir", directory)
            yield Path(directory)
        # Launchers that a test killed leave their shared memory to the next one to remove.
        remove_leftovers(Path("/dev/shm"))


def descendants(directory: Path) -> dict[int, str]:
    """Command lines of the living processes that were started with this TMPDIR.

    Orphans too, which are no longer anybody's children.
    """
    mark = f"TMPDIR={directory}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # that of a zombie is empty
                    found[int(process.name)] = command[:160]
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(own_temporary_directory: Path) -> Iterator[None]:
    """Fails a test after which a process that it started still runs, and ends the process.

    Processes of fixtures with a wider scope were there before, and may stay.
    """
    before = descendants(own_temporary_directory)
    yield
    deadline = time.monotonic() + LEAVE_S
    while left := descendants(own_temporary_directory).keys() - before.keys():
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if left:
        names = descendants(own_temporary_directory)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        lines = "\n".join(f"{pid} {names.get(pid, '')}" for pid in sorted(left))
        pytest.fail(f"the test left processes behind:\n{lines}", pytrace=False)


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """Undoes what a console or the simulator set for the loggers of the whole process."""
    logger = logging.getLogger("paddle_ft")
    before = logger.level, logger.propagate, logger.handlers[:]
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """``wait_for(condition, timeout_s=20.0)`` returns once ``condition()`` is true."""

    def wait(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {timeout_s:g} s in vain")
            time.sleep(0.02)

    return wait


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; only for tests marked ``root``."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    subprocess.run(mount, check=True, timeout=20)
    yield place
    subprocess.run(["umount", "-l", place], check=True, timeout=20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))
