"""The wish for a promotion, as long as somebody waits for it.

It lives under a lease of its own: nobody is made the primary by a wish of yesterday, least of all
by force.
"""

from __future__ import annotations

import logging
import math

from paddle_ft.coordination.kv import Coordinator
from paddle_ft.errors import PaddleFTError
from paddle_ft.serve import registry
from paddle_ft.serve.registry import Group, Keys, Promote

log = logging.getLogger("paddle_ft")


class Wish:
    """One, in etcd; its methods wait for it."""

    def __init__(self, coordinator: Coordinator, keys: Keys, promote: Promote) -> None:
        self.revision = 0
        """When it was made."""
        self.target = promote.target
        self._coordinator = coordinator
        self._keys = keys
        self._promote = promote
        self._lease = 0

    def make(self, timeout_s: float) -> None:
        """It ends by itself soon after ``timeout_s``. Raises CoordinationError."""
        self._lease = self._coordinator.grant(math.ceil(timeout_s) + 1)
        txn = registry.wish(self._keys, self._promote, self._lease)
        self.revision = self._coordinator.transact(txn).revision

    def take_back(self) -> None:
        """Nobody waits for it any more."""
        if not self._lease:
            return
        try:
            self._coordinator.revoke(self._lease)
        except PaddleFTError as error:
            log.debug("a wish for a promotion ends by itself: %s", error)

    def refused(self, group: Group) -> str:
        """Why it will not be fulfilled; "" as long as it may be, or where it has been."""
        if group.revision < self.revision or group.primary == self.target:
            return ""
        promote = group.promote
        if promote is None or promote.target != self.target:
            return f"{self.target} was not promoted: {group.primary or 'another wish'} came first"
        return f"{self.target} was not promoted: {promote.refused}" if promote.refused else ""
