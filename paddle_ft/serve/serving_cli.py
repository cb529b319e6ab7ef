"""``paddle-ft serve`` and ``paddle-ft serving``: run a replica, and see a group of them."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from paddle_ft.errors import ConfigError
from paddle_ft.serve import options
from paddle_ft.serve.options import ConfigFile, Etcd, GroupName

if TYPE_CHECKING:
    from rich.table import Table

    from paddle_ft.config import EtcdConfig
    from paddle_ft.coordination.kv import Coordinator
    from paddle_ft.serve.registry import Group

WATCH_S = 1.0


def serve(context: typer.Context) -> None:
    """Serve published models: the same as python -m paddle_ft.serve."""
    from paddle_ft.exits import end
    from paddle_ft.serve.__main__ import main

    end(main(context.args))


def serving(
    etcd: Etcd = "",
    group: GroupName = "",
    level: Annotated[
        str,
        typer.Option(
            help="serve it so: active-active, hot-standby or cold-standby",
            autocompletion=lambda: ["active-active", "hot-standby", "cold-standby"],
        ),
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", help="whenever it changes, until Ctrl-C")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="for programs; with --watch, a line for each change")
    ] = False,
    config: ConfigFile = "",
) -> None:
    """Show the replicas of a serving group, what they serve, and who is the primary."""
    from paddle_ft.serve.watched_group import read_group

    settings = options.settings(etcd, group, config)
    name = settings.serve.group
    if level:
        _choose(settings.etcd, name, level)
    if watch:
        _watch(settings.etcd, name, as_json)
        return
    _show(name, read_group(settings.etcd, name), as_json)


def _choose(etcd: EtcdConfig, group: str, level: str) -> None:
    """Raises ConfigError, EtcdUnavailable."""
    from paddle_ft.coordination.etcd import EtcdCoordinator
    from paddle_ft.serve import registry

    levels: tuple[registry.Level, ...] = get_args(registry.Level)
    found = next((each for each in levels if each == level), None)
    if found is None:
        raise ConfigError(f"--level {level} is none: give one of {', '.join(levels)}")
    coordinator = EtcdCoordinator(etcd)
    try:
        coordinator.transact(registry.choose(registry.Keys(group), found))
    finally:
        coordinator.close()


def _show(name: str, group: Group, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(asdict(group)))
        return
    # Wide where nobody looks, so that a row is a line.
    screen = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for line in describe(name, group):
        screen.print(line, markup=False, highlight=False)


def _watch(etcd: EtcdConfig, name: str, as_json: bool) -> None:
    """Shows each state of the group that differs from the one before; and says, where errors go,
    when etcd does not answer, as what is shown is what it held last.

    Raises EtcdUnavailable, ServeError.
    """
    from paddle_ft.coordination.etcd import EtcdCoordinator
    from paddle_ft.serve.types import ServeError
    from paddle_ft.serve.watched_group import Registry, foreign

    news = threading.Event()
    registry = Registry(etcd, name, news.set)
    shown: list[str] = []
    asked, away = EtcdCoordinator(etcd), False
    try:
        registry.start()
        while True:
            news.clear()
            if (group := registry.group()) is not None:
                lines = _lines(name, group)
                if lines != shown:
                    shown = lines
                    if not as_json:
                        typer.echo(time.strftime("%H:%M:%S "), nl=False)
                    _show(name, group, as_json)
            if news.wait(WATCH_S):
                continue
            if away != (away := not _answers(asked)):
                at, how = time.strftime("%H:%M:%S"), "does not answer: this is what it held last"
                typer.echo(f"{at} etcd {how if away else 'answers again'}", err=True)
    except KeyboardInterrupt:
        return
    except ValueError as error:
        raise ServeError(foreign(name, error)) from error
    finally:
        registry.close()
        asked.close()


def _answers(etcd: Coordinator) -> bool:
    from paddle_ft.errors import EtcdUnavailable

    try:
        etcd.read("/paddle_ft/-")
    except EtcdUnavailable:
        return False
    return True


def _lines(name: str, group: Group) -> list[str]:
    """As they are shown: ends of logs grow all the time, and are not."""
    from rich.console import Console

    screen = Console(soft_wrap=True, file=io.StringIO(), width=400)
    with screen.capture() as text:
        for line in describe(name, group):
            screen.print(line, markup=False, highlight=False)
    return text.get().splitlines()


def describe(name: str, group: Group) -> Iterator[str | Table]:
    """What a person wants to know of a serving group."""
    if not group.replicas:
        yield f"serving group {name}: no replica of it is running now, {group.level}"
        return
    count = f"{len(group.replicas)} replica{'s' if len(group.replicas) > 1 else ''}"
    primary = f"primary {group.primary}, term {group.term}" if group.primary else "no primary"
    yield f"serving group {name}: {count}, {primary}, {group.level}"
    yield _replicas(group)
    yield from _troubles(group)
    for each, record in sorted(group.replicas.items()):
        if record.reason:
            yield f"{each}: {record.reason}"


def _troubles(group: Group) -> Iterator[str]:
    """Why there is no primary, and what the state of the group has lost last."""
    in_sync = group.in_sync.names if group.in_sync else ()
    if not group.primary and in_sync and not group.replicas.keys() & set(in_sync):
        yield (
            f"only {', '.join(in_sync)} had the state of the group: it waits for their nodes, or "
            "for paddle-ft promote NODE --force, which gives it up"
        )
    if group.lost is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(group.lost.at_s))
        how = "a promotion was forced" if group.lost.forced else "all of them had ended"
        yield f"changes that only {', '.join(group.lost.names)} had were given up at {at}: {how}"


def _replicas(group: Group) -> Table:
    from rich.table import Column, Table

    name_column = Column("replica", overflow="fold")  # to be typed after paddle-ft promote
    table = Table(name_column, "HTTP", "gRPC", "condition", "models", "", box=None, pad_edge=False)
    in_sync = group.in_sync.names if group.in_sync else ()
    for name, record in sorted(group.replicas.items()):
        host = f"[{record.host}]" if ":" in record.host else record.host
        models = ", ".join(f"{model} {version}" for model, version in sorted(record.models.items()))
        notes = ["primary"] if name == group.primary else ["in sync"] if name in in_sync else []
        notes += [f"{record.share:.0%} of its share"] if record.share < 1 else []
        notes += [f"weight {record.weight}"] if record.weight != 1 else []
        share = f" {record.progress:.0%}" if record.condition == "loading" else ""
        table.add_row(
            name,
            f"{host}:{record.http_port}",
            f"{host}:{record.grpc_port}",
            f"{record.condition}{share}",
            models or "none yet",
            ", ".join(notes),
        )
    return table
