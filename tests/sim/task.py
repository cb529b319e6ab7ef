"""Coroutines on the virtual clock: what the agents' threads are in the product.

A task is a generator that yields effects. An effect is a function that sets something going and
sees to it that ``Task.resume(result)`` is called later, through the task's process, so that a
frozen process is resumed when it wakes and a killed one never. A result that is an exception is
raised in the generator, which therefore reads like the blocking code that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from tests.sim.clock import Process

Effect = Callable[[], None]
Steps = Generator[Effect, Any, Any]


class Task:
    __slots__ = ("_finished", "_steps", "process")

    def __init__(
        self,
        process: Process,
        steps: Callable[[Task], Steps],
        finished: Callable[[Any], None] | None = None,
    ) -> None:
        """Runs ``steps(self)`` to its first effect; ``finished`` gets what it returns."""
        self.process = process
        self._finished = finished
        self._steps = steps(self)
        self.resume(None)

    def resume(self, result: Any) -> None:
        try:
            if isinstance(result, Exception):
                effect = self._steps.throw(result)
            else:
                effect = self._steps.send(result)
        except StopIteration as end:
            if self._finished is not None:
                self._finished(end.value)
            return
        effect()

    def sleep(self, delay_s: float) -> Effect:
        return lambda: self.process.after(delay_s, self.resume, None)
