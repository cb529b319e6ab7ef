"""Settings that are changed while a group serves: an entry of its log each, in force everywhere.

What the configuration says holds until the group says something else; that lasts for as long as the
group does, whoever its primary is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from paddle_ft.serve.batching import Limits
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.log import Entry, Position
from paddle_ft.serve.replicated import Replicated
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve_config import ServeConfig

log = logging.getLogger("paddle_ft")

NAMES = ("batch_rows_max", "batch_wait_ms", "queue_max")
"""Of ``[serve]``."""


def checked(name: str, value: object) -> Any:
    """``value`` if it is one of that setting; raises BadRequest."""
    if name not in NAMES:
        raise BadRequest(f"there is no setting {name[:60]!a} to change: {', '.join(NAMES)}")
    try:
        model = ServeConfig.model_validate({name: value}, strict=True)
    except ValidationError as error:
        raise BadRequest(f"{name}: {error.errors()[0]['msg']}") from None
    return getattr(model, name)


class Settings:
    """Those of one replica, alone or in a group."""

    def __init__(self, config: ServeConfig, catalog: Catalog) -> None:
        self._configured = {name: getattr(config, name) for name in NAMES}
        self._changed: dict[str, Any] = {}
        self._catalog = catalog
        self._group: Replicated | None = None

    def join(self, group: Replicated) -> None:
        """From now on they are the group's; before it starts."""
        self._group = group
        group.on_applied(self._applied)

    @property
    def values(self) -> dict[str, Any]:
        """As they are in force on this replica."""
        return self._configured | self._changed

    async def change(self, wanted: Mapping[str, object]) -> Position | None:
        """Changes those named, None: back to what is configured; gives where the last one stands.

        Raises BadRequest before anything is changed, and what ``Replicated.put`` raises.
        """
        found = {n: None if v is None else checked(n, v) for n, v in wanted.items()}
        if unknown := [name for name in found if name not in NAMES]:
            checked(unknown[0], None)
        position = None
        for name, value in found.items():
            if self._group is None:
                self._take(name, value)
            else:
                data = None if value is None else json.dumps(value).encode()
                position = await self._group.put("setting", name, data)
        return position

    def _applied(self, entry: Entry) -> None:
        if entry.kind != "setting" or entry.key not in NAMES:
            return
        try:
            value = None if entry.value is None else checked(entry.key, json.loads(entry.value))
        except (ValueError, BadRequest) as error:
            log.error("the group's %s is not understood here: %s", entry.key, error)
            return
        self._take(entry.key, value)

    def _take(self, name: str, value: Any) -> None:
        if value is None:
            self._changed.pop(name, None)
        else:
            self._changed[name] = value
        log.info("%s is %s", name, self.values[name])
        self._catalog.limit(limits(self._catalog.limits, self.values))


def limits(before: Limits, values: Mapping[str, Any]) -> Limits:
    """``before`` with the settings ``values``."""
    return replace(
        before,
        rows_max=values["batch_rows_max"],
        wait_max_s=values["batch_wait_ms"] / 1e3,
        queue_max=values["queue_max"],
    )
