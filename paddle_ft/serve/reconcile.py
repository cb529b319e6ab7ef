"""One task for each model of a replica, which goes on until what is wanted of it is so.

What is wanted, and what is due, ``wanted`` says; what else the primary does, its caller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from paddle_ft.errors import (
    CheckpointError,
    ConfigError,
    PaddleFTError,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.serve import wanted
from paddle_ft.serve.loader import Loader, Wanted
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import ModelError, Unavailable
from paddle_ft.serve.wanted import Choice, Failure, Situation

log = logging.getLogger("paddle_ft")
T = TypeVar("T")


@dataclass
class Model:
    """What is wanted, and what has come of it."""

    name: str
    own: int | None = None
    """Of the command line; NEWEST: no number."""
    choice: Choice | None = None
    fetched: int | None = None
    found: int = 0
    """The newest that was seen in the store."""
    failed: Failure | None = None
    unproven: Failure | None = None
    """Of a version that was to be proposed."""
    not_taken: int = 0
    """The newest that was told of and left alone, as another one was asked for by number."""
    loads: int = 0
    """That administrators have asked for and that have not ended."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Models:
    """Of one replica; for one event loop.

    Args:
        notice_s: how long workers stay after the others were told that they will not.
        lead: called with a model when there is nothing else to do about it; gives when to call it
            again (monotonic), should there be no news. Its lock is held.
    """

    def __init__(
        self, loader: Loader, notice_s: float, lead: Callable[[Model, float], Awaitable[float]]
    ) -> None:
        self._loader = loader
        self._notice_s = notice_s
        self._lead = lead
        self.group: Replicated | None = None
        self._models: dict[str, Model] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[None] | None = None
        self._running = False
        self.stopped = False

    async def run(self) -> None:
        """Raises PaddleFTError for what keeps it from serving what the command line names, and
        trying again cannot mend; and any defect."""
        self._ended = asyncio.get_running_loop().create_future()
        self._running = True
        for model in self:
            self.begin(model)
        await self._ended

    async def stop(self) -> None:
        """Ends all tasks."""
        self.stopped = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    # ------------------------------------------------------------ what is told of this replica

    @property
    def failures(self) -> dict[str, Failure]:
        """What is wanted and cannot be served here, by model."""
        return {m.name: m.failed for m in self._models.values() if m.failed is not None}

    @property
    def standby(self) -> bool:
        """All files are here, and no workers are wanted."""
        named = [m for m in self._models.values() if self._target(m) is not None]
        return not self.is_warm() and all(m.fetched is not None for m in named)

    # ------------------------------------------------------------ one task for each model

    def model(self, name: str) -> Model:
        """As it was, or a new one."""
        return self._models.setdefault(name, Model(name))

    def get(self, name: str) -> Model | None:
        return self._models.get(name)

    def forget(self, name: str) -> None:
        """Nobody wants a model of that name: a load of it has failed."""
        model = self._models.get(name)
        if model is None or model.loads:  # else the next one would go on with what is forgotten
            return
        if model.task is None and model.own is None and not model.choice:
            del self._models[name]

    def begin(self, model: Model) -> None:
        model.news.set()
        if self._running and model.task is None and not self.stopped:
            model.task = self.spawn(self._keep(model))

    async def _keep(self, model: Model) -> None:
        """Does what is due, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            model.news.clear()
            async with model.lock:
                until_s = await self._advance(model)
            if until_s > time.monotonic():
                # Not wait_for, which swallows a cancellation that comes with news.
                timer = None
                if until_s != float("inf"):
                    timer = loop.call_later(until_s - time.monotonic(), model.news.set)
                await model.news.wait()
                if timer is not None:
                    timer.cancel()
            else:
                await asyncio.sleep(0)  # a step need not have waited for anything

    async def _advance(self, model: Model) -> float:
        """One step; gives when the next is due, should there be no news."""
        now_s, name = time.monotonic(), model.name
        now = self._situation(model)
        if model.failed is not None and (model.failed.version != now.target):
            model.failed = None  # something else is wanted by now
            self._loader.catalog.forget(name)
        due = wanted.step(now, now_s)
        if due.kind == "none":
            if now.target is None and model.fetched is not None:  # nobody waits for it any more
                model.fetched = None
                self._loader.catalog.forget(name)
            return min(due.until_s, await self._lead(model, now_s))
        if due.kind == "load":
            await self._bring(model)
        elif due.kind == "fetch":
            await self._fetch(model)
        elif due.kind == "cool":
            model.fetched = self.served(name)
            self._loader.catalog.idle(name, str(model.fetched))
            await asyncio.sleep(self._notice_s)
            if not self.is_warm():
                await self._loader.cool(name)
        else:
            model.failed = None
            with suppress(BadRequest):  # it has gone
                await self._loader.unload(name)
        return now_s

    async def _bring(self, model: Model) -> None:
        target = self._target(model)
        assert target is not None
        # A version that the group has agreed on comes beside, where the command line has not
        # named the model.
        await self._try(model, target, self._loader.bring(_named(model, target), model.own is None))

    async def _fetch(self, model: Model) -> None:
        target = self._target(model)
        assert target is not None
        model.fetched = await self._try(model, target, self._loader.fetch(_named(model, target)))

    async def _try(self, model: Model, target: int, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            result = await work
        except PaddleFTError as error:
            self._failed(model, target, error)
            return None
        model.failed = None
        return result

    def _failed(self, model: Model, target: int, error: PaddleFTError) -> None:
        first, now_s = self.served(model.name) is None, time.monotonic()
        alone = self.group is None or model.choice is None
        if first and alone and not isinstance(error, (StoreUnavailable, Unavailable)):
            self._end(error)
        final = is_final(error)
        model.failed = wanted.failure(model.failed, target, str(error), final, now_s)
        catalog = self._loader.catalog
        if first:
            catalog.failed(model.name, str(target or ""), str(error), extra=model.own is None)
        else:
            catalog.failed(model.name, str(target or ""), str(error))
        if model.failed.tries == 1:
            what = "is not there yet, and tried again" if not final else "is not served here"
            log.warning("%s %s: %s", _named(model, target), what, error)

    # ------------------------------------------------------------ what is so

    def _situation(self, model: Model) -> Situation:
        target, group = self._target(model), self.group
        turn = True
        if group is not None and target:
            turn = wanted.is_turn(group.group, group.name, model.name, target)
        served = self.served(model.name)
        if served == target and self._is_another(model):
            served = None
        return Situation(target, served, model.fetched, model.failed, self.is_warm(), turn)

    def _is_another(self, model: Model) -> bool:
        """Whether what is served has the number of what the group serves, and is not the same."""
        digest = model.choice.digest if model.choice is not None else ""
        return digest not in ("", self._loader.digest(model.name))

    def _target(self, model: Model) -> int | None:
        return wanted.target(model.choice, model.own)

    def served(self, name: str) -> int | None:
        version = self._loader.catalog.served.get(name)
        return int(version) if version is not None else None

    def is_warm(self) -> bool:
        group = self.group
        if group is None:
            return True
        served = self._loader.catalog.served
        shared = [m.name for m in self if m.choice is not None and m.name in served]
        return wanted.is_warm(group.group, group.name, bool(served), shared)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        assert error is not None
        if not isinstance(error, PaddleFTError):  # a defect; others were told to who waits
            self._end(error)

    def _end(self, error: BaseException) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)


def _named(model: Model, version: int) -> Wanted:
    choice = model.choice
    digest = choice.digest if choice is not None and choice.version == version else ""
    return Wanted(model.name, version or None, digest)


def is_final(error: PaddleFTError) -> bool:
    return isinstance(error, (ConfigError, ModelError, CheckpointError, StoreMissing))
