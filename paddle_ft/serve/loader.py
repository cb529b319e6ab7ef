"""Brings published models to a replica, swaps their versions, and takes them out again.

Invariant: of one model at most one change is under way, and what is served is taken out only when
its successor is warm and is asked instead. So of one model at most two versions are in memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import Store
from paddle_ft.errors import (
    ConfigError,
    MachineError,
    PaddleFTError,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.serve import memory
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.folder import LoadedVersion, load
from paddle_ft.serve.models import Version, VersionRef, check_name, list_versions, read_version
from paddle_ft.serve.pool import Pool
from paddle_ft.serve.predictor import Settings
from paddle_ft.serve.staff import PoolSettings, Progress
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.turns import Turns
from paddle_ft.serve.types import ServeError, Sessions, Unavailable
from paddle_ft.serve_config import ServeConfig

log = logging.getLogger("paddle_ft")
T = TypeVar("T")

_FETCHED = 0.5
"""How much of the way it is until the files are there."""
_VERSION_MAX = 10**8


@dataclass(frozen=True, slots=True)
class Wanted:
    name: str
    version: int | None = None
    """None: the newest."""
    digest: str = ""
    """Of its manifest; "": any."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name


def wanted(text: str) -> Wanted:
    """``digits`` or ``digits=2``; raises ConfigError."""
    name, equals, version = text.partition("=")
    check_name(name)
    if equals and not _is_version(version):
        raise ConfigError(f"--model {text}: a version is a whole number from 1; give {name}=1.")
    return Wanted(name, int(version) if equals else None)


def pool_settings(config: ServeConfig) -> PoolSettings:
    """The part of the settings that the workers of each model have."""
    predictor = Settings(
        threads=config.threads,
        exact=config.exact,
        device=config.device,
        memory_pool_mb=config.device_memory_mb,
        rows_max=config.batch_rows_max,
    )
    return PoolSettings(
        workers=config.workers,
        spares=config.spares,
        predictor=predictor,
        batch_s_max=config.batch_timeout_s,
        start_s_max=config.start_timeout_s,
        tensor_bytes_max=config.tensor_bytes_max,
    )


class Loader:
    """Loads from a store into a catalog; for one event loop."""

    def __init__(self, store: Store, trust: Trust, cache: Path, settings: PoolSettings) -> None:
        self._store, self._trust, self._cache = store, trust, cache
        self._settings = settings
        self.sessions: Sessions | None = None
        """Where pipelines keep their state; set before models are loaded."""
        self._turns = Turns()
        """Of all models and versions: an old one may run beside the new one for a while."""
        self._catalog: Catalog | None = None
        self._locks: dict[str, asyncio.Lock] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._nbytes: dict[str, int] = {}
        """Of the files that are served, by model."""
        self._digests: dict[str, str] = {}
        """Of the manifests that are served, by model."""
        self._stopped = False

    def fill(self, catalog: Catalog) -> None:
        """Says where models are served; before anything else."""
        self._catalog = catalog

    @property
    def catalog(self) -> Catalog:
        assert self._catalog is not None
        return self._catalog

    async def stop(self) -> None:
        """Gives up what is on its way; what is served stays."""
        self._stopped = True
        tasks = [task for task in self._tasks if task not in self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ one model

    async def bring(self, wanted: Wanted, extra: bool = False) -> None:
        """Returns once that version is served. Raises PaddleFTError; then all is as before.

        Without what is ``extra`` the replica is ready, too.
        """
        name = wanted.name
        if self._stopped:
            raise self._leaves()
        async with self._lock(name):
            if leaving := self._leaving.get(name):
                await asyncio.wait([leaving])
            manifest, ref = await self._ref(wanted)
            version, before = str(ref.version), self.catalog.served.get(name)
            if version == before:
                self.catalog.forget(name)
                return
            try:
                if before is not None:
                    self._look_for_room(name, before, manifest.nbytes)
                await self._serve(ref, extra or before is not None)
            except asyncio.CancelledError:
                self.catalog.forget(name)
                raise
            except PaddleFTError as error:
                if before is not None:
                    self.catalog.failed(name, version, str(error))
                elif extra:
                    self.catalog.forget(name)
                raise
            if before is not None:
                self._retire(name, before)

    async def fetch(self, wanted: Wanted) -> int:
        """Has the files of that version on this machine; gives its number. Raises PaddleFTError."""
        name = wanted.name
        async with self._lock(name):
            ref = (await self._ref(wanted))[1]

            def tell(share: float) -> None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(
                        self.catalog.loading, name, str(ref.version), share * _FETCHED
                    )

            loop = asyncio.get_running_loop()
            await self._folder(ref, tell)
            self.catalog.idle(name, str(ref.version))
            return ref.version

    def digest(self, name: str) -> str:
        """Of the manifest of the version that is served, or was last."""
        return self._digests.get(name, "")

    async def newest(self, name: str) -> int | None:
        """The newest version in the store; raises StoreError."""
        found = await beside(partial(list_versions, self._store, name))
        return max(found.get(name, ()), default=None)

    async def cool(self, name: str) -> None:
        """Ends the workers of a model, once they have finished; its files stay."""
        async with self._lock(name):
            for version in self.catalog.versions(name):
                self._retire(name, version)
            await asyncio.sleep(0)  # they have begun to leave: nothing of it is served any more

    async def unload(self, name: str) -> None:
        """Serves no version of it any more; raises BadRequest (404)."""
        async with self._lock(name):
            versions = self.catalog.versions(name)
            if not versions:
                raise BadRequest(f"there is no model {name[:60]!a} here", 404)
            self.catalog.forget(name)
            for version in versions:
                self._retire(name, version)
            await asyncio.sleep(0)  # as in cool: who looks now must not unload it again
        log.info("%s is no longer served here", name)

    async def _serve(self, ref: VersionRef, extra: bool) -> None:
        name, version, loop = ref.name, str(ref.version), asyncio.get_running_loop()
        began_s = time.monotonic()

        stage = "fetches"

        def tell(share: float) -> None:
            if stage == "fetches":
                self.catalog.loading(name, version, share * _FETCHED, extra=extra)

        def fetched(share: float) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, share)

        def started(progress: Progress) -> None:
            if stage == "starts":
                share = _FETCHED + (1 - _FETCHED) * progress.ready / progress.wanted
                self.catalog.loading(name, version, min(share, 0.99), extra=extra)

        tell(0.0)
        found = await self._folder(ref, fetched)
        stage = "starts"
        pool = await Pool.start(
            found.folder,
            name,
            version,
            self._settings,
            started,
            on_end=found.held.close,
            sessions=self.sessions,
            turns=self._turns,
        )
        stage = "serves"
        self.catalog.serve(pool)
        self._nbytes[name], self._digests[name] = found.manifest.nbytes, ref.digest
        log.info(
            "%s %s is served: %.1f MB, of which %.1f MB fetched, after %.1f s",
            name,
            version,
            found.manifest.nbytes / 1e6,
            found.nbytes_fetched / 1e6,
            time.monotonic() - began_s,
        )

    async def _ref(self, wanted: Wanted) -> tuple[Version, VersionRef]:
        which = wanted.name, wanted.version, self._trust, wanted.digest or None
        return await beside(partial(read_version, self._store, *which))

    async def _folder(self, ref: VersionRef, on_progress: Callable[[float], None]) -> LoadedVersion:
        return await beside(
            partial(
                load,
                self._store,
                ref.name,
                ref.version,
                self._cache,
                trust=self._trust,
                digest=ref.digest,
                on_progress=on_progress,
            )
        )

    def _look_for_room(self, name: str, before: str, nbytes: int) -> None:
        """Raises MachineError if a second version will not fit beside the one that is served."""
        pids = getattr(self.catalog.find(name, before).runner, "pids", ())
        need = memory.private_bytes(pids) * max(1.0, nbytes / self._nbytes.get(name, nbytes))
        free = memory.free_bytes()
        if free is not None and need > free:
            raise MachineError(
                f"another version of {name} beside version {before} would take about "
                f"{need / 1e9:.2f} GB of memory, and {free / 1e9:.2f} GB are free; make room, or "
                "give it fewer workers and spares."
            )

    def _retire(self, name: str, version: str) -> None:
        """Lets that version finish, beside whatever goes on."""
        task = self._spawn(self.catalog.retire(name, version))
        self._leaving[name] = task

        def gone(_: object) -> None:
            if self._leaving.get(name) is task:
                del self._leaving[name]

        task.add_done_callback(gone)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _leaves(self) -> Unavailable:
        return Unavailable("this replica is leaving: ask another one")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waits; who has gone need not hear it


async def beside(call: Callable[[], T]) -> T:
    """``call()`` on a daemon thread: neither the loop nor the process waits for it at the end."""
    done: Future[T] = Future()

    def work() -> None:
        if done.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                done.set_exception(error)
            else:
                done.set_result(result)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await asyncio.wrap_future(done)


def version_of(parameters: Mapping[str, Any]) -> int | None:
    """Which version a load asks for: by ``version``, or as tritonclient says it (``config``).

    None: the newest. Raises BadRequest for what cannot be done here.
    """
    others = sorted(parameters.keys() - {"version", "config"})
    if others:
        raise BadRequest(f"there is no parameter {others[0][:60]!a} of a load: give version")
    asked = parameters.get("version")
    if "config" in parameters:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            policy = json.loads(parameters["config"])["version_policy"]
            if policy == {"latest": {"num_versions": 1}}:
                return None
            (asked,) = policy["specific"]["versions"]
        if asked is None:
            raise BadRequest(
                'config can name a version alone: {"version_policy": {"specific": {"versions": '
                "[2]}}}"
            )
    if asked is None:
        return None
    if isinstance(asked, bool) or not _is_version(str(asked)):
        raise BadRequest("version must be a whole number from 1")
    return int(asked)


def _is_version(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text[:9]) < _VERSION_MAX


def as_answer(error: PaddleFTError) -> ServeError:
    """What a client that asked for a model is told."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, StoreMissing):
        return BadRequest(str(error), 404)
    if isinstance(error, ConfigError):
        return BadRequest(str(error), 400)
    if isinstance(error, (StoreUnavailable, MachineError)):
        return Unavailable(str(error), 5.0)
    return ServeError(str(error))
