"""What a replica serves: as its command line says, as its group agrees, as somebody publishes.

What an administrator asks of the primary, and what has been published since, the primary loads
first. Once it is served it goes, as an acknowledged entry, to all others, also to those that come
later; they change to it one after the other (``wanted``). A replica alone is its own primary.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from paddle_ft.agent.net import endpoint
from paddle_ft.errors import (
    PaddleFTError,
)
from paddle_ft.serve import wanted
from paddle_ft.serve.loader import Loader, Wanted, as_answer, version_of
from paddle_ft.serve.log import Entry
from paddle_ft.serve.models import check_name
from paddle_ft.serve.reconcile import Model, Models, is_final
from paddle_ft.serve.registry import Group, Level
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import ModelError, NotPrimary, ServeError, Unavailable
from paddle_ft.serve.wanted import NEWEST, Choice, Failure

log = logging.getLogger("paddle_ft")
T = TypeVar("T")

LOOK_S = 0.1
"""Between two looks at the group."""
FIRST_S = 5.0
"""How long a newcomer waits for what its group has agreed on, before it goes by its own flags."""


@dataclass(frozen=True, slots=True)
class Policy:
    follow: bool = True
    """Newer versions that are registered are taken up, where no number is given."""
    look_s: float = 0.0
    """And so often the store is looked at for one; 0: never."""
    level: Level = "active-active"
    """Of a group for which nobody has chosen one."""
    notice_s: float = 1.0
    """How long workers stay after the others were told that they will not."""


class Following:
    """``catalog.Control`` of a replica, alone or in a group; for one event loop."""

    def __init__(self, loader: Loader, policy: Policy | None = None) -> None:
        self._loader = loader
        self._policy = policy or Policy()
        self._group: Replicated | None = None
        self._models = Models(loader, self._policy.notice_s, self._lead)

    def join(self, group: Replicated) -> None:
        """From now on changes are the group's; before it starts."""
        self._group = self._models.group = group
        group.on_applied(self._applied)

    async def run(self, models: Sequence[Wanted]) -> None:
        """Serves ``models``, and what else is agreed on, until it is cancelled.

        While the store does not answer it goes on trying. Raises PaddleFTError for what keeps it
        from serving ``models`` when it starts, and trying again cannot mend.
        """
        for each in models:
            self._models.model(each.name).own = each.version or NEWEST
            self._loader.catalog.loading(each.name, str(each.version or ""))
        looks = [self._models.spawn(self._look_at_store())]
        if self._group is not None:
            await self._first_view(self._group)
            looks.append(self._models.spawn(self._look_at_group(self._group)))
        try:
            await self._models.run()
        finally:
            for look in looks:
                look.cancel()

    async def stop(self) -> None:
        """Follows no more; what was asked for is refused."""
        await self._models.stop()

    @property
    def failures(self) -> dict[str, Failure]:
        """What is wanted and cannot be served here, by model."""
        return self._models.failures

    @property
    def reason(self) -> str:
        """Sentences about what was published or agreed on and is not served; or ""."""
        unproven = {
            m.name: m.unproven
            for m in self._models
            if m.unproven is not None and wanted.is_behind(m.choice, m.unproven.version)
        }
        return "; ".join(filter(None, (wanted.told(self.failures), wanted.told(unproven))))

    @property
    def standby(self) -> bool:
        """All files are here, and no workers are wanted."""
        return self._models.standby

    # ------------------------------------------------------------ for administrators

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Serves the newest version, which is followed then, or ``parameters["version"]``."""
        self._check()
        await self._shielded(self._load(name, version_of(parameters)))

    async def unload(self, name: str) -> None:
        self._check()
        await self._shielded(self._unload(name))

    async def _load(self, name: str, version: int | None) -> None:
        try:
            model = self._models.model(check_name(name))
            model.loads += 1
            try:
                async with model.lock:
                    await self._loader.bring(Wanted(name, version), extra=model.own is None)
                    served = self._models.served(name)
                    assert served is not None
                    await self._agree(model, Choice(served, pinned=version is not None))
            finally:
                model.loads -= 1
                self._models.forget(name)
        except PaddleFTError as error:
            raise as_answer(error) from error

    async def _unload(self, name: str) -> None:
        model = self._models.get(name)
        if model is None:
            raise BadRequest(f"there is no model {name[:60]!a} here", 404)
        async with model.lock:
            await self._loader.unload(name)
            # Not deleted: those that come later were told by their command line to serve it.
            await self._agree(model, Choice(None))

    async def _shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """Goes on without a client that has lost its patience."""
        task = self._models.spawn(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._models.stopped:
                raise Unavailable("this replica is leaving: ask another one") from None
            raise

    def _check(self) -> None:
        """Raises NotPrimary, Unavailable."""
        group = self._group
        if group is None or group.role == "primary":
            return
        other = group.primary
        if other is None or other.name == group.name:
            raise Unavailable("there is no primary at the moment: ask again", 0.5)
        raise NotPrimary(other.name, endpoint(other.host, other.http_port))

    async def _agree(self, model: Model, choice: Choice) -> None:
        """Raises ServeError; if the group does not know of it, what it knows of is served again."""
        if choice.version is not None:
            choice = replace(choice, digest=self._loader.digest(model.name))
        try:
            if self._group is None:
                model.choice = choice
            else:
                await self._group.put("version", model.name, choice.encode())
        finally:
            self._models.begin(model)

    # ------------------------------------------------------------ what is heard

    def _applied(self, entry: Entry) -> None:
        if entry.kind != "version":
            return
        model = self._models.model(entry.key)
        try:
            model.choice = None if entry.value is None else wanted.choice(entry.value)
        except ValueError as error:
            log.error("the group's version of %s is not understood here: %s", entry.key, error)
        self._models.begin(model)

    async def _first_view(self, group: Replicated) -> None:
        """Returns once this replica has all that was acknowledged, or after FIRST_S."""
        until_s = time.monotonic() + FIRST_S
        while time.monotonic() < until_s:
            seen = group.group
            in_sync = seen.in_sync is not None and group.name in seen.in_sync.names
            if in_sync and group.told:
                return
            await asyncio.sleep(LOOK_S / 2)

    async def _look_at_group(self, group: Replicated) -> None:
        """Wakes all tasks when the group has changed; sets its level if nobody has."""
        seen, role = Group(), ""
        while True:
            if group.group is not seen or group.role != role:
                seen, role = group.group, group.role
                for model in self._models:
                    model.news.set()
                level = self._policy.level
                if level != "active-active" and not seen.level_revision and role == "primary":
                    await group.choose(level)
            await asyncio.sleep(LOOK_S)

    async def _look_at_store(self) -> None:
        while self._policy.look_s:
            await asyncio.sleep(self._policy.look_s)
            for model in self._models:
                if self._leads() and model.choice is not None and not model.choice.pinned:
                    with suppress(PaddleFTError):  # it is looked at again
                        model.found = await self._loader.newest(model.name) or 0
                        model.news.set()

    def _tell_of_pinned(self, model: Model) -> None:
        choice, published = model.choice, self._published(model) or 0
        newest = choice.version or 0 if choice is not None else 0
        if choice is not None and choice.pinned and published > max(newest, model.not_taken):
            model.not_taken = published
            log.info(
                "%s %d was published, and %d stays, which was asked for by number: to follow "
                "again, load %s without one",
                model.name,
                published,
                newest,
                model.name,
            )

    async def _lead(self, model: Model, now_s: float) -> float:
        """The primary's: tells the group what is served, and takes up what was published."""
        if not self._leads() or not self._models.is_warm():
            return float("inf")
        self._tell_of_pinned(model)
        news = wanted.to_tell(model.choice, model.own, self._models.served(model.name))
        version = wanted.to_prove(model.choice, self._published(model), model.unproven, now_s)
        try:
            if news is not None:
                await self._agree(model, news)
                return now_s
            if version is not None:
                log.info("%s %d was published", model.name, version)
                await self._loader.bring(Wanted(model.name, version))
                await self._agree(model, Choice(version))
                return now_s
        except ServeError as error:
            if not isinstance(error, ModelError):
                log.debug("the group was not told about %s: %s", model.name, error)
                return now_s + wanted.AGAIN_S
            self._unproven(model, version, error)
        except PaddleFTError as error:
            self._unproven(model, version, error)
        failed = model.unproven  # of an older version, it may be: then it is over
        again = failed is not None and not failed.final and failed.again_s > now_s
        return failed.again_s if failed is not None and again else float("inf")

    def _unproven(self, model: Model, version: int | None, error: PaddleFTError) -> None:
        assert version is not None
        final, now_s = is_final(error), time.monotonic()
        model.unproven = wanted.failure(model.unproven, version, str(error), final, now_s)
        if model.unproven.tries == 1:
            log.error("%s %d is not taken up by the group: %s", model.name, version, error)

    def _leads(self) -> bool:
        return self._group is None or self._group.role == "primary"

    def _published(self, model: Model) -> int | None:
        """The newest that is known of, if it is to be followed."""
        found = [model.found] if model.found else []
        if self._group is not None and self._policy.follow:
            told = self._group.group.published.get(model.name)
            found += [told.version] if told is not None else []
        return max(found, default=None)
