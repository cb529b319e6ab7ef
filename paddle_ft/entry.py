"""How a command begins and ends: with streams to write to; in one sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from paddle_ft.errors import EXIT_BUG, EXIT_SIGINT, MachineError, PaddleFTError

_SPACE = "free disk space, or set TMPDIR to a directory that has some"
_DESCRIPTORS = "end what holds files open, or raise the limit (ulimit -n)"
SHORTAGES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: "set TMPDIR to a directory that can be written",
    errno.EAGAIN: "end processes that are not needed, or raise the limit on them (ulimit -u)",
    errno.ENOMEM: "free memory",
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: _DESCRIPTORS,
}
"""What to do about what the kernel refuses a command."""


def entry(run: Callable[[], int]) -> int:
    """The exit code of ``run``, of a process that takes its signals over once it runs."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
    logging.basicConfig(format="[paddle_ft] %(message)s", level=logging.WARNING)
    before = signal.signal(signal.SIGTERM, _stop_before_it_runs)
    try:
        return exit_code_of(run, "paddle_ft")
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code_of(run: Callable[[], int], program: str) -> int:
    """What ``run`` gives; operating errors end in one sentence and their exit code."""
    try:
        with one_sentence_for_shortages():
            return run()
    except PaddleFTError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except Exception:
        logging.getLogger("paddle_ft").exception("a defect of paddle_ft; please report this")
        return EXIT_BUG


def _stop_before_it_runs(number: int, _frame: object) -> NoReturn:
    """Until the agent takes the signal over: what was started is undone on the way out."""
    sys.stderr.write(f"paddle_ft: stopped by {signal.Signals(number).name} before it began\n")
    raise SystemExit(128 + number)


@contextlib.contextmanager
def one_sentence_for_shortages() -> Iterator[None]:
    """Turns what the kernel says when something has run out into MachineError."""
    try:
        yield
    except OSError as error:
        if error.errno not in SHORTAGES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise MachineError(
            f"{where}{error.strerror}; {SHORTAGES[error.errno]}, and start again"
        ) from error
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise MachineError(f"{error}; {SHORTAGES[errno.EAGAIN]}, and start again") from error
