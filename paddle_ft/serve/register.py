"""Tells a serving group of a version that was published, so that it is taken up."""

from __future__ import annotations

from paddle_ft.coordination.kv import Coordinator
from paddle_ft.errors import CoordinationError
from paddle_ft.serve import registry
from paddle_ft.serve.registry import Keys, Published

_TRIES = 20


def register(coordinator: Coordinator, group: str, name: str, now: Published) -> bool:
    """Registers ``now`` as the newest version of ``name``; False if one as new is there already.

    Safe to call again. Raises CoordinationError.
    """
    keys = Keys(group)
    key = keys.model(name)
    for _ in range(_TRIES):
        before = next((kv for kv in coordinator.read(key).kvs if kv.key == key), None)
        try:
            change = registry.publish(keys, name, now, before)
        except ValueError as error:
            raise CoordinationError(f"{error}; delete that key of etcd.") from None
        if change is None:
            return False
        if coordinator.transact(change).succeeded:
            return True
    raise CoordinationError(f"{key} was changed by others {_TRIES} times; try again.")
