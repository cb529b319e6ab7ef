"""A few threads for one piece of work.

``concurrent.futures`` refuses new work as soon as the main thread has ended, even to a thread that
the interpreter is waiting for; a checkpoint that is being written must still get done then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from typing_extensions import Self

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class Crew:
    """``threads`` threads that live as long as the ``with`` block.

    Leaving the block waits for what is running; after an error, what has not begun is dropped.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._dropped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        self._started = 0

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs ``function(…)`` on one of the threads."""
        future: Future[T] = Future()

        def job() -> None:
            if self._dropped.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._started < len(self._threads):
            self._threads[self._started].start()
            self._started += 1
        self._queue.put(job)
        return future

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """Results in order; raises the first error when its turn comes."""
        futures = [self.submit(function, item) for item in items]
        return (future.result() for future in futures)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            self._dropped.set()
        for _thread in range(self._started):
            self._queue.put(None)
        for thread in self._threads[: self._started]:
            thread.join()
