"""A replica: a front, the models behind it, and its place in a serving group.

It binds its ports before anything is loaded, and answers 503 with progress until then. Its record
in etcd follows its condition. SIGTERM and SIGINT let it finish what it has taken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paddle_ft.agent.net import NodeName, address_towards, is_local, place
from paddle_ft.agent.signals import REPEAT_S
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.config import Config, EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.errors import ConfigError, CoordinationError, PaddleFTError, StoreMissing
from paddle_ft.serve import memory
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.follow import Following, Policy
from paddle_ft.serve.forks import Forks
from paddle_ft.serve.front import Front
from paddle_ft.serve.gray import Gray
from paddle_ft.serve.ledger import Bounds
from paddle_ft.serve.loader import Loader, Wanted, pool_settings, wanted
from paddle_ft.serve.member import with_heartbeat
from paddle_ft.serve.registry import Condition
from paddle_ft.serve.replicated import GroupSettings, Replicated
from paddle_ft.serve.sessions import GroupSessions, LocalSessions
from paddle_ft.serve.stream import PeerTls
from paddle_ft.serve.types import ServeError

log = logging.getLogger("paddle_ft")

LOOK_S = 0.2
"""Between two looks at the memory and at the group."""
REASON_MAX = 500
_ENOUGH = 0.05
"""So far below the bound must the memory be again for a replica to be no longer degraded."""
_ANY = ("0.0.0.0", "::", "")


def condition(ready: bool, draining: bool, degraded: bool, standby: bool = False) -> Condition:
    """What the others are told of a replica."""
    if draining:
        return "draining"
    if not ready:
        return "standby" if standby else "loading"
    return "degraded" if degraded else "ready"


class Replica:
    """Made of settings alone; ``run`` does everything."""

    def __init__(self, config: Config, forks: Forks | None = None) -> None:
        """Raises ConfigError, StoreMissing for a directory that is not there."""
        self._config = config
        self._models = models_of(config)
        settings = config.serve
        trust = Trust.of(config.checkpoint)
        self._loader = Loader(
            _store(config),
            trust,
            _cache(settings.cache),
            replace(pool_settings(settings), forks=forks),
        )
        self._bounds = Bounds(
            settings.state_bytes_max, settings.session_bytes_max, settings.session_ttl_s
        )
        self._loader.sessions = LocalSessions(self._bounds)
        self._following = Following(
            self._loader,
            Policy(settings.follow, settings.follow_store_s, settings.level, settings.notice_s),
        )
        self._gray = Gray(settings.ramp_s)
        self._front = Front(settings, self._following)
        self._loader.fill(self._front.catalog)
        self._group: Replicated | None = None
        self._name: NodeName | None = None
        self._draining = False
        self._degraded = False
        self._said = False
        self._asked: asyncio.Event
        self._asked_s = 0.0

    async def run(self, etcd: EtcdConfig) -> None:
        """Serves until SIGTERM or SIGINT, then until what was taken is answered; in the group that
        ``etcd`` holds, alone if it names none.

        Raises PaddleFTError for what keeps it from ever serving what it is to serve.
        """
        self._config = self._config.model_copy(update={"etcd": etcd})
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        clean = False
        try:
            await self._front.start()
            if self._config.etcd.endpoints:
                await self._join()
            clean = await self._serve()
        finally:
            await self._leave(clean)

    async def _serve(self) -> bool:
        """Returns once asked to stop; raises what keeps it from going on."""
        asked = asyncio.create_task(self._asked.wait())
        works = (self._following.run(self._models), self._watch(), self._answers(), self._part())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            while not asked.done():
                await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done() and not asked.done():
                        task.result()
                        raise PaddleFTError(f"{task.get_coro()} has ended; please report this.")
            return True
        finally:
            for each in (asked, *tasks):
                each.cancel()
            await asyncio.gather(asked, *tasks, return_exceptions=True)

    async def _answers(self) -> None:
        """As long as HTTP is answered; raises PaddleFTError (a defect)."""
        try:
            await self._front.ended()
        except ServeError as error:
            raise PaddleFTError(
                f"{error}: nobody is answered any more; please report it."
            ) from error

    async def _part(self) -> None:
        """As long as it takes part in its group; raises PaddleFTError (a defect)."""
        if self._group is None:
            await asyncio.Event().wait()
            return
        ended = self._group.ended
        await asyncio.wait([ended])
        why = None if ended.cancelled() else ended.exception()
        if isinstance(why, CoordinationError):
            # Of the group there is nothing left to take part in; clients are still there.
            log.error("%s. Until then this one answers for the models it has, and no more", why)
            await asyncio.Event().wait()
        if isinstance(why, PaddleFTError):
            raise why
        raise PaddleFTError(
            f"this replica takes part in its group no longer ({why!r}); please report it with what "
            "was logged before."
        ) from why

    async def _leave(self, clean: bool) -> None:
        """Tells that it goes, and goes; at once, if it has not begun well."""
        config, group = self._config.serve, self._group
        self._draining = True
        if group is not None and clean:
            await group.hand_over()  # first, as it takes changes until another one does
        self._front.catalog.drain()
        if clean:
            log.info("asked to stop: finishing what was taken, for up to %g s", config.drain_s)
        await self._following.stop()
        await self._loader.stop()
        if group is not None and clean:
            group.tell(condition="draining")
            await asyncio.sleep(config.notice_s)
        await self._front.stop()
        if group is not None:
            await group.close()
        if self._name is not None:
            self._name.release()

    def _stop(self, number: int) -> None:
        if self._asked.is_set():
            if time.monotonic() - self._asked_s < REPEAT_S:
                return
            log.warning("stopped by a second %s", signal.Signals(number).name)
            os._exit(128 + number)  # the workers end with their sockets
        self._asked_s = time.monotonic()
        self._asked.set()

    # ------------------------------------------------------------ what the others are told

    async def _join(self) -> None:
        """Becomes one of its serving group; raises CoordinationError, ConfigError."""
        config, serve = self._config, self._config.serve
        self._name = NodeName(f"serving-{serve.group}", config.job.node, alone=True)
        host = config.job.host or serve.host
        if host in _ANY:
            host = address_towards(EtcdCoordinator(config.etcd).targets)
        listen = host if is_local(host) else serve.host  # the address of a NAT, or of a service
        tls = None
        if serve.peer_ca_file:
            tls = PeerTls(serve.peer_ca_file, serve.peer_cert_file, serve.peer_key_file)
        group = Replicated(
            GroupSettings(
                with_heartbeat(config.etcd, serve.heartbeat_s, serve.misses),
                serve.group,
                self._name.name,
                host,
                self._front.http_port,
                self._front.grpc_port,
                serve.in_sync_min,
                serve.patience_s,
                bounds=self._bounds,
                tls=tls,
                plain=serve.peer_plain,
                observe_s=serve.observe_s,
                place="0" if config.job.node else place(),
                listen=listen,
                peer_port=serve.peer_port,
            )
        )
        self._loader.sessions = GroupSessions(group)
        self._following.join(group)
        self._front.state.join(group)
        try:
            await group.start()
        except BaseException:
            await group.close()
            raise
        self._group = group
        log.info("this is %s of the serving group %s", group.name, serve.group)

    async def _watch(self) -> None:
        """Keeps the record as things are."""
        loop, catalog = asyncio.get_running_loop(), self._front.catalog
        changed: asyncio.Future[None] = loop.create_future()

        def change() -> None:
            if not changed.done():
                changed.set_result(None)

        cancel = catalog.watch(change)
        most = self._config.serve.memory_used_max
        try:
            while True:
                used = memory.used_share()
                degraded = used > most - (_ENOUGH if self._degraded else 0.0)
                if degraded != self._degraded:
                    self._degraded = degraded
                    log.warning("%.0f %% of the memory are used", 100 * used)
                self._tell(catalog)
                self._say_where(catalog)
                # Not wait_for, which swallows a cancellation that comes with a change.
                await asyncio.wait([changed], timeout=LOOK_S)
                if changed.done():
                    changed = loop.create_future()
        finally:
            cancel()

    def _say_where(self, catalog: Catalog) -> None:
        """Says once, for people, what is served and where."""
        if self._said or not catalog.ready() or not catalog.served:
            return
        self._said = True
        served = ", ".join(f"{name} version {n}" for name, n in catalog.served.items())
        scheme = "https" if self._config.serve.cert_file else "http"
        host = self._config.serve.host
        log.info("serving %s at %s://%s:%d", served, scheme, host, self._front.http_port)

    def _tell(self, catalog: Catalog) -> None:
        if self._group is None:
            return
        failures, ready = self._following.failures, catalog.ready()
        self._gray.look(self._group, catalog, ready)
        reasons = [self._following.reason, self._gray.why]
        if self._degraded:
            most = self._config.serve.memory_used_max
            reasons.append(f"more than {most:.0%} of the memory are used")
        degraded = self._degraded or bool(failures)
        self._group.tell(
            condition=condition(ready, self._draining, degraded, self._following.standby),
            models=catalog.served,
            progress=round(catalog.progress, 1),
            reason="; ".join(filter(None, reasons))[:REASON_MAX],
            failed={name: str(each.version) for name, each in failures.items()},
            share=self._gray.share,
            weight=self._config.serve.weight,
        )


def models_of(config: Config) -> Sequence[Wanted]:
    """What is to be served; raises ConfigError."""
    models = [wanted(text) for text in config.serve.models]
    if not models:
        raise ConfigError("no model is named: give --model NAME, as paddle-ft models lists them")
    names = [each.name for each in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--model {name} is given twice: one version is served at a time")
    return models


def _store(config: Config) -> Store:
    url = config.checkpoint.url
    if not url:
        raise ConfigError("there is no store to load models from: give --store URL")
    # Files of models have a cache of their own.
    store = open_store(url, config.checkpoint.model_copy(update={"cache": ""}))
    if isinstance(store, DirectoryStore) and not os.path.isdir(store.url):
        raise StoreMissing(f"there is no directory {store.url}; correct --store.")
    return store


def _cache(given: str) -> Path:
    """Where files of models are kept; made if it is not there. Raises ConfigError."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(given or os.path.join(home, "paddle_ft", "models"))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--cache {place} cannot be used: {error.strerror}") from error
    return place.absolute()
