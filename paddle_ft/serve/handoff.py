"""``s.publish``: what a session has trained becomes a version of a model.

Invariant: a version that a training loop publishes belongs to a step that is committed: if the job
is set back, it is to a later one. So within the loop the model is exported at once and stored when
a checkpoint of that step, or of a later one, is safe; the end of the session waits for it.

By a rule, a step waits for no more than a copy of the tensors (``template``), and a checkpoint is
asked for, so that the version comes soon.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddle_ft import config as settings
from paddle_ft.context import Context
from paddle_ft.errors import ConfigError, MachineError, PaddleFTError
from paddle_ft.health.phases import SAVING
from paddle_ft.keeper import Keeper
from paddle_ft.policies import Rule
from paddle_ft.progress import Position
from paddle_ft.serve.publish_rule import VERSIONS_MAX, PublishRule, source_of
from paddle_ft.serve.template import Template
from paddle_ft.state import TrainingState
from paddle_ft.streams import Streams

if TYPE_CHECKING:
    from paddle_ft.serve.publish import Published

_log = logging.getLogger("paddle_ft")
_PREFIX = "paddle_ft-publish-"
_POLL_S = 0.2
_ABANDON_S = 5.0
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
    _latest: Mapping[str, _Handoff] = {}
    """By name of the model."""
    _rules: tuple[PublishRule, ...] = ()
    _templates: Mapping[PublishRule, Template | None] = {}
    """Of the rules that are ready to be followed on this rank."""
    _measured: Mapping[str, float] = {}
    _wants_saving = False
    """A version waits for a checkpoint that has not been asked for yet."""

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
            more = {"outputs": tuple(outputs), "batched": batched, "warm_up": warm_up}
            if not in_loop:
                self._publish_due()
                self._join_publishing()  # versions have the order of their steps
            before = self._latest.get(name)
            if before is None or not before.is_same(handoff, more):
                handoff.export(self._state.model, input_spec)
                if in_loop and self._keeper.saves:
                    self._later(handoff, more)
                    return None
                self._join_publishing()
                handoff.finish(more, self._keeper.published)
                self._take(handoff)
                before = handoff
            return before.done
        finally:
            board.enter(phase)

    def publish_when(
        self,
        name: str,
        when: Rule | str,
        input_spec: Sequence[Any] | None = None,
        *,
        store: str = "",
        outputs: Sequence[str] = (),
        batched: bool | None = None,
        warm_up: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Publishes the model as the next version of ``name`` whenever ``when`` says so.

        All ranks call it, before the first batch. The forward pass is traced now, as it is; what
        is published is traced again only if the tensors of the model are others by then.

        Args:
            when: ``"1000 steps"``, ``"10min"``, or a rule of ``policies`` such as
                ``OnBetter("accuracy")``, which looks at what ``measured`` was told.
            store: and the others: as for ``publish``.

        Raises ConfigError.
        """
        more = {"outputs": tuple(outputs), "batched": batched, "warm_up": warm_up}
        rule = PublishRule(name, when, input_spec, store, more)
        rule.begin(time.monotonic())
        self._rules = (*self._rules, rule)
        if not self._context.collective.rank:
            self._prepare(rule)

    def measured(self, **values: float) -> None:
        """Tells rules of ``publish_when`` what the model is worth as it is now, after a step.

        Only what rank 0 tells counts. It is kept with the version that is published of this step.
        """
        self._measured = {**self._measured, **{n: float(value) for n, value in values.items()}}

    def _prepare(self, rule: PublishRule) -> None:
        """What following ``rule`` takes beforehand. Raises ConfigError."""
        step = self._position.step
        handoff = _Handoff(self._context, rule.name, rule.store, step)
        rule.recall(handoff.job, step, handoff.sources())
        template = handoff.export(self._state.model, rule.input_spec, keep=False)
        self._templates = {**self._templates, rule: template}
        if template is None:
            _log.warning(
                "%s is exported anew for each version, and a step waits for that: its files are "
                "not of a known form",
                rule.name,
            )

    def _publish_due(self, saved: bool = False) -> None:
        """Begins what the rules ask for; ``saved``: a checkpoint of this step is on its way."""
        measured, self._measured = self._measured, {}
        self._wants_saving = self._wants_saving and not saved
        if not self._rules or self._context.collective.rank:
            return
        step, now_s = self._position.step, time.monotonic()
        board, phase = self._context.board, self._context.board.phase
        for rule in self._rules:
            if rule not in self._templates:  # this rank has become the first
                self._prepare(rule)
            if not rule.is_due(step, now_s, measured):
                continue
            rule.published(step, now_s, measured)
            handoff = _Handoff(self._context, rule.name, rule.store, step)
            handoff.add(source_of(measured))
            before = self._latest.get(rule.name)
            if before is not None and before.is_same(handoff, rule.more):
                continue
            board.enter(SAVING)
            try:
                handoff.copy(self._state.model, rule.input_spec, self._templates[rule])
            finally:
                board.enter(phase)
            self._later(handoff, rule.more)
            self._wants_saving = self._keeper.saves and not saved

    def _later(self, handoff: _Handoff, more: dict[str, Any]) -> None:
        keeper = self._keeper
        waiting = [h for h in self._handoffs if h.waits]
        if len(waiting) >= _WAITING_MAX:
            waiting[0].drop()
            _log.warning("step %d is not published: it waits for a checkpoint", waiting[0].step)
        before = next((h for h in reversed(self._handoffs) if h.waits), None)
        self._take(handoff)
        safe = (lambda: keeper.committed_step) if keeper.saves else (lambda: handoff.step)
        handoff.begin(before, safe, more, keeper.published)

    def _take(self, handoff: _Handoff) -> None:
        """Keeps it in mind, and of those before it what is under way or went wrong.

        A version that was stored makes up for earlier ones of its name that could not be.
        """
        self._latest = {**self._latest, handoff.name: handoff}
        self._handoffs.append(handoff)
        stored = {h.name: n for n, h in enumerate(self._handoffs) if h.done is not None}
        self._handoffs = [
            h
            for n, h in enumerate(self._handoffs)
            if h is handoff or h.waits or (h.error is not None and n > stored.get(h.name, -1))
        ]

    def _join_publishing(self) -> None:
        for handoff in self._handoffs:
            handoff.join()

    def _finish_publishing(self) -> None:
        """Returns once all is stored, after the last checkpoint. Raises the first error."""
        self._publish_due()
        self._join_publishing()
        stored = {h.name: n for n, h in enumerate(self._handoffs) if h.done is not None}
        for n, handoff in enumerate(self._handoffs):
            if handoff.error is not None and n > stored.get(handoff.name, -1):
                raise handoff.error

    def _abandon_publishing(self) -> None:
        """Versions of committed steps are still stored: these steps are not done again."""
        for handoff in self._handoffs:
            handoff.drop()
        until_s = time.monotonic() + _ABANDON_S
        for handoff in self._handoffs:
            handoff.join(max(0.0, until_s - time.monotonic()))


class _Handoff:
    """One export on its way."""

    def __init__(self, context: Context, name: str, store: str, step: int) -> None:
        self.name, self.step = name, step
        self.done: Published | None = None
        self.error: Exception | None = None
        self._config = settings.load({}, os.environ).config.checkpoint
        self._url = store or context.store_url or self._config.url
        if not self._url:
            raise ConfigError(
                f"There is no place to publish {name} to: give s.publish a store=, a directory or "
                f"s3://bucket/prefix."
            )
        self.job = context.env.job if context.env is not None else ""
        job = {"job": self.job} if self.job else {}
        self._source: dict[str, str | int] = {**job, "step": step}
        self._more: dict[str, Any] | None = None
        self._fill: Callable[[Path], None] | None = None
        self._folder = ""
        self._dropped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def waits(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def is_same(self, other: _Handoff, more: dict[str, Any]) -> bool:
        """Whether this is, or will be, the version that ``other`` would make."""
        mine, its = (self.step, self._url, self._more), (other.step, other._url, more)
        return mine == its and self.error is None and not self._dropped.is_set()

    def add(self, source: Mapping[str, str | int]) -> None:
        """Something else that the version says of itself."""
        self._source |= source

    def sources(self) -> list[Mapping[str, str | int]]:
        """What the newest versions say of themselves; of what cannot be read, nothing."""
        from paddle_ft.checkpoint.sign import Trust
        from paddle_ft.checkpoint.store import open_store
        from paddle_ft.serve.models import list_versions, read_version

        found: list[Mapping[str, str | int]] = []
        try:
            store = open_store(self._url, self._config)
            for version in list_versions(store, self.name).get(self.name, [])[-VERSIONS_MAX:]:
                found.append(read_version(store, self.name, version, Trust("off"))[0].source)
        except PaddleFTError as error:
            _log.warning("what was published as %s is not known: %s", self.name, error)
        return found

    def export(
        self, model: Any, input_spec: Sequence[Any] | None, keep: bool = True
    ) -> Template | None:
        """Makes the files; gives what they can be made of again, unless they are to be kept."""
        from paddle_ft.serve.export import export_layer

        self._folder = tempfile.mkdtemp(prefix=_PREFIX)
        try:
            export_layer(model, Path(self._folder), input_spec)
            return None if keep else Template.of(model, Path(self._folder))
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                self._clean()

    def copy(self, model: Any, input_spec: Sequence[Any] | None, template: Template | None) -> None:
        """Takes what the model is now, to be written later where there is a template."""
        try:
            values = template.copy(model) if template is not None else None
        except KeyError:  # a part of the model was replaced
            values = None
        if template is None or values is None:
            self.export(model, input_spec)
        else:
            self._fill = partial(template.write, values=values)

    def store(self, more: dict[str, Any]) -> Published:
        from paddle_ft.serve.publish import publish

        try:
            return publish(
                self._folder,
                self.name,
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
            try:
                if self._fill is not None:
                    fill, self._fill = self._fill, None
                    self._folder = tempfile.mkdtemp(prefix=_PREFIX)
                    fill(Path(self._folder))
                    del fill  # the copy of the tensors
                if before is not None:
                    before.join()
                while committed_step() < self.step:
                    if self._dropped.wait(_POLL_S) and committed_step() < self.step:
                        self._clean()
                        return
                self.finish(more, tell)
            except Exception as error:  # noqa: BLE001 - the end of training is to tell it
                if isinstance(error, OSError):  # of a temporary folder; stores have their own
                    error = MachineError(
                        f"Files of step {self.step} cannot be written ({error}); make room for "
                        f"temporary files, and publish it again."
                    )
                self.error = error
                _log.error("step %d cannot be published as %s: %r", self.step, self.name, error)
                self._clean()

        self._more = more
        self._thread = threading.Thread(target=work, name="publish", daemon=True)
        self._thread.start()

    def finish(self, more: dict[str, Any], tell: Callable[[str, int, str], None]) -> None:
        """Stores it now, and tells of it."""
        self._more = more
        done = self.store(more)
        tell(done.ref.name, done.ref.version, done.store_url)
        self.done = done
        _log.info("step %d is published as %s %d", self.step, self.name, done.ref.version)

    def drop(self) -> None:
        self._dropped.set()

    def join(self, timeout_s: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _clean(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
