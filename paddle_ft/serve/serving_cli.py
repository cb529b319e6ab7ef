"""``paddle-ft serve`` and ``paddle-ft serving``: run a replica, and see a group of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from paddle_ft.serve.registry import Group


def serve(context: typer.Context) -> None:
    """Serve published models: the same as python -m paddle_ft.serve."""
    from paddle_ft.exits import end
    from paddle_ft.serve.__main__ import main

    end(main(context.args))


def serving(
    etcd: Annotated[str, typer.Option(help="etcd members, host:port,…", envvar="PADDLE_FT_ETCD")],
    group: Annotated[str, typer.Option(help="name of the serving group")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show the replicas of a serving group, what they serve, and who is the primary."""
    import os

    from rich.console import Console

    from paddle_ft.config import load
    from paddle_ft.serve.gateway import read_group

    endpoints = tuple(filter(None, etcd.removeprefix("etcd://").split(",")))
    config = load({"etcd.endpoints": endpoints, "serve.group": group}, os.environ).config
    found = read_group(config.etcd, config.serve.group)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    screen = Console(soft_wrap=True)
    for line in describe(group, found):
        screen.print(line, markup=False, highlight=False)


def describe(name: str, group: Group) -> Iterator[str | Table]:
    """What a person wants to know of a serving group."""
    if not group.replicas:
        yield f"serving group {name}: no replica of it is running now"
        return
    count = f"{len(group.replicas)} replica{'s' if len(group.replicas) > 1 else ''}"
    primary = f"primary {group.primary}, term {group.term}" if group.primary else "no primary"
    yield f"serving group {name}: {count}, {primary}"
    yield _replicas(group)


def _replicas(group: Group) -> Table:
    from rich.table import Table

    table = Table("replica", "HTTP", "gRPC", "condition", "models", "", box=None, pad_edge=False)
    in_sync = group.in_sync.names if group.in_sync else ()
    for name, record in sorted(group.replicas.items()):
        host = f"[{record.host}]" if ":" in record.host else record.host
        models = ", ".join(f"{model} {version}" for model, version in sorted(record.models.items()))
        notes = ["primary"] if name == group.primary else ["in sync"] if name in in_sync else []
        notes += [f"{record.share:.0%} of its share"] if record.share < 1 else []
        table.add_row(
            name,
            f"{host}:{record.http_port}",
            f"{host}:{record.grpc_port}",
            record.condition,
            models or "none yet",
            ", ".join(notes),
        )
    return table
