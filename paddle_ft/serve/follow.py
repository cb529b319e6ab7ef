"""Which versions a serving group serves: what the primary loads, the others load after it.

A change that an administrator asks of the primary is made there first. Once it is served it goes,
as an acknowledged entry, to all others, also to those that come later; each does it by itself, and
one that cannot goes on with what it has and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from paddle_ft.errors import PaddleFTError
from paddle_ft.serve.loader import Loader
from paddle_ft.serve.log import Entry
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import NotPrimary, Unavailable

log = logging.getLogger("paddle_ft")


class Following:
    """``catalog.Control`` of a replica, alone or in a group; for one event loop."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._group: Replicated | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, bytes | None] = {}

    def join(self, group: Replicated) -> None:
        """From now on changes are the group's; before it starts."""
        self._group = group
        group.on_applied(self._applied)

    async def stop(self) -> None:
        """Follows no more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._check()
        await self._loader.load(name, parameters)
        if self._group is not None:
            version = self._loader.catalog.served.get(name, "")
            await self._group.put("version", name, version.encode())

    async def unload(self, name: str) -> None:
        self._check()
        await self._loader.unload(name)
        if self._group is not None:
            # Not deleted: those that come later were told by their command line to serve it.
            await self._group.put("version", name, b"")

    def _check(self) -> None:
        """Raises NotPrimary, Unavailable."""
        group = self._group
        if group is None or group.role == "primary":
            return
        other = group.primary
        if other is None or other.name == group.name:
            raise Unavailable("there is no primary at the moment: ask again", 0.5)
        raise NotPrimary(other.name, f"{other.host}:{other.http_port}")

    def _applied(self, entry: Entry) -> None:
        if entry.kind == "version" and entry.value is not None:
            self._wanted[entry.key] = entry.value
            if entry.key not in self._tasks:
                task = asyncio.get_running_loop().create_task(self._follow(entry.key))
                self._tasks[entry.key] = task
                task.add_done_callback(lambda _: self._tasks.pop(entry.key, None))

    async def _follow(self, name: str) -> None:
        """Does what is wanted of a model now, until nothing else is."""
        done: bytes | None = None
        while (wanted := self._wanted[name]) != done:
            done = wanted
            try:
                if wanted:
                    await self._loader.load(name, {"version": wanted.decode()})
                else:
                    await self._loader.unload(name)
            except BadRequest as error:
                if wanted or error.status != 404:
                    log.error("the group's version of %s is not served here: %s", name, error)
            except Unavailable as error:
                log.warning("the group's version of %s is tried again: %s", name, error)
                done = None
                await asyncio.sleep(error.retry_after_s)
            except PaddleFTError as error:
                log.error("the group's version of %s is not served here: %s", name, error)
