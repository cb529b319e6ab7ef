"""A model of an object store: immutable objects, conditional put, slow and failing when told to.

``ModelStore`` is the ``Store`` of ``paddle_ft.checkpoint.store`` in memory and never fails;
``StoreFront`` puts virtual time and faults between it and the simulated agents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from paddle_ft.checkpoint.store import Buffers, ObjectInfo, views
from paddle_ft.errors import PaddleFTError, StoreMissing, StoreUnavailable
from tests.sim.clock import Clock
from tests.sim.task import Effect, Task

T = TypeVar("T")


class ModelStore:
    """Args: clock: gives seconds; time of modification of what is stored."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0, url: str = "model://") -> None:
        self.url = url
        self._clock = clock
        self._objects: dict[str, tuple[bytes, float]] = {}

    def put(self, name: str, data: Buffers, *, if_absent: bool = False) -> bool:
        if if_absent and name in self._objects:
            return False
        content = data if isinstance(data, bytes) else b"".join(bytes(v) for v in views(data))
        self._objects[name] = (content, self._clock())
        return True

    def get(self, name: str) -> bytes:
        if name not in self._objects:
            raise StoreMissing(f"There is no {name} in {self.url}.")
        return self._objects[name][0]

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        content = self.get(name)
        end = offset + sum(t.nbytes for t in targets)
        if end > len(content):
            raise StoreMissing(f"{name} in {self.url} ends before byte {end}.")
        for target in targets:
            target[:] = content[offset : offset + target.nbytes]
            offset += target.nbytes

    def find(self, prefix: str) -> list[ObjectInfo]:
        return [
            ObjectInfo(name, len(content), modified_s)
            for name, (content, modified_s) in sorted(self._objects.items())
            if name.startswith(prefix)
        ]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._objects.pop(name, None)

    def check(self) -> None:
        """Nothing can be wrong with it."""

    def sweep(self) -> None:
        """Nothing is ever left half-written."""

    def __contains__(self, name: str) -> bool:
        return name in self._objects


class StoreFront:
    """Requests to the store on the virtual clock.

    ``slow``: factor on every delay. ``failing``: nodes that get StoreUnavailable; the request may
    have been served all the same.
    """

    def __init__(self, clock: Clock, store: ModelStore) -> None:
        self._clock = clock
        self.store = store
        self.slow = 1.0
        self.failing: set[str] = set()

    def call(self, task: Task, node: str, request: Callable[..., T], *args: Any) -> Effect:
        """Effect that gives what ``request(*args)`` gives, some time later."""
        clock = self._clock

        def start() -> None:
            half_s = clock.between(0.005, 0.03) * self.slow
            clock.after(half_s, arrive, half_s)

        def arrive(half_s: float) -> None:
            failing = node in self.failing
            if failing and clock.chance(0.7):
                answer(StoreUnavailable("The store does not answer."), half_s)
                return
            result: Any
            try:
                result = request(*args)
            except PaddleFTError as error:
                result = error
            answer(StoreUnavailable("No answer came back.") if failing else result, half_s)

        def answer(result: Any, half_s: float) -> None:
            task.process.after(half_s, task.resume, result)

        return start
