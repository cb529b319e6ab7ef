"""Takes the snapshots of a session: what is copied, by whom, into which buffer, and when.

Invariant: at most one copy is on its way, and what the optimizer changes is in it before it does
(``before_step``). What is published is whole: a copy that was disturbed is thrown away.

Parameters that are not trained are copied beside the steps that follow once they have been the same
in two snapshots; others of them (a moving average that the forward pass keeps) are copied at once.
Paddle does not count every way of writing to them, so such a copy counts only if it is, byte by
byte, what the snapshot before has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from paddle_ft.checkpoint import plan
from paddle_ft.checkpoint.snapshot import Outcome, Snapshot, Source, fingerprint, in_place
from paddle_ft.exits import say
from paddle_ft.keeper import Keeper
from paddle_ft.nested import Entry
from paddle_ft.state import TrainingState
from paddle_ft.types import Changes, ImageInfo, TensorSpec


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
        """False once something has changed that only the optimizer's step should."""
        self._seldom_beside = True
        """The same of what changes seldom."""
        self._seldom: dict[str, tuple[Any, ...]] = {}
        """By tensor and start of what changes seldom: where it was and some of its words."""
        self._watched: dict[str, tuple[Source, Changes]] = {}
        """By the same: what the snapshot on its way copies of it, and when."""
        self._fingerprints: dict[str, bytes] = {}
        """By the same: of what the last snapshot has, if that is whole."""
        self._snapshot: Snapshot | None = None
        self._told = True
        """For how long training was held for the copy that is on its way has been told."""
        self._loss: Any = None
        self._held_s = 0.0
        self._known: dict[int, tuple[Any, TensorSpec, bool]] = {}
        """Tensor, spec, and whether it can be copied from where it lies, by id of the tensor.

        Of tensors that only the optimizer changes, shape and place stay as they are.
        """
        self._specs: tuple[TensorSpec, ...] = ()
        self._pieces: tuple[TensorSpec, ...] = ()

    def take(self, step: int, position: Mapping[str, Any], *, wait: bool, beside: bool) -> bool:
        """Snapshots the state as that of ``step``; False if no buffer is free.

        ``wait``: for a buffer; ``beside``: go on while it is copied, and call ``before_step``
        before the next optimizer step. Raises StoreFull (``wait``) if there is no memory.
        """
        start_s = time.monotonic()
        self.wait_copied()
        if self.published_step == step:
            return True
        entries = self._state.entries()
        pieces = self._divide(entries)
        meta: dict[str, Any] = {}
        if self._rank == 0:
            meta = {"position": dict(position), "state": self._state.meta()}
            meta["metrics"] = metrics_of(self._loss)
        acquired = self._keeper.acquire(plan.image_bytes(pieces), wait)
        if acquired is None:
            return False
        buffer, memory = acquired
        info = ImageInfo(step, self._rank, self._world_size, pieces, meta)
        sources = self._sources(entries, beside and self._beside)
        self._snapshot = Snapshot(memory, sources, self._done(buffer, memory, info))
        self._held_s, self._told = time.monotonic() - start_s, False
        return True

    def before_step(self, loss: Any) -> float | None:
        """To be called before the optimizer changes anything: returns once that may be.

        Gives for how many seconds training was held for a snapshot in all; None if there was none
        since the last call. ``loss`` of the step (a number, a tensor or None) is kept with the
        snapshots by rank 0.
        """
        self._loss = loss
        if self._snapshot is None or self._told:
            return None
        start_s = time.monotonic()
        self._snapshot.wait_steady()
        self._told = True
        return self._held_s + time.monotonic() - start_s

    def wait_copied(self) -> None:
        """Returns once the copy that is on its way is complete."""
        if self._snapshot is not None:
            self._snapshot.wait()
            self._snapshot = None

    def abandon(self) -> None:
        """Throws the copy away that is on its way, if any."""
        if self._snapshot is not None:
            self._snapshot.abandon()
            self._snapshot = None

    def _divide(self, entries: list[Entry]) -> tuple[TensorSpec, ...]:
        """The pieces this rank copies; worked out anew only when something has changed."""
        known: dict[int, tuple[Any, TensorSpec, bool]] = {}
        specs = []
        for entry in entries:
            number = id(entry.tensor)
            item = self._known.get(number)
            if item is None or item[0] is not entry.tensor or item[1].name != entry.name:
                item = entry.tensor, entry.spec(), in_place(entry.tensor)
            if entry.changes != "any time":
                known[number] = item
            specs.append(item[1])
        self._known = known
        if self._specs != tuple(specs):
            self._specs = tuple(specs)
            self._pieces = plan.share(
                specs, self._rank, self._world_size, self._block_bytes, self._mode
            )
        return self._pieces

    def _sources(self, entries: list[Entry], beside: bool) -> list[tuple[Source, Changes]]:
        by_name = {entry.name: entry for entry in entries}
        sources: list[tuple[Source, Changes]] = []
        seldom: dict[str, tuple[Any, ...]] = {}
        self._watched = {}
        for piece in self._pieces:
            entry = by_name[piece.name]
            item = self._known.get(id(entry.tensor))
            make = Source.in_place if item is not None and item[2] else Source.of
            source = make(entry.tensor, piece.start, piece.nbytes, piece.offset)
            changes = entry.changes if beside else "any time"
            if entry.changes == "seldom":
                place = f"{piece.name} {piece.start}"
                words = source.words(source.address)
                seldom[place] = (source.address, source.inplace_version, words)
                known = self._seldom_beside and place in self._fingerprints
                if not known or self._seldom.get(place) != seldom[place]:
                    changes = "any time"
                if beside and self._seldom_beside:
                    self._watched[place] = source, changes
            sources.append((source, changes))
        self._seldom = seldom
        return sources

    def _same(self, memory: memoryview) -> bool:
        """Whether what was copied beside the steps is what the snapshot before has of it."""
        found: dict[str, bytes] = {}
        same = True
        for place, (source, changes) in self._watched.items():
            found[place] = fingerprint(memory[source.offset : source.offset + source.nbytes])
            same = same and (changes == "any time" or found[place] == self._fingerprints[place])
        self._fingerprints = found
        return same

    def _done(self, buffer: int, memory: memoryview, info: ImageInfo) -> Callable[[Outcome], None]:
        def done(outcome: Outcome) -> None:
            if outcome == "intact" and not self._same(memory):
                outcome = "seldom"
            if outcome == "intact":
                self.published_step = info.step
                self._keeper.publish(buffer, info)
                return
            self._fingerprints = {}
            self._keeper.give_back(buffer)
            if outcome == "seldom":
                self._seldom_beside = False
            elif outcome == "in step" and self._beside:
                self._beside = False
                say(
                    "parameters were changed outside of the optimizer's step while they were "
                    "copied for a checkpoint; from now on training waits for the copy"
                )

        return done


def metrics_of(loss: Any) -> dict[str, float]:
    """What retention may look at: the loss, if it is a finite number."""
    if loss is None:
        return {}
    value = float(loss.mean() if getattr(loss, "size", 1) != 1 else loss)
    return {"loss": value} if math.isfinite(value) else {}
