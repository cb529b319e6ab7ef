"""The worker processes of one version of a model, as a ``Runner``.

Invariant: a batch is given to at most two workers, and to the second only because the first was
lost with it. Of ``workers + spares`` processes, all loaded and warm, at most ``workers`` compute; a
lost one is replaced at once by one that is there, and a new one is started beside.

Memory: ``workers + spares`` times the model, and for each of them at most twice
``tensor_bytes_max``, as much as its largest batch has needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve import deadline
from paddle_ft.serve.predictor import Settings
from paddle_ft.serve.types import ModelError, ModelInfo, Tensors, Unavailable
from paddle_ft.serve.worker_process import Outputs, Source, WorkerLost, WorkerProcess

_log = logging.getLogger("paddle_ft")
_WAITERS_MAX = 1024
_AGAIN_S, _AGAIN_MAX_S = 0.2, 10.0
"""Pause before another start, after one that failed; doubled each time."""
_STARTS_MAX = 3
"""Workers may end so often, for no reason that is known, before the pool's start has failed."""
_TRIES = 2


class BatchRefused(ModelError):
    """Two workers were lost with this batch: it is taken to be the cause."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    workers: int = 1
    spares: int = 1
    """Loaded and warm, to take the place of one that is lost; each costs a copy of the model."""
    predictor: Settings = field(default_factory=lambda: Settings(threads=0))
    """``threads`` 0: the processors of this machine, divided among the workers."""
    look_s: float = 0.25
    """How often a batch is looked after, and what is added to any bound learnt from latency."""
    batch_s_max: float = 60.0
    """No batch may take longer; the bound for sizes of which little has been seen."""
    start_s_max: float = 600.0
    """A worker that is not ready by then is started anew."""
    tensor_bytes_max: int = 256 * 2**20
    """Inputs of one batch, and its outputs."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the workers' start."""

    ready: int
    wanted: int
    stage: str
    """What those that are not ready are doing, in words."""
    failure: str = ""
    """Why the last start failed; the pool goes on trying."""


class Pool:
    """Made by ``start``; for one event loop."""

    def __init__(
        self, source: Source, settings: PoolSettings, on_progress: Callable[[Progress], None]
    ) -> None:
        self._source, self._settings = source, settings
        self._on_progress = on_progress
        self._on_end: Callable[[], None] = lambda: None
        self._told: Progress | None = None
        self._info: ModelInfo | None = None
        self._learnt = deadline.Learnt(settings.look_s, settings.batch_s_max)
        self._workers: list[WorkerProcess] = []
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._failure = ""
        self._changed = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self.replaced = 0
        """Workers lost since the start, for the metrics."""

    @classmethod
    async def start(
        cls,
        folder: Path,
        name: str,
        version: str,
        settings: PoolSettings | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> Pool:
        """A pool of which all workers are warm (spares may follow).

        ``on_end`` is called once ``folder`` is not needed any more, whatever the end.

        Raises ConfigError, ModelError if the model cannot be loaded; the pool is closed then.
        """
        settings = settings or PoolSettings()
        predictor = settings.predictor
        if not predictor.threads:
            threads = max(1, len(os.sched_getaffinity(0)) // settings.workers)
            predictor = replace(predictor, threads=threads)
        source = Source(folder, name, version, predictor, settings.tensor_bytes_max)
        pool = cls(source, settings, on_progress)
        pool._on_end = on_end
        pool._spawn(pool._keep())
        try:
            await pool._started
        except BaseException:
            await pool.close()
            raise
        return pool

    # ------------------------------------------------------------ as a Runner

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None
        return self._info

    @property
    def idle(self) -> int:
        free = sum(worker.idle for worker in self._workers)
        return max(0, min(free, self._settings.workers - self._running) - len(self._waiters))

    @property
    def pids(self) -> list[int]:
        """Of the workers that are ready, spares included."""
        return [w.pid for w in self._workers if was_ready(w) and not w.lost]

    @property
    def progress(self) -> Progress:
        ready, wanted = len(self.pids), self._settings.workers
        stages = [w.stage for w in self._workers if not w.ready.done()]
        stage = stages[0] if stages else "ready"
        return Progress(min(ready, wanted), wanted, stage, self._failure)

    async def run(self, inputs: Tensors, timeout_s: float) -> Outputs:
        """The outputs for one batch; see ``Runner``. What a caller gives up goes on until its end.

        Raises ModelError (BatchRefused if two workers were lost with it), Unavailable.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        for attempt in range(1, _TRIES + 1):
            worker = await self._acquire(until_s)
            try:
                outputs = worker.run(inputs)
            except BaseException:
                self._hand_on()  # the worker is free still
                raise
            self._look_later(worker)
            done, _ = await asyncio.wait([outputs], timeout=max(0.0, until_s - loop.time()))
            if not done:
                raise Unavailable(f"{self._source.name} did not answer within {timeout_s:g} s.")
            try:
                return outputs.result()
            except WorkerLost as error:
                if self._closed:
                    raise Unavailable(f"{self._source.name} is being unloaded here.") from None
                if attempt == _TRIES:
                    raise BatchRefused(
                        f"Two workers of {self._source.name} were lost with this batch, the last "
                        f"because {error}; it is not tried again."
                    ) from None
        raise AssertionError("every way out is above")

    async def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        if not self._closed:
            self._closing.set_result(None)
            for worker in list(self._workers):
                worker.kill("the model is being unloaded")
            while self._waiters:
                self._hand_on()
            self._changed.set()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._on_end()

    # ------------------------------------------------------------ who runs

    @property
    def _closed(self) -> bool:
        return self._closing.done()

    @property
    def _running(self) -> int:
        return sum(worker.batch is not None for worker in self._workers)

    async def _acquire(self, until_s: float) -> WorkerProcess:
        """A worker, to be given a batch before anything else is awaited."""
        loop = asyncio.get_running_loop()
        while self._closed or (worker := self._free()) is None:
            if self._closed or len(self._waiters) >= _WAITERS_MAX:
                raise self._unavailable()
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.append(waiter)
            try:
                await asyncio.wait([waiter], timeout=max(0.0, until_s - loop.time()))
            except asyncio.CancelledError:
                if waiter.done():
                    self._hand_on()
                raise
            finally:
                with suppress(ValueError):
                    self._waiters.remove(waiter)
            if not waiter.done():
                raise self._unavailable()
        return worker

    def _free(self) -> WorkerProcess | None:
        if self._running >= self._settings.workers:
            return None
        return next((worker for worker in self._workers if worker.idle), None)

    def _hand_on(self) -> None:
        """Wakes who waits longest, if there is a worker for it."""
        if self._waiters and (self._closed or self._free() is not None):
            self._waiters.popleft().set_result(None)

    def _unavailable(self) -> Unavailable:
        why = "is being unloaded here" if self._closed else "has no worker that is free in time"
        return Unavailable(f"{self._source.name} {why}.")

    def _look_later(self, worker: WorkerProcess) -> None:
        assert worker.batch is not None
        loop = asyncio.get_running_loop()
        loop.call_later(self._settings.look_s, self._look, worker, worker.batch.number)

    def _look(self, worker: WorkerProcess, number: int) -> None:
        """Ends a worker whose batch takes too long."""
        batch = worker.batch
        if batch is None or batch.number != number:
            return
        ran_s, stopped_s, still_s = worker.look()
        reason = deadline.verdict(ran_s, self._learnt.bounds(batch.nbytes), stopped_s, still_s)
        if reason:
            worker.kill(reason)
        else:
            self._look_later(worker)

    # ------------------------------------------------------------ that they are there

    def _change(self, worker: WorkerProcess) -> None:
        self._changed.set()
        if self._info is None and worker.idle:
            self._info = worker.ready.result()
        if worker.took is not None:
            self._learnt.note(*worker.took)
            worker.took = None
        self._hand_on()

    async def _keep(self) -> None:
        """Replaces what is lost until the pool is closed."""
        pause_s, failures = _AGAIN_S, 0
        while True:
            self._changed.clear()
            before = failures
            for worker in [w for w in self._workers if w.lost]:
                self._workers.remove(worker)
                self._spawn(worker.reap())
                if self._closed:
                    continue
                if was_ready(worker):
                    self.replaced += 1
                    _log.warning(
                        "worker %d of %s is replaced: %s",
                        worker.pid,
                        self._source.name,
                        worker.lost,
                    )
                    continue
                failures += 1
                self._failed(worker, failures)
            progress = self.progress
            self._tell(progress)
            if self._closed:
                return
            if progress.ready >= progress.wanted:
                pause_s, failures, self._failure = _AGAIN_S, 0, ""
                if not self._started.done():
                    self._started.set_result(None)
            elif failures > before:
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_MAX_S)
            self._fill(progress)
            await self._changed.wait()

    def _failed(self, worker: WorkerProcess, failures: int) -> None:
        """A worker was never ready: the first time, that may be the model's fault."""
        self._failure = worker.lost
        error = worker.ready.exception()
        if self._started.done():
            _log.error("a worker of %s cannot be started: %s", self._source.name, worker.lost)
        elif isinstance(error, PaddleFTError):
            self._started.set_exception(error)
        elif failures >= _STARTS_MAX:
            text = f"Workers of {self._source.name} end before they are ready: {worker.lost}."
            self._started.set_exception(ConfigError(text))

    def _fill(self, progress: Progress) -> None:
        """Starts what is missing; spares after all the workers."""
        settings = self._settings
        target = settings.workers + (settings.spares if progress.ready >= progress.wanted else 0)
        while len(self._workers) < target and not self._closed:
            worker = WorkerProcess(self._change)
            self._workers.append(worker)
            self._spawn(worker.start(self._source))
            loop = asyncio.get_running_loop()
            loop.call_later(settings.start_s_max, self._overdue, worker)

    def _overdue(self, worker: WorkerProcess) -> None:
        if not worker.ready.done():
            worker.kill(f"it was not ready within {self._settings.start_s_max:g} s")

    async def _pause(self, seconds: float) -> None:
        await asyncio.wait([self._closing], timeout=seconds)

    def _tell(self, progress: Progress) -> None:
        if progress != self._told:
            self._told = progress
            self._on_progress(progress)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def was_ready(worker: WorkerProcess) -> bool:
    return worker.ready.done() and worker.ready.exception() is None
