"""Keeps one lease alive, and knows until when it certainly stands.

Invariant: ``deadline()`` is never later than the moment at which etcd may end the lease. It counts
from *sending* the last renewal that was answered, so a slow answer cannot make it too late, and it
counts the time for which the machine was suspended.

What it cannot know: an etcd before 3.4.31 or 3.5.13 whose leader was frozen for longer than an
election may end or renew leases it no longer answers for (etcd issue 15247). So the deadline says
when to stop acting; that nothing is written after it is ensured by the fenced transactions alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from paddle_ft.errors import LeaseLost, PaddleFTError

logger = logging.getLogger(__name__)


class Leases(Protocol):
    """What a keeper needs of ``kv.Coordinator``."""

    def grant(self, ttl_s: int) -> int: ...

    def keep_alive(self, lease: int) -> int: ...

    def revoke(self, lease: int) -> None: ...


class LeaseKeeper:
    """Grants a lease, renews it on a daemon thread, and revokes it on ``close``.

    It goes on trying while etcd is away: etcd counts a lease anew when it comes back, so the lease
    may well outlive ``deadline()``. It ends only when etcd says that the lease has ended.
    """

    def __init__(
        self,
        coordinator: Leases,
        *,
        ttl_s: int,
        renew_interval_s: float,
        safety_margin_s: float,
        on_lost: Callable[[], None],
    ) -> None:
        """``safety_margin_s``: subtracted from the deadline; ``rpc_timeout_s`` makes sure that
        a request sent before the deadline has ended before the lease.

        ``on_lost`` is called once, on the keeper's thread.
        """
        self._coordinator = coordinator
        self._ttl_s = ttl_s
        self._renew_interval_s = renew_interval_s
        self._safety_margin_s = safety_margin_s
        self._on_lost = on_lost
        self._stopped = threading.Event()
        self._until_boottime_s = 0.0
        self._complaint = ""
        self._thread: threading.Thread | None = None
        self.lease = 0
        """0 before ``start``; the number stays when the lease has ended."""
        self.lost = False

    def start(self) -> int:
        """Grants the lease and begins to renew it; raises EtcdUnavailable."""
        sent = _boottime_s()
        self.lease = self._coordinator.grant(self._ttl_s)
        self._until_boottime_s = sent + self._ttl_s
        self._thread = threading.Thread(target=self._run, name="lease keeper", daemon=True)
        self._thread.start()
        return self.lease

    def deadline(self) -> float:
        """Time on ``time.monotonic()`` until which the lease certainly stands; past once lost.

        It differs a little from call to call when the machine was suspended in between, which
        ``time.monotonic()`` does not count: ask again each time.
        """
        if self.lost or not self.lease:
            return float("-inf")
        left_s = self._until_boottime_s - self._safety_margin_s - _boottime_s()
        return time.monotonic() + left_s

    def close(self, *, revoke: bool = True) -> None:
        """Stops renewing and gives the lease back, with its keys, if etcd can be reached."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=self._renew_interval_s)
        if revoke and self.lease and not self.lost:
            try:
                self._coordinator.revoke(self.lease)
            except PaddleFTError as error:
                logger.warning(
                    "lease %x was not given back and ends by itself: %s", self.lease, error
                )

    def _run(self) -> None:
        pause_s = self._renew_interval_s
        while not self._stopped.wait(pause_s):
            sent = _boottime_s()
            try:
                ttl_s = self._coordinator.keep_alive(self.lease)
            except LeaseLost:
                ttl_s = 0
            except PaddleFTError as error:
                self._complain(str(error))
                continue
            if self._stopped.is_set():
                return
            if ttl_s <= 0:
                self.lost = True
                logger.warning("lease %x has ended", self.lease)
                self._on_lost()
                return
            self._complaint = ""
            self._until_boottime_s = sent + ttl_s

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            logger.warning("lease %x could not be renewed: %s", self.lease, text)
        self._complaint = text


def _boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
