"""Runs requests on a ``Runner`` in batches, as ``batching`` decides. One event loop only.

Every request that is taken ends exactly once: with its own rows of a batch's outputs, or with a
ServeError. A bad one in a batch costs the others a second run and nothing more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from paddle_ft.serve.batching import Item, Limits, Queue
from paddle_ft.serve.tensors import nbytes_of
from paddle_ft.serve.types import BatchRefused, ModelInfo, Runner, ServeError, Tensors, Unavailable

LOG = logging.getLogger(__name__)

POLL_S = 0.005
"""How soon it is seen that a worker came back by itself while requests wait."""
RETRY_AFTER_S = 1.0
Begin = Callable[[Tensors, float, Callable[[Tensors | Exception], None]], bool]
"""``begin`` of a runner: as ``Pool.begin``."""


class Overloaded(Unavailable):
    """The queue is full. 429, after which nginx asks another replica, which may have room."""

    status = 429


class DeadlineExceeded(ServeError):
    """The client's own limit was over first. 408, which no proxy sends on to the next replica."""

    status = 408


@dataclass
class Duration:
    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.ns += int(seconds * 1e9) * count


@dataclass
class Figures:
    """What a version has done since it was loaded; ``rows_of_batches`` by rows of a batch,
    those of more than ``rows_max`` by the next power of two."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    rows: int = 0
    batches: int = 0
    last_ms: int = 0
    """Wall-clock time of the last success since 1970."""
    refused: int = 0
    errors: int = 0
    """Of those that failed, with a status of 500 or more."""
    rows_of_batches: dict[int, Duration] = field(default_factory=dict)


@dataclass(slots=True)
class _Pending:
    item: Item
    inputs: Tensors
    future: asyncio.Future[Tensors]
    timer: asyncio.TimerHandle
    session: str = ""
    queued_s: float = 0.0
    suspect: bool = False
    """Workers were lost with the batch that it was in."""


class Batcher:
    """The queue in front of one version of a model."""

    def __init__(self, runner: Runner, limits: Limits) -> None:
        self.runner = runner
        self._begin: Begin | None = getattr(runner, "begin", None)
        """Of those that have it (``Pool``): saves a task, and turns of the loop, for each batch."""
        self.figures = Figures()
        self.limits = limits
        self._queue = Queue(limits)
        self._keys = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: set[asyncio.Task[None]] = set()
        """Those that have not reached the runner yet."""
        self._poll: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def info(self) -> ModelInfo:
        return self.runner.info

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._queue)

    def limit(self, limits: Limits) -> None:
        """``limits`` hold from now on; what waits already stays, however many there are."""
        self.limits = self._queue.limits = limits

    def submit(
        self, inputs: Tensors, timeout_s: float, session: str = ""
    ) -> asyncio.Future[Tensors]:
        """The outputs to come for checked ``inputs``. Cancelled before they run, they do not run;
        cancelled or late after that, they do not change the state of their session.

        ``session``: the one that the request names; of meaning to a stateful model.

        Raises:
            Overloaded: the queue is full.
            Unavailable: it is being closed.

        The future also raises ModelError, Unavailable and DeadlineExceeded.
        """
        if self._closing:
            raise self._leaves()
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        session = session if self.info.stateful else ""
        item = self._item(inputs, now_s, timeout_s, session)
        future: asyncio.Future[Tensors] = loop.create_future()
        timer = loop.call_at(item.deadline_s, self._expire, item.key)
        pending = _Pending(item, inputs, future, timer, session)
        free = not self._starting or self.runner.idle > len(self._starting)
        at_once = free and not len(self._queue)
        if not (at_once and self._begun([pending])) and not self._queue.add(item):
            timer.cancel()
            self.figures.refused += 1
            raise Overloaded(
                f"{len(self._queue)} requests are waiting for {self.info.name} already: "
                "try again later",
                RETRY_AFTER_S,
            )
        self._pending[item.key] = pending
        future.add_done_callback(lambda _: self._forget(item.key))
        if len(self._queue):
            self._pump()
        return future

    async def close(self, timeout_s: float) -> None:
        """Takes nothing more, waits for what is there, at most ``timeout_s``; ends the runner."""
        self._closing = True
        futures = [pending.future for pending in self._pending.values()]
        if futures:
            await asyncio.wait(futures, timeout=timeout_s)
        left = list(self._pending.values())
        for pending in left:
            _fail(pending, self._leaves())
        if self._poll is not None:
            self._poll.cancel()
        for task in self._tasks if left else ():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        await self.runner.close()

    def _item(self, inputs: Tensors, now_s: float, timeout_s: float, session: str) -> Item:
        rows, signature = 1, None
        if self.info.batched:
            rows = next(iter(inputs.values())).shape[0]
            signature = None if session else _signature(inputs)
        return Item(next(self._keys), signature, rows, nbytes_of(inputs), now_s, now_s + timeout_s)

    def _forget(self, key: int) -> None:
        self._queue.cancel(key)
        if (pending := self._pending.pop(key, None)) is not None:
            pending.timer.cancel()

    def _expire(self, key: int) -> None:
        if (pending := self._pending.get(key)) is not None:
            after_ms = (pending.item.deadline_s - pending.item.arrived_s) * 1e3
            self.figures.fail.add(after_ms / 1e3)
            _fail(pending, DeadlineExceeded(f"no result within the {after_ms:.0f} ms asked for"))

    def _pump(self) -> None:
        """Begins what can begin."""
        now_s = asyncio.get_running_loop().time()
        while len(self._queue):
            decision = self._queue.take(now_s, self.runner.idle - len(self._starting))
            for item in decision.expired:
                self._expire(item.key)
            if not decision.batch:
                break
            batch = [self._pending[item.key] for item in decision.batch]
            if self._begun(batch):
                continue
            task = asyncio.create_task(self._run(batch))
            self._tasks.add(task)
            self._starting.add(task)
            task.add_done_callback(partial(self._over, batch))
        if len(self._queue) and self._poll is None:
            self._poll = asyncio.get_running_loop().call_later(POLL_S, self._poll_now)

    def _poll_now(self) -> None:
        self._poll = None
        self._pump()

    def _begun(self, batch: Sequence[_Pending]) -> bool:
        """Whether the runner has taken ``batch`` at once; then ``_ended`` is called at its end."""
        if self._begin is None or batch[0].session or batch[0].suspect:
            return False
        batch = [pending for pending in batch if not pending.future.done()]
        if not batch:
            return True
        begin_s = asyncio.get_running_loop().time()
        try:
            joined, timeout_s = _prepared(batch, begin_s)
            return self._begin(joined, timeout_s, partial(self._ended, batch, begin_s))
        except Exception as error:  # noqa: BLE001 - told apart where it is taken
            self._not_run(batch, error)
            return True

    def _ended(
        self, batch: Sequence[_Pending], begin_s: float, result: Tensors | Exception
    ) -> None:
        try:
            if isinstance(result, Exception):
                raise result
            self._succeeded(batch, begin_s, result)
        except Exception as error:  # noqa: BLE001 - as above
            self._not_run(batch, error)
        self._pump()

    async def _run(self, batch: Sequence[_Pending]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._starting.discard(task)  # from here to the first await of the runner nobody else runs
        batch = [pending for pending in batch if not pending.future.done()]
        if batch:
            begin_s, first = asyncio.get_running_loop().time(), batch[0]
            try:
                joined, timeout_s = _prepared(batch, begin_s)
                outputs = await self._outputs(first, joined, timeout_s)
                if outputs is not None:
                    self._succeeded(batch, begin_s, outputs)
            except Exception as error:  # noqa: BLE001 - as above
                self._not_run(batch, error)
        self._pump()

    async def _outputs(self, first: _Pending, joined: Tensors, timeout_s: float) -> Tensors | None:
        """Of the batch that begins with ``first``; None if that was of a session, and nobody waits
        for it any more: whoever asks again, elsewhere, must not find it undone by this one later.
        """
        run = self.runner.run(joined, timeout_s, first.session, again=first.suspect)
        if not first.session:
            return await run
        running = asyncio.ensure_future(run)
        first.future.add_done_callback(lambda _: running.cancel())
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            running.cancel()
            raise
        return None if running.cancelled() else running.result()

    def _over(self, batch: Sequence[_Pending], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._starting.discard(task)
        if task.cancelled():  # even before it began
            for pending in batch:
                _fail(pending, self._leaves())

    def _leaves(self) -> Unavailable:
        return Unavailable(f"{self.info.name} {self.info.version} is being taken out", 0.5)

    def _not_run(self, batch: Sequence[_Pending], error: Exception) -> None:
        if not isinstance(error, ServeError):
            LOG.error("a defect in the runner of %s", self.info.name, exc_info=error)
            error = ServeError(f"{self.info.name} failed: {error!r}"[:500])
        self._failed(batch, error)

    def _succeeded(self, batch: Sequence[_Pending], begin_s: float, outputs: Tensors) -> None:
        parts = self._parts(outputs, [p.item.rows for p in batch])
        took_s = asyncio.get_running_loop().time() - begin_s
        rows = sum(pending.item.rows for pending in batch)
        self.figures.batches += 1
        self.figures.rows += rows
        # Clients choose how many: each number of its own would grow without bound.
        kind = rows if rows <= self.limits.rows_max else 1 << (rows - 1).bit_length()
        self.figures.rows_of_batches.setdefault(kind, Duration()).add(took_s)
        self.figures.last_ms = time.time_ns() // 10**6
        for pending, part in zip(batch, parts, strict=True):
            if not pending.future.done():
                pending.future.set_result(part)
                self.figures.queue.add(pending.queued_s)
                self.figures.infer.add(took_s)
                self.figures.success.add(pending.queued_s + took_s)

    def _parts(self, outputs: Tensors, rows: Sequence[int]) -> list[Tensors]:
        missing = [f.name for f in self.info.outputs if f.name not in outputs]
        if missing:
            raise ServeError(f"{self.info.name} gave no output {missing[0]}")
        if len(rows) == 1:
            return [outputs]
        if any(array.ndim == 0 or len(array) != sum(rows) for array in outputs.values()):
            raise ServeError(f"the outputs of {self.info.name} do not have {sum(rows)} rows")
        ends = np.cumsum(rows).tolist()
        return [
            {name: array[end - count : end] for name, array in outputs.items()}
            for end, count in zip(ends, rows, strict=True)
        ]

    def _failed(self, batch: Sequence[_Pending], error: ServeError) -> None:
        living = [pending for pending in batch if not pending.future.done()]
        if len(batch) > 1:
            for pending in living:
                pending.suspect = isinstance(error, BatchRefused)
            self._queue.again(tuple(pending.item for pending in living))
            return
        for pending in living:
            self.figures.errors += error.status >= 500
            self.figures.fail.add(asyncio.get_running_loop().time() - pending.item.arrived_s)
            _fail(pending, error)


def _fail(pending: _Pending, error: ServeError) -> None:
    if not pending.future.done():
        pending.future.set_exception(error)


def _prepared(batch: Sequence[_Pending], begin_s: float) -> tuple[Tensors, float]:
    """The inputs together, and how long they may take, s."""
    for pending in batch:
        pending.queued_s = begin_s - pending.item.arrived_s
    timeout_s = max(pending.item.deadline_s for pending in batch) - begin_s
    return _joined([p.inputs for p in batch]), max(timeout_s, 1e-3)


def _signature(inputs: Tensors) -> Hashable:
    return tuple((name, a.dtype.str, a.shape[1:]) for name, a in inputs.items())


def _joined(parts: Sequence[Tensors]) -> Tensors:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
