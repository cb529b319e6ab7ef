"""Whatever fsspec knows (``memory://``, ``gs://``, ``hdfs://`` …) as a store.

Conditional puts are atomic within this process only, and durability, time-outs and credentials are
those of the file system's own package; a directory or S3 is what production should use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from paddle_ft.checkpoint.store import Buffers, ObjectInfo, probe, retry, views
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    ConfigError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
)

T = TypeVar("T")
_put_lock = threading.Lock()


class FsspecStore:
    """``Store`` at an fsspec URL."""

    def __init__(self, url: str, config: CheckpointConfig) -> None:
        self._url = url.rstrip("/")
        self._attempts = config.attempts
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self._url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"The checkpoint URL {url} cannot be used ({error}); use a directory, file:// or "
                f"s3://."
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"{url} cannot be reached ({error}); correct the URL or check the server."
            ) from error
        self._root = str(self._root).rstrip("/")

    @property
    def url(self) -> str:
        return self._url

    def put(self, name: str, data: Buffers, *, if_absent: bool = False) -> bool:
        path, content = self._path(name), b"".join(views(data))

        def attempt() -> bool:
            with _put_lock:
                if if_absent and self._fs.exists(path):
                    return False
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(path, content)
                return True

        return self._run(name, attempt)

    def get(self, name: str) -> bytes:
        return self._run(name, lambda: bytes(self._fs.cat_file(self._path(name))))

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        total = sum(t.nbytes for t in targets)
        content: bytes = self._run(
            name,
            lambda: self._fs.cat_file(self._path(name), start=offset, end=offset + total),
        )
        if len(content) < total:
            raise StoreMissing(f"{self._url}/{name} ends before byte {offset + total}.")
        at = 0
        for target in targets:
            target[:] = content[at : at + target.nbytes]
            at += target.nbytes

    def find(self, prefix: str) -> list[ObjectInfo]:
        top = self._path(prefix.rpartition("/")[0]).rstrip("/")

        def attempt() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._fs.find(top, detail=True)
            return found

        result = []
        for path, info in self._run(prefix, attempt).items():
            name = path[len(self._root) :].lstrip("/")
            if name.startswith(prefix):
                result.append(ObjectInfo(name, int(info.get("size") or 0), _modified_s(info)))
        return sorted(result, key=lambda info: info.name)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._run(name, partial(self._fs.rm_file, self._path(name)))
            except StoreMissing:
                continue

    def check(self) -> None:
        probe(self)

    def sweep(self) -> None:
        pass

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _run(self, name: str, attempt: Callable[[], T]) -> T:
        def typed() -> T:
            try:
                return attempt()
            except StoreError:
                raise
            except FileNotFoundError as error:
                raise StoreMissing(f"{self._url}/{name} is not there.") from error
            except PermissionError as error:
                raise StoreDenied(
                    f"{self._url}/{name} refused the request ({error}); check the permissions."
                ) from error
            except OSError as error:
                if error.errno == 28:
                    raise StoreFull(f"{self._url}/{name}: no space left; free some.") from error
                raise StoreUnavailable(
                    f"{self._url}/{name} failed ({error}); check the store."
                ) from error

        return retry(self._attempts, typed)


def _modified_s(info: dict[str, Any]) -> float:
    for key in ("mtime", "modified", "created", "LastModified"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0
