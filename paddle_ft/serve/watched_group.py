"""The group that a gateway serves, read from etcd and followed there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.kv import Event, KeyValue, Snapshot
from paddle_ft.errors import EtcdUnavailable, PaddleFTError
from paddle_ft.serve.registry import Group, Keys, parse
from paddle_ft.serve.types import ServeError

ETCD_RETRY_S = 1.0


class Registry:
    """The group as etcd has it, followed on a thread; it keeps trying while etcd is away.

    Unlike ``coordination.mirror`` it goes on with an etcd that has lost data: that is no reason to
    stop routing, and whoever is not in it answers its health check or not.
    """

    def __init__(self, config: EtcdConfig, name: str, notify: Callable[[], None]) -> None:
        self._coordinator = EtcdCoordinator(config)
        self._keys = Keys(name)
        self._notify = notify
        self._lock = threading.Lock()
        self._kvs: dict[str, KeyValue] = {}
        self._known = False
        self._parsed: Group | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """One try now; further ones in the background if it raises EtcdUnavailable."""
        try:
            self._follow()
        except EtcdUnavailable:
            threading.Thread(target=self._try_on, name="registry", daemon=True).start()
            raise

    def group(self) -> Group | None:
        """None while nothing has been read; raises ValueError if the keys hold something else."""
        with self._lock:
            if self._parsed is None and self._known:
                self._parsed = parse(self._keys, self._kvs.values())
            return self._parsed

    def close(self) -> None:
        self._closed.set()
        self._coordinator.close()

    def _follow(self) -> None:
        snapshot = self._coordinator.read(self._keys.prefix)
        self._reset(snapshot)
        self._coordinator.watch(self._keys.prefix, snapshot.revision, self._apply, self._reset)

    def _try_on(self) -> None:
        while not self._closed.wait(ETCD_RETRY_S):
            with suppress(PaddleFTError):
                self._follow()
                return

    def _reset(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._kvs, self._known = {kv.key: kv for kv in snapshot.kvs}, True
            self._parsed = None
        self._notify()

    def _apply(self, _revision: int, events: tuple[Event, ...]) -> None:
        with self._lock:
            self._parsed = None
            for event in events:
                if event.deleted:
                    self._kvs.pop(event.kv.key, None)
                else:
                    self._kvs[event.kv.key] = event.kv
        self._notify()


def read_group(config: EtcdConfig, name: str) -> Group:
    """The group, once; raises EtcdUnavailable, ServeError."""
    registry = Registry(config, name, lambda: None)
    try:
        registry.start()
        return registry.group() or Group()
    except ValueError as error:
        raise ServeError(foreign(name, error)) from error
    finally:
        registry.close()


def foreign(name: str, error: ValueError) -> str:
    """That ``error`` was met in the keys of the group ``name``, as a sentence."""
    told = str(error).splitlines()[0]
    return (
        f"etcd holds something else for the group {name} than this version expects ({told}): use "
        f"one version for all, or another --group"
    )
