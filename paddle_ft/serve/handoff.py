"""``s.publish``: what a session has trained becomes a version of a model.

Invariant: a version that a training loop publishes belongs to a step that is committed: if the job
is set back, it is to a later one. So within the loop the model is exported at once and stored when
a checkpoint of that step, or of a later one, is safe; the end of the session waits for it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddle_ft import config as settings
from paddle_ft.context import Context
from paddle_ft.errors import ConfigError, MachineError
from paddle_ft.health.phases import SAVING
from paddle_ft.keeper import Keeper
from paddle_ft.progress import Position
from paddle_ft.state import TrainingState
from paddle_ft.streams import Streams

if TYPE_CHECKING:
    from paddle_ft.serve.publish import Published

_log = logging.getLogger("paddle_ft")
_POLL_S = 0.2
_WAITING_MAX = 4
"""Exports of one rank that wait for their checkpoint; the oldest gives way, and it is said."""


class Publishing:
    """The part of a session that publishes."""

    _context: Context
    _keeper: Keeper
    _state: TrainingState
    _position: Position
    _streams: Streams
    _cut_short: bool
    _handoffs: list[_Handoff]

    def _save_last(self) -> None:
        raise AssertionError("of the session")

    def publish(
        self,
        name: str,
        input_spec: Sequence[Any] | None = None,
        *,
        store: str = "",
        outputs: Sequence[str] = (),
        batched: bool | None = None,
        warm_up: Mapping[str, Sequence[int]] | None = None,
    ) -> Published | None:
        """Publishes the model as it is now as the next version of ``name``; see ``serve.publish``.

        All ranks call it, after the loop or after a step in it that was applied; rank 0 exports.
        After the loop the state is saved first, and rank 0 is given the version. Within the loop it
        is stored beside training once the step is committed, and None is given.

        Args:
            input_spec: of the model, as for ``paddle.jit.to_static``.
            store: default: where the checkpoints are, as ``checkpoint.url`` or the session has it.

        Raises ConfigError, StoreError.
        """
        in_loop = self._streams.in_loop
        if in_loop and self._cut_short:
            return None  # the batch is handed out again, and so is this called again
        board = self._context.board
        phase = board.phase
        try:
            if not in_loop:
                self._save_last()
            if self._context.collective.rank:
                return None
            board.enter(SAVING)
            handoff = _Handoff(self._context, name, store, self._position.step)
            handoff.export(self._state.model, input_spec)
            more = {"outputs": outputs, "batched": batched, "warm_up": warm_up}
            if not in_loop or not self._keeper.saves:
                self._finish_publishing()  # versions have the order of their steps
                done = handoff.store(more)
                self._keeper.published(done.ref.name, done.ref.version, done.store_url)
                return done
            self._later(handoff, more)
            return None
        finally:
            board.enter(phase)

    def _later(self, handoff: _Handoff, more: dict[str, Any]) -> None:
        waiting = [h for h in self._handoffs if h.waits]
        if len(waiting) >= _WAITING_MAX:
            waiting[0].drop()
            _log.warning("step %d is not published: it waits for a checkpoint", waiting[0].step)
        self._handoffs = [h for h in self._handoffs if h.waits or h.error is not None]
        before = self._handoffs[-1] if self._handoffs else None
        self._handoffs.append(handoff)
        handoff.begin(before, lambda: self._keeper.committed_step, more, self._keeper.published)

    def _finish_publishing(self) -> None:
        """Returns once all is stored, after the last checkpoint. Raises the first error."""
        for handoff in self._handoffs:
            handoff.join()
        for handoff in self._handoffs:
            if handoff.error is not None:
                raise handoff.error

    def _abandon_publishing(self) -> None:
        for handoff in self._handoffs:
            handoff.drop()


class _Handoff:
    """One export on its way."""

    def __init__(self, context: Context, name: str, store: str, step: int) -> None:
        self.step = step
        self.error: Exception | None = None
        self._config = settings.load({}, os.environ).config.checkpoint
        self._name = name
        self._url = store or context.store_url or self._config.url
        if not self._url:
            raise ConfigError(
                f"There is no place to publish {name} to: give s.publish a store=, a directory or "
                f"s3://bucket/prefix."
            )
        job = {"job": context.env.job} if context.env is not None else {}
        self._source: dict[str, str | int] = {**job, "step": step}
        self._folder = ""
        self._dropped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def waits(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def export(self, model: Any, input_spec: Sequence[Any] | None) -> None:
        from paddle_ft.serve.export import export_layer

        self._folder = tempfile.mkdtemp(prefix="paddle_ft-publish-")
        try:
            export_layer(model, Path(self._folder), input_spec)
        except BaseException:
            self._clean()
            raise

    def store(self, more: dict[str, Any]) -> Published:
        from paddle_ft.serve.publish import publish

        try:
            return publish(
                self._folder,
                self._name,
                self._url,
                source=self._source,
                config=self._config,
                **more,
            )
        finally:
            self._clean()

    def begin(
        self,
        before: _Handoff | None,
        committed_step: Callable[[], int],
        more: dict[str, Any],
        tell: Callable[[str, int, str], None] = lambda *_: None,
    ) -> None:
        """Stores it after ``before`` and once its step is committed, beside whatever goes on."""

        def work() -> None:
            if before is not None:
                before.join()
            while committed_step() < self.step:
                if self._dropped.wait(_POLL_S):
                    self._clean()
                    return
            try:
                done = self.store(more)
                tell(done.ref.name, done.ref.version, done.store_url)
            except Exception as error:  # noqa: BLE001 - the end of training is to tell it
                if isinstance(error, OSError):  # of a temporary folder; stores have their own
                    error = MachineError(
                        f"Files of step {self.step} cannot be written ({error}); make room for "
                        f"temporary files, and publish it again."
                    )
                self.error = error
                _log.error("step %d cannot be published as %s: %r", self.step, self._name, error)
            else:
                _log.info("step %d is published as %s %d", self.step, self._name, done.ref.version)

        self._thread = threading.Thread(target=work, name="publish", daemon=True)
        self._thread.start()

    def drop(self) -> None:
        self._dropped.set()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _clean(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
