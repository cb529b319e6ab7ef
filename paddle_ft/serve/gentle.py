"""Imports that give way: what starts must not slow down what already serves beside it."""

from __future__ import annotations

import importlib
import os
import threading
from contextlib import suppress

_NICE = 19


def import_gently(*modules: str) -> None:
    """Imports ``modules`` at the lowest priority; raises what the imports raise.

    On Linux a priority is a thread's own, and only root may raise it again: so it is a thread that
    ends, and the process keeps the priority that it had. Threads that an import starts (pools of
    numeric libraries) keep the low one; only modules that start none, or none that compute, are
    for here.
    """
    errors: list[BaseException] = []

    def load() -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            for module in modules:
                importlib.import_module(module)
        except BaseException as error:  # noqa: BLE001 - raised below, by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=load, name="import", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
