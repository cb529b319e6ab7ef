"""The models that a replica answers for: which are loading, which version of each is asked by name.

Whoever loads models tells it (``loading``, ``serve``, ``failed``, ``retire``); HTTP and gRPC ask.
A version takes over from another one between two requests: what the old one has taken it finishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from paddle_ft.serve.batcher import Batcher
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import Runner, Unavailable


class Loading(Unavailable):
    """The model is on its way: ``progress`` from 0 to 1."""

    def __init__(self, message: str, retry_after_s: float, progress: float) -> None:
        super().__init__(message, retry_after_s)
        self.progress = progress


class Control(Protocol):
    """Who loads and unloads models when an administrator asks for it."""

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Returns once the model is served; raises ServeError."""
        ...

    async def unload(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the repository index."""

    name: str
    version: str
    state: str
    """LOADING, READY, UNLOADING or UNAVAILABLE."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Coming:
    version: str
    progress: float
    retry_after_s: float
    failure: str = ""
    extra: bool = False
    """The replica is ready without it."""
    idle: bool = False
    """Its files are here, its workers are not wanted now."""


class Catalog:
    """Models by name and version. Used on one event loop."""

    def __init__(self, limits: Limits, drain_s: float = 30.0) -> None:
        """``limits`` hold for each version; ``drain_s`` is how long a retired one may finish."""
        self._limits = limits
        self._drain_s = drain_s
        self._served: dict[tuple[str, str], Batcher] = {}
        self._default: dict[str, str] = {}
        self._coming: dict[str, _Coming] = {}
        self._leaving: set[tuple[str, str]] = set()
        self._watchers: set[Callable[[], None]] = set()
        self._draining = False

    # ------------------------------------------------------------ told

    def loading(
        self,
        name: str,
        version: str,
        progress: float = 0.0,
        retry_after_s: float = 1.0,
        extra: bool = False,
    ) -> None:
        """``version`` ("": not known yet) is on its way, ``progress`` of it done; one served before
        stays. Without what is ``extra`` the replica is ready, too."""
        self._coming[name] = _Coming(version, progress, retry_after_s, extra=extra)
        self._changed()

    def failed(self, name: str, version: str, reason: str, extra: bool = False) -> None:
        """``version`` could not be loaded."""
        self._coming[name] = _Coming(version, 0.0, 5.0, reason, extra)
        self._changed()

    def idle(self, name: str, version: str) -> None:
        """``version`` is here for the case of need: not ready; what still serves it answers."""
        self._coming[name] = _Coming(version, 1.0, 1.0, idle=True)
        self._changed()

    def forget(self, name: str) -> None:
        """Nothing of this model is on its way any more."""
        self._coming.pop(name, None)
        self._changed()

    def serve(self, runner: Runner) -> None:
        """``runner`` is warm: who names no version gets this one from now on."""
        info = runner.info
        key = info.name, info.version
        assert key not in self._served, "a version is served by one runner"
        self._served[key] = Batcher(runner, self._limits)
        self._default[info.name] = info.version
        coming = self._coming.get(info.name)
        if coming is not None and coming.version == info.version:
            del self._coming[info.name]
        self._changed()

    @property
    def limits(self) -> Limits:
        """Of each version."""
        return self._limits

    def limit(self, limits: Limits) -> None:
        """``limits`` hold from now on, also for what is served already."""
        self._limits = limits
        for batcher in self._served.values():
            batcher.limit(limits)

    async def retire(self, name: str, version: str) -> None:
        """Takes ``version`` out, lets it finish, ends its runner. Nothing, if it is not here."""
        batcher = self._served.pop((name, version), None)
        if batcher is None:
            return
        if self._default.get(name) == version:
            del self._default[name]
        self._leaving.add((name, version))
        self._changed()
        try:
            await batcher.close(self._drain_s)
        finally:
            self._leaving.discard((name, version))
            self._changed()

    def drain(self) -> None:
        """Not ready any more, though everything is still answered."""
        self._draining = True
        self._changed()

    async def close(self) -> None:
        """Finishes what was taken, and ends every runner."""
        await asyncio.gather(*(self.retire(*key) for key in list(self._served)))

    # ------------------------------------------------------------ asked

    def find(self, name: str, version: str = "") -> Batcher:
        """Raises BadRequest (404), Loading (503) or Unavailable."""
        found = self._served.get((name, version or self._default.get(name, "")))
        if found is not None:
            return found
        coming = self._coming.get(name)
        if coming is not None and version in ("", coming.version):
            named = f"{name} {coming.version}".strip()
            if coming.idle:
                raise Unavailable(f"{named} is not served by this standby: ask another replica")
            if coming.failure:
                raise Unavailable(
                    f"{named} could not be loaded: {coming.failure}",
                    coming.retry_after_s,
                )
            raise Loading(
                f"{named} is being loaded: {coming.progress:.0%} done",
                coming.retry_after_s,
                coming.progress,
            )
        if any(key[0] == name and version in ("", key[1]) for key in self._leaving):
            raise Unavailable(f"{name} is being taken out", 1.0)
        what = f"version {version[:60]!a} of " if version and name in self._default else ""
        raise BadRequest(f"there is no {what}model {name[:60]!a} here", 404)

    @property
    def served(self) -> dict[str, str]:
        """The version, by model, that is given to who names none."""
        return dict(self._default)

    @property
    def progress(self) -> float:
        """Of all that is on its way, 0 to 1."""
        coming = [c.progress for c in self._coming.values() if not c.failure and not c.extra]
        return min(coming, default=1.0)

    def versions(self, name: str) -> list[str]:
        return [version for model, version in self._served if model == name]

    def batchers(self, name: str = "", version: str = "") -> list[Batcher]:
        """Those of one version, of one model, or all; raises as ``find`` if it has none."""
        found = [
            batcher
            for (model, of), batcher in self._served.items()
            if name in ("", model) and version in ("", of)
        ]
        return found if found or not name else [self.find(name, version)]

    def ready(self, name: str = "", version: str = "") -> bool:
        """Whether this model, or every model there is to be, is answered.

        Raises BadRequest (404) for a model that nobody has named.
        """
        if self._draining:
            return False
        if not name:
            if any(c.idle for c in self._coming.values()):
                return False
            coming = {each for each, c in self._coming.items() if not c.extra}
            names = {*self._default, *coming}
            return bool(names) and all(self.ready(each) for each in names)
        try:
            self.find(name, version)
        except Unavailable:
            return False
        return True

    def index(self) -> Iterator[Entry]:
        for name, version in self._served:
            yield Entry(name, version, "READY")
        for name, coming in self._coming.items():
            if coming.idle:
                yield Entry(name, coming.version, "UNAVAILABLE", "its workers are not wanted now")
            elif coming.failure:
                yield Entry(name, coming.version, "UNAVAILABLE", coming.failure)
            else:
                yield Entry(name, coming.version, "LOADING", f"{coming.progress:.0%} done")
        for name, version in self._leaving:
            yield Entry(name, version, "UNLOADING", "finishes what it has taken")

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Calls ``changed`` whenever an answer of ``ready`` may have changed, until cancelled."""
        self._watchers.add(changed)
        return lambda: self._watchers.discard(changed)

    def _changed(self) -> None:
        for watcher in list(self._watchers):
            watcher()
