"""The worker processes of a pool: that there are as many as are wanted.

A lost one is replaced at once. A start that fails is tried again after a pause that doubles, up to
``_AGAIN_MAX_S``; up to ``_SPARE_AGAIN_MAX_S`` while only spares are missing, without which the
pool runs on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve.forks import Forks
from paddle_ft.serve.predictor import Settings
from paddle_ft.serve.worker_process import Source, WorkerProcess, was_ready

_log = logging.getLogger("paddle_ft")
_AGAIN_S, _AGAIN_MAX_S, _SPARE_AGAIN_MAX_S = 0.2, 10.0, 300.0
_STARTS_MAX = 3
"""Workers may end so often, for no reason that is known, before the pool's start has failed."""


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
    forks: Forks | None = None
    """Where workers come from; None: each is a process that imports Paddle for itself."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the workers' start."""

    ready: int
    wanted: int
    stage: str
    """What those that are not ready are doing, in words."""
    failure: str = ""
    """Why the last start failed; the pool goes on trying, and runs without a spare meanwhile."""


class Staff:
    """For one event loop. ``on_change(worker)`` is called whenever something is new of one."""

    def __init__(
        self,
        source: Source,
        settings: PoolSettings,
        on_progress: Callable[[Progress], None],
        on_change: Callable[[WorkerProcess], None],
    ) -> None:
        self._source, self._settings = source, settings
        self._on_progress, self._on_change = on_progress, on_change
        self._told: Progress | None = None
        self._failure = ""
        self._failures = 0
        """Starts that failed since one did not."""
        self._owed, self._owed_until_s = 0, 0.0
        """Workers that are not started before that time."""
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.workers: list[WorkerProcess] = []
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when all workers are ready for the first time, or with what keeps them from it."""
        self.closed = False
        self.replaced = 0
        """Workers lost since the start, for the metrics."""

    def begin(self) -> None:
        self._spawn(self._keep())

    def end(self) -> None:
        """Ends the workers, whatever they are doing; ``wait`` returns when all are gone."""
        if not self.closed:
            self.closed = True
            for worker in list(self.workers):
                worker.kill("the model is being unloaded")
            self._changed.set()

    async def wait(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def pids(self) -> list[int]:
        """Of the workers that are ready, spares included."""
        return [w.pid for w in self.workers if was_ready(w) and not w.lost]

    @property
    def progress(self) -> Progress:
        ready, wanted = len(self.pids), self._settings.workers
        stages = [w.stage for w in self.workers if not w.ready.done()]
        stage = stages[0] if stages else "ready"
        return Progress(min(ready, wanted), wanted, stage, self._failure)

    def _change(self, worker: WorkerProcess) -> None:
        if worker.is_fresh:
            self._failures, self._failure = 0, ""
        if worker.is_fresh or not worker.idle:  # not at the end of each batch
            self._changed.set()
        self._on_change(worker)

    async def _keep(self) -> None:
        """Replaces what is lost until the pool is closed."""
        while True:
            self._changed.clear()
            for worker in [w for w in self.workers if w.lost]:
                self.workers.remove(worker)
                self._spawn(worker.reap())
                if not self.closed:
                    self._lost(worker)
            progress = self.progress
            self._tell(progress)
            if self.closed:
                return
            if progress.ready >= progress.wanted and not self.started.done():
                self.started.set_result(None)
            self._fill(progress)
            await self._changed.wait()

    def _lost(self, worker: WorkerProcess) -> None:
        if not was_ready(worker):
            self._failed(worker)
            return
        self.replaced += 1
        self._owed = 0  # by one that could be started
        name = self._source.name
        _log.warning("worker %d of %s is replaced: %s", worker.pid, name, worker.lost)

    def _failed(self, worker: WorkerProcess) -> None:
        """A worker was never ready: the first time, that may be the model's fault."""
        loop = asyncio.get_running_loop()
        self._failures += 1
        self._failure = worker.lost
        all_there = self.progress.ready >= self._settings.workers
        most_s = _SPARE_AGAIN_MAX_S if all_there else _AGAIN_MAX_S
        pause_s = min(_AGAIN_S * 2 ** min(self._failures - 1, 20), most_s)
        self._owed += 1
        until_s = self._owed_until_s = loop.time() + pause_s
        loop.call_later(pause_s, self._pay, until_s)
        error = worker.ready.exception()
        if self.started.done():
            which = "spare" if all_there else "worker"
            _log.error("a %s of %s cannot be started: %s", which, self._source.name, worker.lost)
        elif isinstance(error, PaddleFTError):
            self.started.set_exception(error)
        elif self._failures >= _STARTS_MAX:
            text = f"Workers of {self._source.name} end before they are ready: {worker.lost}."
            self.started.set_exception(ConfigError(text))

    def _pay(self, until_s: float) -> None:
        if until_s == self._owed_until_s:
            self._owed = 0
            self._changed.set()

    def _fill(self, progress: Progress) -> None:
        """Starts what is missing; spares after all the workers."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        target = settings.workers + (settings.spares if progress.ready >= progress.wanted else 0)
        while len(self.workers) + self._owed < target and not self.closed:
            worker = WorkerProcess(self._change, settings.forks)
            self.workers.append(worker)
            self._spawn(worker.start(self._source))
            loop.call_later(settings.start_s_max, self._overdue, worker)

    def _overdue(self, worker: WorkerProcess) -> None:
        if not worker.ready.done():
            worker.kill(f"it was not ready within {self._settings.start_s_max:g} s")

    def _tell(self, progress: Progress) -> None:
        if progress != self._told:
            self._told = progress
            self._on_progress(progress)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
