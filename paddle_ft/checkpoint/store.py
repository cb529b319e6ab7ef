"""Where checkpoints are kept: immutable objects with a name, in a directory or an object store.

Invariant: an object is there as a whole or not at all, and once ``put`` has returned it survives a
crash of this machine (as far as the store's own promise goes). Everything a store can do wrong
comes out as StoreDenied, StoreMissing, StoreFull or StoreUnavailable; the last one only after the
configured number of attempts with exponential back-off and jitter.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from retrying import Retrying

from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    ConfigError,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreUnavailable,
)

_log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")
Buffers = bytes | bytearray | memoryview | Sequence[memoryview]

SWEEP_AGE_S = 86_400.0
_BACK_OFF_FIRST_MS = 100
_BACK_OFF_MAX_MS = 5000


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    name: str
    nbytes: int
    modified_s: float
    """Seconds since 1970 by the store's clock; compare it with the same store's only."""


class Store(Protocol):
    """Objects below one URL. Names have ``/`` between their parts. Safe for threads."""

    @property
    def url(self) -> str:
        """What the user gave, for messages; without credentials."""
        ...

    def put(self, name: str, data: Buffers, *, if_absent: bool = False) -> bool:
        """Stores ``data`` durably. With ``if_absent``: False, and nothing done, if it is there."""
        ...

    def get(self, name: str) -> bytes:
        """The whole object; raises StoreMissing."""
        ...

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        """Fills ``targets`` one after the other from byte ``offset``.

        Raises StoreMissing if the object is not there or ends too early.
        """
        ...

    def find(self, prefix: str) -> list[ObjectInfo]:
        """All objects whose names begin with ``prefix``, sorted by name."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Removes them; one that is not there is no error."""
        ...

    def check(self) -> None:
        """Writes, reads back and deletes a probe; raises what is wrong, in seconds."""
        ...

    def sweep(self) -> None:
        """Removes what crashes have left half-written, once it is a day old."""
        ...


def get_range(store: Store, name: str, offset: int, nbytes: int) -> bytes:
    """``nbytes`` bytes of an object; raises StoreMissing if it is not there or ends too early."""
    buffer = bytearray(nbytes)
    store.read_into(name, offset, [memoryview(buffer)])
    return bytes(buffer)


def tiers_of(store: Store) -> Sequence[Store]:
    """The stores to ask for an object, nearest first; a plain store is its only tier."""
    tiers: Sequence[Store] = getattr(store, "tiers", ()) or (store,)
    return tiers


def open_store(url: str, config: CheckpointConfig | None = None) -> Store:
    """The store at ``url``: a directory, ``file://``, ``s3://bucket/prefix``, or what fsspec knows.

    With the cache in front that ``config`` names. Does no I/O; ``check`` does. Raises ConfigError
    for a URL that cannot be one.
    """
    from paddle_ft.checkpoint.tiers import cached

    config = config or CheckpointConfig()
    return cached(_open(url, config), config)


def _open(url: str, config: CheckpointConfig) -> Store:
    if not url:
        raise ConfigError("The checkpoint URL is empty; give a directory or s3://bucket/prefix.")
    if "://" not in url:
        from paddle_ft.checkpoint.store_directory import DirectoryStore

        return DirectoryStore(Path(url), config)
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(
            f"The checkpoint URL {parts.scheme}://… has a query, fragment or credentials in it; "
            f"credentials come from the environment, a profile or a role."
        )
    if parts.scheme == "file":
        from paddle_ft.checkpoint.store_directory import DirectoryStore

        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"The checkpoint URL {url} needs three slashes: file:///directory.")
        return DirectoryStore(Path(unquote(parts.path)), config)
    if parts.scheme == "s3":
        from paddle_ft.checkpoint.store_s3 import S3Store

        if not parts.netloc:
            raise ConfigError(f"The checkpoint URL {url} names no bucket; use s3://bucket/prefix.")
        return S3Store(parts.netloc, parts.path.strip("/"), config)
    if parts.scheme in ("http", "https"):
        raise ConfigError(
            f"The checkpoint URL {url} is that of a web server, which takes no checkpoints; use a "
            f"directory, or s3://bucket/prefix with checkpoint.endpoint_url for a server of S3."
        )
    from paddle_ft.checkpoint.store_fsspec import FsspecStore

    return FsspecStore(url, config)


def views(data: Buffers) -> list[memoryview]:
    """``data`` as flat byte views, without the empty ones."""
    items = [data] if isinstance(data, (bytes, bytearray, memoryview)) else list(data)
    return [v for item in items if (v := memoryview(item).cast("B")).nbytes]


def retry(attempts: int, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``action(…)``, again after StoreUnavailable, at most ``attempts`` times in all.

    Waits 0.2, 0.4, 0.8 … 5 s between, plus up to 0.1 s of jitter.
    """
    retrying = Retrying(
        stop_max_attempt_number=attempts,
        wait_exponential_multiplier=_BACK_OFF_FIRST_MS,
        wait_exponential_max=_BACK_OFF_MAX_MS,
        wait_jitter_max=_BACK_OFF_FIRST_MS,
        retry_on_exception=_transient,
    )
    result: T = retrying.call(action, *args, **kwargs)
    return result


def _transient(error: BaseException) -> bool:
    if not isinstance(error, StoreUnavailable):
        return False
    _log.info("trying again: %s", error)
    return True


def probe(store: Store) -> None:
    """``Store.check`` for any store."""
    name = f"probe-{secrets.token_hex(8)}"
    with naming_the_store(name):
        _probe(store, name, secrets.token_bytes(64))


@contextlib.contextmanager
def naming_the_store(name: str) -> Iterator[None]:
    """Takes ``name`` out of error messages: an object of ours that means nothing to the user."""
    try:
        yield
    except StoreError as error:
        raise type(error)(str(error).replace(f"/{name}", "")) from error


def _probe(store: Store, name: str, content: bytes) -> None:
    store.put(name, content)
    try:
        found = store.get(name)
    except StoreMissing as error:
        raise StoreUnavailable(
            f"{store.url} does not give back what was just written to it; it cannot hold "
            f"checkpoints."
        ) from error
    if found != content:
        raise StoreUnavailable(
            f"{store.url} gives back other bytes than were written; it cannot hold checkpoints."
        )
    try:
        store.delete([name])
    except StoreDenied as error:
        raise StoreDenied(
            f"{store.url} can be written but not deleted from; allow deletion, or old "
            f"checkpoints stay for ever."
        ) from error
