"""``paddle-ft promote``: says who the primary of a serving group is."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from paddle_ft.config import EtcdConfig, load

if TYPE_CHECKING:
    from paddle_ft.serve.registry import Group

PROMOTE_S = 10.0
LOOK_S = 0.02

Etcd = Annotated[str, typer.Option(help="etcd members, host:port,…", envvar="PADDLE_FT_ETCD")]
GroupName = Annotated[str, typer.Option("--group", help="name of the serving group")]
ConfigFile = Annotated[str, typer.Option(help="TOML file of settings, as configs/default.toml")]


def _access(etcd: str, config: str) -> EtcdConfig:
    given = {"etcd.endpoints": tuple(filter(None, etcd.split(",")))}
    return load(given, os.environ, config or None, {"etcd.endpoints": "--etcd"}).config.etcd


def promote(
    etcd: Etcd,
    group: GroupName,
    replica: Annotated[
        str, typer.Argument(help="name or node of a replica (the furthest of the others)")
    ] = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="even if changes are lost that this replica has not got"),
    ] = False,
    config: ConfigFile = "",
) -> None:
    """Make another replica the primary of a serving group, without losing a request."""
    from paddle_ft.coordination.etcd import EtcdCoordinator
    from paddle_ft.serve import registry
    from paddle_ft.serve.registry import Keys, Promote, parse
    from paddle_ft.serve.types import NotPromoted

    coordinator, keys = EtcdCoordinator(_access(etcd, config)), Keys(group)

    def look() -> Group:
        seen = coordinator.read(keys.prefix)
        return parse(keys, seen.kvs, seen.revision)

    try:
        found = look()
        name = registry.named(found, replica) if replica else registry.next_primary(found)
        if not name:
            there = ", ".join(found.replicas) or "none"
            raise NotPromoted(f"no replica {replica or 'is in sync'}: {there} in {group}")
        began_s = time.monotonic()
        if found.primary != name:
            coordinator.transact(registry.wish(keys, Promote(name, force)))
        while (found := look()).primary != name:
            asked = found.promote
            if asked is None or asked.target != name or asked.refused:
                why = asked.refused if asked is not None else "another replica was"
                raise NotPromoted(f"{name} was not promoted: {why}")
            if time.monotonic() - began_s > PROMOTE_S:
                raise NotPromoted(
                    f"{name} was not promoted within {PROMOTE_S:g} s: see 'paddle-ft serving'"
                )
            time.sleep(LOOK_S)
    finally:
        coordinator.close()
    typer.echo(f"{name} is the primary of {group}, term {found.term}")
