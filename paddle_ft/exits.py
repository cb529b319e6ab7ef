"""How a worker process ends: one sentence on stderr and a documented exit code, no traceback.

An operating error (``PaddleFTError``) that nobody catches ends the process this way, under the
launcher and under plain ``python`` alike. An exception of the user's own script keeps its
traceback.
"""

from __future__ import annotations

import atexit
import os
import sys
from types import TracebackType
from typing import NoReturn

from paddle_ft.errors import PaddleFTError


class Leave(SystemExit):
    """Ends the process with ``code`` from within the user's loop; the reason was told already.

    Not an ``Exception``, so that the loop does not swallow it.
    """


def say(text: str) -> None:
    """One line for the user, on stderr."""
    try:
        sys.stderr.write(f"paddle_ft: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # Whoever read it has gone, which is no reason to stop training.


def end(exit_code: int) -> NoReturn:
    """Ends the process at once after the user's own clean-up (atexit) and a flush.

    The interpreter is not taken down piece by piece: threads of a process group whose peer is lost
    may hang or abort there and turn the exit code into another.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(exit_code)


def install_hook() -> None:
    """Lets uncaught operating errors of this process end it as described above."""
    if hasattr(sys, "ps1") or getattr(sys.excepthook, "of_paddle_ft", False):
        return  # In an interactive session the error is the user's to look at.
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, PaddleFTError):
            say(str(error))
            end(error.exit_code)
        before(kind, error, trace)

    hook.of_paddle_ft = True  # type: ignore[attr-defined]
    sys.excepthook = hook
