"""Registers in etcd what the workers of this node have published, for the serving group.

The group has the name of the job. Workers do not talk to etcd; while it does not answer, this tries
again, beside everything else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from paddle_ft.agent.ipc import Published
from paddle_ft.coordination.kv import Coordinator
from paddle_ft.errors import PaddleFTError
from paddle_ft.serve import registry
from paddle_ft.serve.register import register

log = logging.getLogger("paddle_ft")

WAITING_MAX = 1000
RETRY_S = 0.5
END_S = 5.0
"""How long the end of the launcher waits for what is not registered yet."""


class Registrar:
    """Takes what was published, from one thread, in the order of its versions."""

    def __init__(self, coordinator: Coordinator, job: str, say: Callable[[str], None]) -> None:
        self._coordinator = coordinator
        self._job = job
        self._say = say
        self._queue: queue.Queue[Published | None] = queue.Queue(WAITING_MAX)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, published: Published) -> None:
        """Never blocks; of what does not fit, a later version makes up for."""
        try:
            self._queue.put_nowait(published)
        except queue.Full:
            log.warning("%s %d is not registered", published.name, published.version)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="register", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = END_S) -> None:
        """Returns once all is registered, or cannot be in time: that is said then."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._closing.set()
        self._thread.join(timeout_s)
        self._closing.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while not self._closing.is_set() and (published := self._queue.get()) is not None:
            self._register(published)

    def _register(self, published: Published) -> None:
        what = f"{published.name} {published.version}"
        now = registry.Published(published.version, published.store, time.time())
        told = False
        while True:
            try:
                if register(self._coordinator, self._job, published.name, now):
                    self._say(f"published {what} to {published.store}")
                return
            except PaddleFTError as error:
                if not told:
                    log.warning("%s is published, but not registered yet: %s", what, error)
                told = True
            if self._closing.wait(RETRY_S):
                log.error(
                    "%s is in %s, but etcd does not know of it: register it by 'paddle-ft publish' "
                    "or load it by its number",
                    what,
                    published.store,
                )
                return
