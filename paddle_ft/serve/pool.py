"""The worker processes of one version of a model, as a ``Runner``.

Invariant: a batch is given to at most two workers, and to the second only because the first was
lost with it; what it puts into its session's state is sent to the group once, after that. Of
``workers + spares`` processes, all loaded and warm, at most ``workers`` compute; a lost one is
replaced at once by one that is there, and a new one is started beside.

Memory: ``workers + spares`` times the model, and for each of them at most twice
``tensor_bytes_max``, as much as its largest batch has needed.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from paddle_ft.serve import deadline
from paddle_ft.serve.predictor import PLATFORM
from paddle_ft.serve.refused import Refused
from paddle_ft.serve.staff import PoolSettings, Progress, Staff
from paddle_ft.serve.turns import Turns
from paddle_ft.serve.types import (
    BatchRefused,
    ModelError,
    ModelInfo,
    Sessions,
    Tensors,
    Unavailable,
)
from paddle_ft.serve.worker import STATE
from paddle_ft.serve.worker_process import (
    Done,
    Fetch,
    Outputs,
    Source,
    WorkerLost,
    WorkerProcess,
    seen,
)

_WAITERS_MAX = 1024
_TRIES = 2
_LATE_S = 0.1
"""A timer that is later says that the front stood still."""
_PUT_S_MIN = 0.5
"""For what was computed in time, to be acknowledged."""


class Pool:
    """Made by ``start``; for one event loop."""

    def __init__(
        self,
        source: Source,
        settings: PoolSettings,
        on_progress: Callable[[Progress], None],
        turns: Turns,
    ) -> None:
        self._source, self._settings = source, settings
        self._on_end: Callable[[], None] = lambda: None
        self._sessions: Sessions | None = None
        self._turns = turns
        self._refused = Refused(source.name)
        self._info: ModelInfo | None = None
        self._learnt = deadline.Learnt(settings.look_s, settings.batch_s_max)
        self._staff = Staff(source, settings, on_progress, self._change)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._looking: dict[WorkerProcess, float] = {}
        """When each is looked at next, by the clock of the loop."""
        self._retries: set[asyncio.Task[None]] = set()
        """Of batches that ``begin`` gave to workers that were lost."""

    @classmethod
    async def start(
        cls,
        folder: Path,
        name: str,
        version: str,
        settings: PoolSettings | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
        sessions: Sessions | None = None,
        turns: Turns | None = None,
    ) -> Pool:
        """A pool of which all workers are warm (spares may follow).

        ``on_end`` is called once ``folder`` is not needed any more, whatever the end; ``sessions``
        is where pipelines keep their state, and ``turns`` of all that keep it there.

        Raises ConfigError, ModelError if the model cannot be loaded; the pool is closed then.
        """
        settings = settings or PoolSettings()
        predictor = settings.predictor
        if not predictor.threads:
            threads = max(1, len(os.sched_getaffinity(0)) // settings.workers)
            predictor = replace(predictor, threads=threads)
        source = Source(folder, name, version, predictor, settings.tensor_bytes_max)
        pool = cls(source, settings, on_progress, Turns() if turns is None else turns)
        pool._on_end, pool._sessions = on_end, sessions
        pool._staff.begin()
        try:
            await pool._staff.started
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
        free = sum(worker.idle for worker in self._staff.workers)
        return max(0, min(free, self._settings.workers - self._running) - len(self._waiters))

    @property
    def pids(self) -> list[int]:
        """Of the workers that are ready, spares included."""
        return self._staff.pids

    @property
    def progress(self) -> Progress:
        return self._staff.progress

    @property
    def replaced(self) -> int:
        """Workers lost since the start."""
        return self._staff.replaced

    async def run(
        self, inputs: Tensors, timeout_s: float, session: str = "", again: bool = False
    ) -> Tensors:
        """The outputs for one batch; see ``Runner``. What a caller gives up goes on until its end,
        and its outputs, and what it would put, are left out.

        Raises ModelError (BatchRefused if workers were lost with it), Unavailable, and what
        ``Sessions.put`` raises.
        """
        until_s = asyncio.get_running_loop().time() + timeout_s
        await self._refused.check(inputs, session)
        tries = 1 if again else _TRIES
        try:
            if not session:
                return await self._run(inputs, timeout_s, until_s, tries, None)
            async with self._turns.turn(session, until_s):
                fetch = partial(self._fetch, session)
                outputs = await self._run(inputs, timeout_s, until_s, tries, fetch)
                if (changes := outputs.pop(STATE, None)) is not None:
                    pairs = changes.tolist()
                    await self._keep_state(session, pairs[::2], pairs[1::2], until_s)
                return outputs
        except BatchRefused:
            await self._refused.note(inputs, session)
            raise

    def begin(self, inputs: Tensors, timeout_s: float, done: Done) -> bool:
        """``run`` without a task, for what can begin at once: False if this cannot.

        ``done`` is called with what ``run`` returns or raises, but not for the time alone. Raises
        ModelError, Unavailable.
        """
        if self._closed or self._waiters or self._refused or (worker := self._free()) is None:
            return False
        until_s = asyncio.get_running_loop().time() + timeout_s

        def ended(result: Outputs | Exception) -> None:
            if isinstance(result, WorkerLost):
                work = self._once_more(inputs, timeout_s, until_s, done)
                task = asyncio.get_running_loop().create_task(work)
                self._retries.add(task)
                task.add_done_callback(self._retries.discard)
            else:
                done(result)

        try:
            worker.give(inputs, ended)
        except BaseException:
            self._hand_on()  # the worker is free still
            raise
        self._look_later(worker)
        return True

    async def _once_more(
        self, inputs: Tensors, timeout_s: float, until_s: float, done: Done
    ) -> None:
        result: Outputs | Exception
        try:
            result = await self._run(inputs, timeout_s, until_s, _TRIES, None, first=_TRIES)
        except BatchRefused as error:
            await self._refused.note(inputs, "")
            result = error
        except Exception as error:  # noqa: BLE001 - whoever waits is to hear of it
            result = error
        done(result)

    async def _run(
        self,
        inputs: Tensors,
        timeout_s: float,
        until_s: float,
        tries: int,
        fetch: Fetch | None,
        first: int = 1,
    ) -> Outputs:
        loop = asyncio.get_running_loop()
        for attempt in range(first, tries + 1):
            worker = await self._acquire(until_s)
            try:
                outputs: asyncio.Future[Outputs] = loop.create_future()
                outputs.add_done_callback(seen)
                worker.give(inputs, partial(_settle, outputs), fetch)
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
                if attempt == tries:
                    name = self._source.name
                    lost = f"Two workers of {name} were lost with this batch, the last"
                    if tries == 1:
                        lost = f"Another worker of {name} was lost with this batch,"
                    raise BatchRefused(f"{lost} because {error}; it is not tried again.") from None
        raise AssertionError("every way out is above")

    # ------------------------------------------------------------ the state of sessions

    async def _fetch(self, session: str, key: str) -> bytes | None:
        return await self._kept.get(session, key)

    async def _keep_state(
        self, session: str, keys: list[bytes], values: list[bytes], until_s: float
    ) -> None:
        """Returns when all is acknowledged."""
        left_s = max(_PUT_S_MIN, until_s - asyncio.get_running_loop().time())
        changes = {key.decode(): value for key, value in zip(keys, values, strict=True)}
        try:
            await asyncio.wait_for(self._kept.put(session, changes, left_s), left_s)
        except asyncio.TimeoutError:
            raise Unavailable(
                f"What {self._source.name} keeps for this session was not acknowledged within "
                f"{left_s:.1f} s, and whether it will be is not known."
            ) from None

    @property
    def _kept(self) -> Sessions:
        if self._sessions is None:
            raise ModelError(
                f"{self._source.name} keeps something for each session, and this replica is in no "
                f"group that could keep it; start it with --etcd."
            )
        return self._sessions

    async def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        self._staff.end()
        while self._waiters:
            self._hand_on()
        await self._staff.wait()
        while self._retries:
            await asyncio.gather(*self._retries, return_exceptions=True)
        self._on_end()

    # ------------------------------------------------------------ who runs

    @property
    def _closed(self) -> bool:
        return self._staff.closed

    @property
    def _running(self) -> int:
        return sum(worker.batch is not None for worker in self._staff.workers)

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
        return next((worker for worker in self._staff.workers if worker.idle), None)

    def _hand_on(self) -> None:
        """Wakes who waits longest, if there is a worker for it."""
        if self._waiters and (self._closed or self._free() is not None):
            self._waiters.popleft().set_result(None)

    def _unavailable(self) -> Unavailable:
        why = "is being unloaded here" if self._closed else "has no worker that is free in time"
        return Unavailable(f"{self._source.name} {why}.")

    def _look_later(self, worker: WorkerProcess) -> None:
        """One timer for each worker, not for each batch, each of which is looked at within
        ``look_s``."""
        if worker not in self._looking:
            loop = asyncio.get_running_loop()
            due_s = self._looking[worker] = loop.time() + self._settings.look_s
            loop.call_at(due_s, self._look, worker)

    def _look(self, worker: WorkerProcess) -> None:
        """Ends a worker whose batch takes too long."""
        late_s = self._late_s(worker)
        del self._looking[worker]
        batch = worker.batch
        if batch is None:
            return
        if late_s > _LATE_S:  # so may the worker have been, and what it has sent is not read yet
            batch.began_s += late_s
        ran_s, stopped_s, still_s = worker.look()
        bounds = self._learnt.bounds(batch.nbytes)
        reason = deadline.verdict(ran_s, bounds, stopped_s, still_s, may_wait=self._may_wait)
        if reason:
            worker.kill(reason)
        else:
            self._look_later(worker)

    def _late_s(self, worker: WorkerProcess) -> float:
        """For how long a look at it is overdue: this process stood still, or had no processor."""
        now_s = asyncio.get_running_loop().time()
        return now_s - self._looking.get(worker, now_s)

    @property
    def _may_wait(self) -> bool:
        """Whether a worker that does nothing may yet be about its batch."""
        return self._source.settings.device != "cpu" or self.info.platform != PLATFORM

    def _change(self, worker: WorkerProcess) -> None:
        if self._info is None and worker.idle:
            self._info = worker.ready.result()
        if worker.took is not None:
            if self._late_s(worker) <= _LATE_S:  # or a hang would be noticed so much later
                self._learnt.note(*worker.took)
            worker.took = None
        self._hand_on()


def _settle(future: asyncio.Future[Outputs], result: Outputs | Exception) -> None:
    if future.done():  # given up
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
