"""Work that gives way: what starts must not slow down what already serves beside it.

Imports the standard library alone, so that it can come before any other import.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
_NICE = 19


def gently(work: Callable[[], T]) -> T:
    """``work()`` at the lowest priority; raises what it raises.

    On Linux a priority is a thread's own, and only root may raise it again: so it is a thread that
    ends, and the process keeps the priority that it had. Threads that are started by ``work``
    (pools of numeric libraries) keep the low one: only what starts none, or none that compute, is
    for here.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised below, by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="gentle", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def import_gently(*modules: str) -> None:
    """Imports ``modules`` in their order; raises what the imports raise."""

    def load() -> None:
        for module in modules:
            importlib.import_module(module)

    gently(load)
