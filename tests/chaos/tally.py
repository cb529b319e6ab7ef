"""What happened in the repetitions of one fault, and the row of the table that it makes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.store import Store
from tests.chaos.checkpoint_leader import holds

RUNS = int(os.environ.get("CHAOS_RUNS", "50"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))


class Tally:
    """What happened in the repetitions of one fault; a row of the table."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.runs = self.saves = self.refused = self.loads = 0
        self.said: set[str] = set()
        """Sentences of the refusals, where the test wants to see them."""
        self.began_s = time.monotonic()

    def check(self, store: Store, acknowledged: int, begun: int) -> None:
        """The newest marker is of ``acknowledged``, or of the one that had ``begun``; it and all
        older ones hold what was saved."""
        head = commit.newest_head(store)
        if head is None:
            assert acknowledged == 0
            return
        assert acknowledged <= head.newest.step <= max(begun, acknowledged)
        for ref in (head.newest, *head.lineage):
            assert holds(store, ref), ref
            self.loads += 1

    def write(self) -> None:
        row = {k: v for k, v in vars(self).items() if k not in ("began_s", "said")}
        row["seconds"] = round(time.monotonic() - self.began_s)
        row["seed"] = SEED
        print(row)
        if place := os.environ.get("CHAOS_REPORT"):
            Path(place).mkdir(parents=True, exist_ok=True)
            (Path(place) / f"{self.fault}.json").write_text(json.dumps(row))


@contextlib.contextmanager
def repeated(fault: str) -> Iterator[tuple[Tally, random.Random]]:
    tally = Tally(fault)
    yield tally, random.Random(f"{SEED} {fault}")
    assert tally.runs >= RUNS
    tally.write()
