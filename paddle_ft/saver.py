"""When a session saves, and that it has been saved: schedule, recorder and keeper as one thing."""

from __future__ import annotations

import time
from typing import Any

from paddle_ft.context import Context
from paddle_ft.health.phases import OVER, SAVING
from paddle_ft.keeper import Keeper
from paddle_ft.progress import Position
from paddle_ft.recorder import Recorder
from paddle_ft.state import TrainingState


class Saver:
    """Saves one session's state to ``keeper``; ``step`` is where the training starts."""

    def __init__(self, context: Context, keeper: Keeper, state: TrainingState, step: int) -> None:
        self._context = context
        self._keeper = keeper
        self._state = state
        self._schedule = context.schedule()
        self._schedule.saved(step, time.monotonic())
        self._recorder = self._make_recorder()

    def _make_recorder(self) -> Recorder:
        context = self._context
        return Recorder(
            self._keeper,
            self._state,
            rank=context.collective.rank,
            world_size=context.writers,
            mode=context.mode,
            block_bytes=context.block_bytes,
        )

    def is_due(self, step: int) -> bool:
        """Whether this rank wants a checkpoint after ``step``: rank 0, or who was asked to."""
        keeper = self._keeper
        asked = self._context.collective.rank == 0 or bool(keeper.asked)
        return keeper.saves and asked and self._schedule.due(step, time.monotonic(), keeper.asked)

    def is_busy(self) -> bool:
        """Whether there is no buffer for one."""
        return self._keeper.saves and not self._keeper.free()

    def before_step(self, loss: Any) -> None:
        """To be called before the optimizer changes anything; ``loss`` is kept with snapshots."""
        board = self._context.board
        before = board.phase
        board.enter(SAVING)
        held_s = self._recorder.before_step(loss)
        board.enter(before)
        self._schedule.held(held_s)
        self._context.held_s += held_s or 0.0

    def save(self, position: Position, pause: bool) -> None:
        """Takes a snapshot, beside training unless the workers ``pause``."""
        if not self._keeper.saves:
            return
        before = self._context.board.phase
        self._context.board.enter(SAVING)
        if self._recorder.take(position.step, position.to_meta(), wait=pause, beside=not pause):
            self._schedule.saved(position.step, time.monotonic())
            self._keeper.asked = frozenset()
        self._context.board.enter(before)

    def save_last(self, position: Position) -> None:
        """Returns once the state at the end is safe. Raises Superseded, StoreFull."""
        keeper, step = self._keeper, position.step
        if not keeper.saves:
            self._context.board.enter(OVER)
            return
        self._context.board.enter(SAVING)
        self._recorder.wait_copied()
        if step not in (keeper.committed_step, self._recorder.published_step):
            self._recorder.take(step, position.to_meta(), wait=True, beside=False)
        keeper.wait_committed(step)
        self._context.board.enter(OVER)

    def abandon(self) -> None:
        """Throws away what is being copied."""
        self._recorder.abandon()

    def regrouped(self) -> None:
        """The rank or the generation is another one; what was not committed yet is lost."""
        self._schedule.lost(self._keeper.committed_step)
        self._recorder = self._make_recorder()
