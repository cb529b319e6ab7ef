"""Worker processes forked off one that has imported Paddle, which takes most of a start.

    python -m paddle_ft.serve.forks CONTROL LIFE     (file descriptors): that process

It loads no model and starts no thread, so that a fork of it is sound, and what it has in memory is
shared with all the workers. What has seen an accelerator may not be forked: there each worker
starts by itself.

Over CONTROL (SOCK_SEQPACKET) it says ``ready`` once, and is then sent the four descriptors of a
worker and one end of STATUS; it answers with the worker's number and a pidfd, and writes to STATUS
how the worker has ended.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, Protocol

from paddle_ft.config import without_secrets
from paddle_ft.serve import worker
from paddle_ft.serve.gentle import import_gently

_FORK_S = 10.0
_LOOK_S = 0.02
_READY = b"ready"


class Process(Protocol):
    """What a front does with a worker's process; ``subprocess.Popen`` is one."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float) -> object: ...


class Forked:
    """A process that is not this one's child."""

    def __init__(self, pid: int, pidfd: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """None, too, if nobody is left who could know."""
        self._pidfd, self._status = pidfd, status

    def kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout: float) -> None:
        """Returns once it has ended; raises subprocess.TimeoutExpired."""
        if self._pidfd < 0:
            return
        if self.returncode is None and self._is_over(self._status, timeout):
            with suppress(OSError, ValueError):
                self.returncode = int(self._status.recv(16))
        if not self._is_over(self._pidfd, timeout):
            raise subprocess.TimeoutExpired("worker", timeout)
        self._close()

    def _is_over(self, thing: int | socket.socket, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(thing, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def _close(self) -> None:
        os.close(self._pidfd)
        self._pidfd = -1
        self._status.close()

    def __del__(self) -> None:
        if self._pidfd >= 0:
            self._close()


class Forks:
    """Of one front; for one event loop."""

    def __init__(self) -> None:
        """Starts the process, beside whatever this one does next. Raises OSError."""
        self._lock = asyncio.Lock()
        self._is_ready = False
        self._begin()

    def _begin(self) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._life, life = socket.socketpair()
        numbers = control.fileno(), life.fileno()
        self._process = popen("paddle_ft.serve.forks", *numbers)
        control.close()
        life.close()

    def close(self) -> None:
        """Ends it; workers live on."""
        self._process.kill()
        self._process.wait()
        self._control.close()
        self._life.close()

    async def start(self, descriptors: Sequence[int], gone: Callable[[], bool]) -> Process | None:
        """A worker with these descriptors. None: it must be started in another way, or ``gone()``
        says that it is wanted no more."""
        async with self._lock:
            while not self._is_ready:
                if gone() or self._process.poll() is not None:
                    return None  # what hinders its imports, a worker of its own tells better
                with suppress(BlockingIOError):
                    self._is_ready = self._control.recv(16, socket.MSG_DONTWAIT) == _READY
                    continue
                await asyncio.sleep(_LOOK_S)
            try:
                return await asyncio.to_thread(self._ask, descriptors)
            except (OSError, ValueError):
                self._is_ready = False
                await asyncio.to_thread(self._again)
                return None

    def _again(self) -> None:
        self.close()
        self._begin()

    def _ask(self, descriptors: Sequence[int]) -> Forked:
        status, theirs = socket.socketpair()
        try:
            self._control.settimeout(_FORK_S)
            socket.send_fds(self._control, [b"fork"], [*descriptors, theirs.fileno()])
            text, given, _, _ = socket.recv_fds(self._control, 16, 1)
            return Forked(int(text), given[0], status)
        except BaseException:
            status.close()
            raise
        finally:
            theirs.close()


def popen(module: str, *descriptors: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *map(str, descriptors)]
    # Paddle's imports run at a low priority (``gentle``), which threads that they start would keep:
    # those for matrix products come later, when the predictor is told how many it may use.
    environment = {"OPENBLAS_NUM_THREADS": "1"} | without_secrets(os.environ)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=environment
    )


# ---------------------------------------------------------------- the process itself


def main() -> None:
    number, life = map(int, sys.argv[1:])
    worker.set_up(life)
    import_gently("paddle", "paddle.inference", "paddle_ft.serve.predictor")
    gc.collect()
    gc.freeze()  # a collection would write to what is shared
    if threading.active_count() > 1:
        os._exit(1)
    control = socket.socket(fileno=number)
    control.send(_READY)
    ended: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != number:
                poll.unregister(ready)
                pid, status = ended.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(OSError), status:
                    status.send(b"%d" % code)
                continue
            data, given, _, _ = socket.recv_fds(control, 16, 5)
            if not data:
                os._exit(0)
            *theirs, last = given
            pid = os.fork()
            if pid == 0:
                for each in (number, life, last, *ended):
                    os.close(each)
                for _, status in ended.values():
                    status.close()
                _work(theirs)
            for each in theirs:
                os.close(each)
            pidfd = os.pidfd_open(pid)
            ended[pidfd] = pid, socket.socket(fileno=last)
            poll.register(pidfd, select.POLLIN)
            socket.send_fds(control, [b"%d" % pid], [pidfd])


def _work(descriptors: Sequence[int]) -> NoReturn:
    from paddle_ft.serve.predictor import seed_anew

    try:
        seed_anew()
        worker.work(*descriptors)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
