"""Children that die with their parent, even when the parent gets SIGKILL.

``tethered(argv)`` puts this file in front of ``argv``. Started that way, the child first asks the
kernel to be killed, or sent another signal, when its parent ends (``PR_SET_PDEATHSIG``), makes sure
that the parent has not ended already, and then becomes ``argv`` by exec: same process id, nothing
in between.

Two properties of the kernel to know:

- The signal is sent when the *thread* that started the child ends. Start tethered children on the
  main thread, or on one that lives as long as the process.
- It reaches this child alone, not what the child has started in turn.

A ``preexec_fn`` could do the same but is unsafe in a process with threads, and grpc has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
EXIT_CANNOT_EXEC = 127
"""The program was not found or may not be executed; stderr says which, in one sentence."""


def tethered(argv: Sequence[str], death: int = signal.SIGKILL) -> list[str]:
    """An argv that runs ``argv`` as a child which gets ``death`` as soon as this process ends.

    It is good for children of the calling process only. The standard library alone is loaded
    before the exec: it costs some 15 ms and nothing in memory.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(death)), *argv]


def _exec(parent_pid: int, death: int, argv: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, death, 0, 0, 0) != 0:
        sys.exit(f"{argv[0]}: the kernel refuses PR_SET_PDEATHSIG, error {ctypes.get_errno()}")
    if os.getppid() != parent_pid:  # it ended before the request: nobody would ever be told
        os._exit(128 + signal.SIGKILL)
    # This interpreter ignores them for itself; an ignored signal would stay ignored after the exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"{argv[0]} cannot be started: {error.strerror}\n")
        sys.exit(EXIT_CANNOT_EXEC)


if __name__ == "__main__":
    _exec(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
