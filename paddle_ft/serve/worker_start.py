"""The first steps of a worker process: it gives way until it has imported what it needs.

    worker_start.py SOCKET LIFE INPUTS OUTPUTS     (see ``worker``)

Run by its path, since the package alone takes half a second of a processor to import, and what
serves beside needs that. Until then it has the standard library alone.

Invariant: it ends with its front. The kernel sends SIGIO when the other end of LIFE is closed,
whatever this process is doing: Paddle 3 holds the interpreter's lock while it computes.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import select
import signal
import sys


def main() -> None:
    die_with(int(sys.argv[2]))
    # What is sent to the whole group or session is the front's to answer: it drains.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # numpy and Paddle each start threads of OpenBLAS when they are imported, which would keep the
    # low priority and compute. Paddle starts its own later, as many as its predictor is to have.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    gentle = runpy.run_path(os.path.join(os.path.dirname(__file__), "gentle.py"))
    gentle["import_gently"]("paddle_ft.serve.worker", "paddle_ft.serve.predictor")

    from paddle_ft.serve import worker

    worker.main()


def die_with(life: int) -> None:
    """Ends this process when the other end of the socket ``life`` is closed."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(life, fcntl.F_GETFL)
    fcntl.fcntl(life, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    if select.select([life], [], [], 0)[0]:  # closed before this was said
        os._exit(0)


if __name__ == "__main__":
    main()
