"""``paddle-ft promote``: says who the primary of a serving group is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from paddle_ft.serve import options
from paddle_ft.serve.options import ConfigFile, Etcd, GroupName

if TYPE_CHECKING:
    from paddle_ft.serve.registry import Group

PROMOTE_S = 10.0
LOOK_S = 0.02


def promote(
    replica: Annotated[
        str, typer.Argument(help="name or node of a replica (the furthest of the others)")
    ] = "",
    etcd: Etcd = "",
    group: GroupName = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="even if changes are lost that this replica has not got"),
    ] = False,
    config: ConfigFile = "",
) -> None:
    """Make another replica the primary of a serving group, without losing a request."""
    from paddle_ft.coordination.etcd import EtcdCoordinator
    from paddle_ft.serve.registry import Keys, Promote, parse
    from paddle_ft.serve.types import NotPromoted, ServeError
    from paddle_ft.serve.watched_group import foreign
    from paddle_ft.serve.wish import Wish

    settings = options.settings(etcd, group, config)
    group = settings.serve.group
    coordinator, keys = EtcdCoordinator(settings.etcd), Keys(group)

    def look() -> Group:
        seen = coordinator.read(keys.prefix)
        try:
            return parse(keys, seen.kvs, seen.revision)
        except ValueError as error:
            raise ServeError(foreign(group, error)) from error

    try:
        before = found = look()
        name = _target(found, group, replica, force)
        began_s = time.monotonic()
        wish = Wish(coordinator, keys, Promote(name, force))
        try:
            if found.primary != name:
                wish.make(PROMOTE_S)
            while (found := look()).primary != name:
                if why := wish.refused(found):
                    raise NotPromoted(why)
                if time.monotonic() - began_s > PROMOTE_S:
                    raise NotPromoted(
                        f"{name} was not promoted within {PROMOTE_S:g} s, and will not be: is it "
                        "running, and does it reach etcd?"
                    )
                time.sleep(LOOK_S)
        finally:
            wish.take_back()
    finally:
        coordinator.close()
    typer.echo(f"{name} is the primary of {group}, term {found.term}")
    if found.lost is not None and found.lost != before.lost:
        typer.echo(f"changes that only {', '.join(found.lost.names)} had are lost")


def _target(found: Group, group: str, replica: str, force: bool) -> str:
    """Who is to be the primary; raises NotPromoted where that cannot be, as far as is known."""
    from paddle_ft.serve import elect, registry
    from paddle_ft.serve.types import NotPromoted

    if not found.replicas:
        raise NotPromoted(f"no replica of the serving group {group} is running")
    name = registry.named(found, replica) if replica else elect.next_primary(found)
    in_sync = found.in_sync.names if found.in_sync else ()
    if replica and not name:
        there = ", ".join(sorted(found.replicas))
        raise NotPromoted(f"there is no replica {replica} in {group}: there are {there}")
    if not name:
        others = [
            f"{n} is {'not in sync' if n not in in_sync else record.condition}"
            for n, record in sorted(found.replicas.items())
            if n != found.primary
        ]
        raise NotPromoted(
            f"no other replica of {group} can be the primary now"
            + (f" ({', '.join(others)}): wait, or name one with --force" if others else "")
        )
    if not (force or found.primary) and in_sync and name not in in_sync:
        raise NotPromoted(
            f"{name} lacks changes that {', '.join(in_sync)} had: start their nodes again, or give "
            "these changes up with --force"
        )
    return name
