"""Takes the snapshots of a session: what is copied, by whom, into which buffer, and when.

Invariant: at most one copy is on its way, and it is complete before the optimizer changes what it
copies (``wait_copied``). What is published is whole: a copy that was disturbed is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from paddle_ft.checkpoint import plan
from paddle_ft.checkpoint.snapshot import Snapshot, Source
from paddle_ft.exits import say
from paddle_ft.keeper import Keeper
from paddle_ft.state import Entry, TrainingState
from paddle_ft.types import ImageInfo, TensorSpec


class Recorder:
    """Snapshots of ``state`` for ``keeper``.

    Args:
        mode, block_bytes: how the replicated tensors are divided among the ranks (``plan.share``).
    """

    def __init__(
        self,
        keeper: Keeper,
        state: TrainingState,
        *,
        rank: int,
        world_size: int,
        mode: plan.Mode,
        block_bytes: int,
    ) -> None:
        self.published_step = -1
        """Step of the newest snapshot that was handed over."""
        self._keeper = keeper
        self._state = state
        self._rank = rank
        self._world_size = world_size
        self._mode: plan.Mode = mode
        self._block_bytes = block_bytes
        self._beside = True
        self._snapshot: Snapshot | None = None
        self._held_s = 0.0

    def take(self, step: int, position: Mapping[str, Any], *, wait: bool, beside: bool) -> bool:
        """Snapshots the state as that of ``step``; False if no buffer is free.

        ``wait``: for a buffer; ``beside``: go on while it is copied, and call ``wait_copied``
        before the next optimizer step. Raises StoreFull (``wait``) if there is no memory.
        """
        self.wait_copied()
        if self.published_step == step:
            return True
        start_s = time.monotonic()
        entries = self._state.entries()
        pieces = self._pieces(entries)
        meta: dict[str, Any] = {}
        if self._rank == 0:
            meta = {"position": dict(position), "state": self._state.meta()}
        acquired = self._keeper.acquire(plan.image_bytes(pieces), wait)
        if acquired is None:
            return False
        buffer, memory = acquired
        info = ImageInfo(step, self._rank, self._world_size, pieces, meta)
        by_name = {entry.name: entry for entry in entries}
        sources = []
        for piece in pieces:
            entry = by_name[piece.name]
            source = Source.of(entry.tensor, piece.start, piece.nbytes, piece.offset)
            sources.append((source, beside and self._beside and entry.steady))
        self._snapshot = Snapshot(memory, sources, self._done(buffer, info))
        self._held_s = time.monotonic() - start_s
        return True

    def wait_copied(self) -> float | None:
        """Returns once the copy that is on its way is complete: for how many seconds training was
        held for it in all; None if there was none."""
        if self._snapshot is None:
            return None
        start_s = time.monotonic()
        self._snapshot.wait()
        self._snapshot = None
        return self._held_s + time.monotonic() - start_s

    def abandon(self) -> None:
        """Throws the copy away that is on its way, if any."""
        if self._snapshot is not None:
            self._snapshot.abandon()
            self._snapshot = None

    def _pieces(self, entries: list[Entry]) -> tuple[TensorSpec, ...]:
        return plan.share(
            [entry.spec() for entry in entries],
            self._rank,
            self._world_size,
            self._block_bytes,
            self._mode,
        )

    def _done(self, buffer: int, info: ImageInfo) -> Callable[[bool], None]:
        def done(intact: bool) -> None:
            if intact:
                self.published_step = info.step
                self._keeper.publish(buffer, info)
                return
            self._keeper.give_back(buffer)
            if self._beside:
                self._beside = False
                say(
                    "parameters were changed outside of the optimizer's step while they were "
                    "copied for a checkpoint; from now on training waits for the copy"
                )

        return done
