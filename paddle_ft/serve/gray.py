"""Lets this replica in slowly: what ``ramp`` decides, from its group and its own answers."""

from __future__ import annotations

import logging
import time

from paddle_ft.serve import ramp
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.ramp import Answers, Ramp, Seen
from paddle_ft.serve.replicated import Replicated

log = logging.getLogger("paddle_ft")


class Gray:
    def __init__(self, over_s: float) -> None:
        self._ramp = Ramp(over_s)
        self._seen = Seen()
        self._primary = ""
        """The last one that was seen."""

    @property
    def share(self) -> float:
        return self._ramp.share

    @property
    def why(self) -> str:
        """Why it gets nothing for now; "" if it does."""
        return f"taken back out: {self._ramp.why}" if self._ramp.why else ""

    def look(self, group: Replicated, catalog: Catalog, serves: bool) -> None:
        """To be called every now and then."""
        now_s, answers, before = time.monotonic(), answered(catalog), self._seen
        self._seen = ramp.seen(group.group, group.name, serves, self._primary)
        self._primary = group.group.primary or self._primary
        share, why = self._ramp.share, self._ramp.why
        if ramp.begins(before, self._seen):
            self._ramp.begin(now_s, answers)
        elif self._ramp.active and ramp.is_moot(self._seen):
            self._ramp.end()
        else:
            self._ramp.look(now_s, answers)
        if self._ramp.why and not why:
            log.warning("this replica is taken back out: %s", self._ramp.why)
        elif self._ramp.share != share:
            log.info("this replica gets %.0f %% of its share", 100 * self._ramp.share)


def answered(catalog: Catalog) -> Answers:
    """By all versions that are served."""
    figures = [batcher.figures for batcher in catalog.batchers()]
    return Answers(
        sum(f.success.count for f in figures),
        sum(f.errors for f in figures),
        sum(f.success.ns for f in figures) / 1e9,
    )
